"""The page of one run says what its workdir holds, and what it lacks."""

import html
import json
import re
import shutil

import pytest

from fusionlab import report
from fusionlab.errors import UserError
from fusionlab.report import curves, exposure, panels, records
from fusionlab.train.workdir import write_status
from fusionlab.train.writers import Writers
from tests.report import fakes

_CHARTS = {}


@pytest.fixture(autouse=True)
def _drawn_once(monkeypatch):
  """Equal charts are drawn once: they are most of a page's time."""

  def chart(*words, **options):
    *names, lines = words
    arrays = [(line.steps.tobytes(), line.values.tobytes()) for line in lines]
    labels = [(line.label, line.style) for line in lines]
    key = str((names, options, arrays, labels))
    if key not in _CHARTS:
      _CHARTS[key] = curves.chart(*words, **options)
    return _CHARTS[key]

  monkeypatch.setattr(panels, "chart", chart)


@pytest.fixture
def run(tmp_path):
  return fakes.write_run(tmp_path / "runs" / "demo")


def page(folder) -> str:
  return report.write(folder).read_text("utf-8")


def text(folder) -> str:
  """What a reader reads, in one line."""
  body = page(folder).partition("</style>")[2]
  return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.mark.smoke
def test_everything_is_on_the_page(run):
  assert report.write(run) == run / "report.html"
  said = text(run)
  for words in (
    "demo status finished (num_steps) step 40 of 40",
    "tokens seen about 80.0 k",
    "20 s in steps, 6 s in evaluations",
    "2 × NVIDIA H100",
    "temperature 0.3, top k 16",
    "Training captions",
    "Held-out (picture, style) pairs",
    "3 are nearest to the own picture; median rank 9 of 3,511, by chance 1,756",
    "12.5 % [2.5, 22.5] n 256, chance 0.028 %",
    "a pear",
    "(nothing)",
    "most likely",
    "Loss, text",
    "loss, image (nats per code)",
    "1,000 resamples",
    "python -m experiments.run --config.model.untie=",
    "with uncommitted changes",
    "data.sources.openmoji.weight 2.0 1.0",
    "Checkpoints of step 40. Incomplete, and not resumed from: step 50.",
    "No failure is recorded",
    "Resumes are not known",
  ):
    assert words in said, words
  pictures = re.findall(r'<img src="data:image/webp;base64,', page(run))
  assert len(pictures) == 9 * 4 + 3 + 3


def test_parameters_are_those_of_the_analysis(run):
  from fusionlab.analysis import parameters

  counts = parameters.count(fakes.experiment().model, 4096)
  said = text(run)
  assert f"in all {counts.total:,}" in said
  for tower in ("text", "image"):
    own = counts.per_tower[tower]
    used = own + counts.per_tower["shared"]
    assert f"{tower} {own:,} {used:,}" in said


def test_continuous_pictures_are_denoised_and_no_codes(tmp_path):
  """Squared errors have their own names; nothing on the page is in codes."""
  run = fakes.write_continuous_run(tmp_path / "demo")
  said = text(run)
  for words in (
    "train 0.5000 all held out 0.6200",
    "Denoising error, image, by noise level, held out",
    "noise 0.1 0.5000 noise 0.9 0.0600",
    "What a caption saves of its picture's loss",
    "denoising error, image (mean squared error) 0.6200",
    "0.6200 [0.6100, 0.6300]",
    "denoising error, image, at noise 0.9 (mean squared error)",
    "loss in all, that of pictures weighted 4 ",
    "what the caption saves of the mean squared error 0.0100",
    "of its predicted noise – – – 0.3300 [0.3200, 0.3400]",
    "Pictures on their way",
    "red apple 0 3 9 12",
    "by the mean squared error of what the model predicts of the noise",
    "0.1250 red apple 0",
    f"in all {3585 * 32 + 2 * 4 * 32 * 64 + 16 * 32:,}",
    f"image {4 * 32 * 64 + 16 * 32:,}",
    f"{16 * 32} bring patches of pictures in",
  ):
    assert words in said, words
  scores = said.partition("Curves")[2].partition("What was run")[0]
  assert " code" not in scores and "pictures a batch" not in scores
  shutil.rmtree(run / "checkpoints")
  assert "vocabulary is not known before the first checkpoint" in text(run)


def test_the_latents_size_is_not_known_before_a_checkpoint(tmp_path):
  run = fakes.write_continuous_run(tmp_path / "demo")
  shutil.rmtree(run / "checkpoints")
  config = json.loads((run / "config.json").read_text())
  config["model"]["vocab_size"] = 5000
  (run / "config.json").write_text(json.dumps(config))
  assert "size of the latents is not known before the first" in text(run)


def test_nothing_is_loaded_from_elsewhere(run):
  said = page(run)
  assert "http:" not in said
  assert "https:" not in said
  assert "<script" not in said
  assert set(re.findall(r'\bsrc="(.{5})', said)) == {"data:"}
  links = re.findall(r'\bhref="(#?)', said)
  assert links.count("") == 1  # the empty icon


def test_ids_are_unique_and_links_lead_to_one(run):
  said = page(run)
  ids = re.findall(r'\bid="([^"]*)"', said)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:href="|url\()#([^")]*)', said)) <= set(ids)


def test_what_files_hold_is_escaped(tmp_path):
  folder = fakes.write_run(tmp_path / "a<b>&", caption=fakes.EVIL)
  path = folder / "samples" / "samples.json"
  content = json.loads(path.read_text())
  content["described"]["heldout_picture"][0]["generated"] = [fakes.EVIL]
  content["settings"][fakes.EVIL] = fakes.EVIL
  content["grids"][fakes.EVIL] = content["grids"]["train"]
  path.write_text(json.dumps(content))
  write_status(folder, "failed", 3, fakes.EVIL)
  (folder / "starts.jsonl").write_text(
    json.dumps({"time": fakes.EVIL, "step": 0, "command": [fakes.EVIL]})
  )
  writers = Writers("csv", folder)
  writers.write(50, {f"train/loss/{fakes.EVIL}": 1.0, "eval/</b>/loss": 2.0})
  said = page(folder)
  assert "<script" not in said
  assert not re.search(r"<[^>]* onerror='x", said)
  assert "&lt;script&gt;alert(1)" in said
  assert "<h1>a&lt;b&gt;&amp;</h1>" in said


@pytest.mark.parametrize(
  ("lost", "said"),
  [
    ("evaluation.json", "--mode=evaluate scores everything, with intervals"),
    ("samples", "No pictures were sampled yet. python -m experiments.run"),
    ("environment.json", "The command was not recorded"),
    ("config.json", "There is no config.json"),
    ("status.json", "not known (no status.json) step 40"),
    ("checkpoints", "vocabulary is not known before the first checkpoint"),
    ("metrics.csv", "Loss, text"),
    ("metrics.jsonl", "Loss, text"),
    ("metrics.csv metrics.jsonl", "There are no metrics yet"),
    (
      "evaluation.json metrics.csv metrics.jsonl",
      "Nothing held out was scored yet",
    ),
    ("samples/train/0_0.png", "missing"),
  ],
)
def test_a_missing_piece_is_a_sentence(run, lost, said):
  for name in lost.split():
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert said in text(run)


@pytest.mark.parametrize("section", ["grids", "described", "likelihood"])
@pytest.mark.parametrize("content", [None, {}])
def test_sections_of_samples_may_be_absent(run, section, content):
  path = run / "samples" / "samples.json"
  samples = json.loads(path.read_text())
  samples[section] = content
  path.write_text(json.dumps(samples))
  said = text(run)
  assert ("has no grids" in said) == (section == "grids")


@pytest.mark.parametrize(
  ("epochs", "weights", "said"),
  [
    # The newest row that is not after the samples counts.
    ({20: 1.0, 38: 3.0, 50: 9.0}, {"openmoji": 2.0}, "at least 6 times each"),
    ({40: 1.0}, {"openmoji": 8.0, "flags": 1.5}, "at least once each"),
    # What has no pictures, and what is not read, does not count.
    ({40: 1.0}, {"openmoji": 2.0, "factbook": 0.3, "flags": 0.0}, "2 times"),
    ({40: 0.0}, {"openmoji": 1.0}, "seen at most once each"),
    ({40: 0.0}, {"openmoji": 40.0}, exposure.NOT_KNOWN),
    ({40: 1.0}, {"openmoji": 0.4}, "seen at most once each"),
    ({40: 2.0}, {"openmoji": 0.4}, exposure.NOT_KNOWN),
    ({40: 2.0}, {"factbook": 1.0}, exposure.NOT_KNOWN),
    ({50: 2.0}, {"openmoji": 1.0}, exposure.NOT_KNOWN),
    ({}, {"openmoji": 40.0}, exposure.NOT_KNOWN),
  ],
)
def test_how_often_training_pictures_were_seen(run, epochs, weights, said):
  """The note of the training grid claims what the files bound, no more."""
  config = json.loads((run / "config.json").read_text())
  one = config["data"]["sources"]["openmoji"]
  config["data"]["sources"] = {
    kind: one | {"kind": kind, "weight": weight}
    for kind, weight in weights.items()
  }
  (run / "config.json").write_text(json.dumps(config))
  for step, epoch in epochs.items():
    Writers("csv", run).write(step, {"data/epoch": epoch})
  assert said in exposure.train_note(records.read_run(run), 40)


def test_the_training_grid_says_how_often_it_was_seen(run):
  assert exposure.NOT_KNOWN in text(run)
  Writers("csv", run).write(38, {"data/epoch": 3.0})
  assert "Trained on at least 6 times each" in text(run)
  (run / "config.json").write_text("{}")
  assert exposure.NOT_KNOWN in text(run)


def test_styles_are_spoken_of_where_there_are_some(run):
  said = text(run)
  assert "(picture, style) pairs are known in another style only" in said
  path = run / "samples" / "samples.json"
  samples = json.loads(path.read_text())
  grids = samples["grids"]
  likely = samples["likelihood"]["heldout_picture"]
  samples["grids"] = {"train": grids["train"], "heldout": grids["train"]}
  samples["likelihood"] = {"train": likely, "heldout": likely}
  path.write_text(json.dumps(samples))
  (run / "evaluation.json").unlink()
  for name in ("metrics.csv", "metrics.jsonl"):
    (run / name).unlink()
  Writers("csv", run).write(40, {"eval/heldout/loss": 2.0, "eval/loss": 2.0})
  said = text(run)
  assert "(picture, style)" not in said and "other style" not in said
  assert (
    "the training set, a test of memory. The honest question is what" in said
  )
  assert "held out and never seen. In each row" in said
  assert "Held-out examples Never trained on. Of the 6 samples" in said
  assert "metric all held out Held-out examples" in said
  assert "Most and least likely pictures Of those scored" in said


def test_without_held_out_pictures_nothing_is_said_of_them(run):
  path = run / "samples" / "samples.json"
  samples = json.loads(path.read_text())
  samples["grids"] = {"train": samples["grids"]["train"]}
  path.write_text(json.dumps(samples))
  said = text(run)
  assert "a test of memory. In each row" in said
  assert "honest question" not in said


def test_a_broken_picture_or_one_outside_is_missing(run):
  path = run / "samples" / "samples.json"
  samples = json.loads(path.read_text())
  first, second = samples["grids"]["train"][:2]
  fakes.picture(run / "outside.png")
  first["generated"] = ["../outside.png", "train", "", 3]
  second["picture"] = None
  path.write_text(json.dumps(samples))
  (run / "samples" / "train" / "1_tokens.png").write_bytes(b"\x89PNG broken")
  said = page(run)
  missing = re.findall(r'aria-label="([^"]*): missing"', said)
  assert len(missing) == 5
  assert not any("real picture of red apple 1" in name for name in missing)


def test_a_large_picture_is_shrunk(run):
  before = report.write(run).stat().st_size
  fakes.picture(run / "samples" / "train" / "0_0.png", size=1500)
  assert report.write(run).stat().st_size < before + 30_000


def test_one_row_and_values_that_are_not_finite(run):
  for name in ("metrics.csv", "metrics.jsonl", "evaluation.json"):
    (run / name).unlink()
  writers = Writers("csv", run)
  row = fakes.metric_row(1, speed=False)
  writers.write(1, row | {"train/grad_norm": float("nan"), "train/loss": 1e300})
  assert "<code>train/grad_norm</code> at\n1." in page(run)
  writers.write(10, {"eval/loss/text": float("inf"), "train/loss/text": 1e29})
  assert "eval/loss/text at 10" in text(run)


def test_null_in_json_lines_is_not_finite(run):
  (run / "metrics.csv").unlink()
  with open(run / "metrics.jsonl", "a") as file:
    file.write('{"step": 50, "train/loss": null}\n{"step": 60, "tra')
  assert "train/loss at 50" in text(run)


def test_a_running_run_is_at_its_newest_row(run):
  write_status(run, "running", 0)
  assert "status running step 40 of 40" in text(run)


def test_failures_and_resumes(run):
  write_status(run, "failed", 30, "UserError: loss is not finite")
  dump = run / "dump" / "step_30"
  dump.mkdir(parents=True)
  (dump / "metrics.json").write_text('{"train/loss": "nan"}')
  Writers("csv", run).write(50, {"train/skipped_steps": 3.0})
  starts = [
    {"time": "2026-01-02T03:04:05Z", "step": 0, "commit": "abc", "command": []},
    {"time": "2026-01-02T04:04:05Z", "step": 20, "device": "H100"},
  ]
  lines = "".join(json.dumps(start) + "\n" for start in starts)
  (run / "starts.jsonl").write_text(lines + '{"time": "2026')
  said = text(run)
  for words in (
    "The run failed: UserError: loss is not finite",
    "not finite at step 30; the batch is in dump/step_30/",
    "train/loss nan",
    "3 updates were left out",
    "2026-01-02 03:04:05Z start 0 abc",
    "2026-01-02 04:04:05Z resume 20 H100",
  ):
    assert words in said, words
  assert "No failure" not in said


def test_a_configuration_of_another_version_is_said(run):
  config = json.loads((run / "config.json").read_text())
  config["model"]["later"] = 1
  (run / "config.json").write_text(json.dumps(config))
  assert "unknown key config.model.later" in text(run)


def test_a_vocabulary_of_the_config_counts_without_checkpoint(tmp_path):
  run = fakes.write_run(tmp_path / "r", fakes.experiment(vocab_size=5000))
  shutil.rmtree(run / "checkpoints")
  assert f"{2 * 32 * 5000:,} of the parameters are the tables" in text(run)


@pytest.mark.parametrize(
  "name",
  ["config.json", "status.json", "evaluation.json", "samples/samples.json"],
)
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_a_file_that_is_not_json_is_named(run, name, content):
  report.write(run)
  before = (run / "report.html").read_bytes()
  (run / name).write_bytes(content)
  with pytest.raises(UserError, match=re.escape(name)) as error:
    report.write(run)
  assert len(str(error.value).splitlines()) == 1
  assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("evaluation.json", {"step": 1}),
    ("evaluation.json", {"step": 1, "metrics": {"eval/loss": "x"}}),
    ("evaluation.json", {"step": 1, "metrics": {"eval/a": 1}, "intervals": {"eval/a": 3}}),
    ("samples/samples.json", {"grids": [1]}),
    ("samples/samples.json", {"grids": {"train": [{"key": 1}]}}),
    ("samples/samples.json", {"likelihood": {"a": {"most": [{"caption": ""}]}}}),
  ],
)  # fmt: skip
def test_json_of_another_format_is_named(run, name, content):
  (run / name).write_text(json.dumps(content))
  with pytest.raises(UserError, match=f"{name} is not of the format"):
    report.write(run)


def test_a_table_of_somebody_else_is_refused(run):
  (run / "metrics.csv").write_text("time,loss\n1,2\n")
  with pytest.raises(UserError, match="begin with a column 'step'"):
    report.write(run)
