"""Several runs on one page, and the command line."""

import json
import re

import pytest

from fusionlab import report
from fusionlab.errors import UserError
from fusionlab.report.__main__ import main
from fusionlab.report.metrics import read_metrics
from tests.report import fakes


def read(path) -> str:
  body = path.read_text("utf-8").partition("</style>")[2]
  return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@pytest.fixture
def runs(tmp_path):
  mot = fakes.write_run(tmp_path / "mot")
  dense = fakes.write_run(tmp_path / "dense", fakes.experiment(untie=""))
  bare = fakes.write_run(tmp_path / "x" / "dense")
  for name in ("evaluation.json", "samples/samples.json", "metrics.csv"):
    (bare / name).unlink()
  (bare / "metrics.jsonl").unlink()
  return [mot, dense, bare]


def test_runs_are_compared(runs, tmp_path):
  out = report.compare(runs, tmp_path / "all.html")
  said = read(out)
  for words in (
    "3 runs compared",
    "status finished (num_steps) finished (num_steps)",
    "model.untie",
    "Loss, text, train",
    "Loss, image, held-out pictures",
    str(runs[2]),
    "not scored yet",
    "not sampled yet",
    "red apple 0",
  ):
    assert words in said, words
  assert "optimizer.learning_rate" not in said
  # Of 9 captions: the real picture, and two samples of two runs.
  assert out.read_text("utf-8").count("<img ") == 9 * (1 + 2 * 2)
  assert report.compare(runs, out).read_bytes() == out.read_bytes()


def test_nats_and_squared_errors_share_no_row(tmp_path):
  codes = fakes.write_run(tmp_path / "codes")
  latents = fakes.write_continuous_run(tmp_path / "latents")
  said = read(report.compare([codes, latents], tmp_path / "all.html"))
  for words in (
    "loss, image (nats per code) all held out 4 [3.900, 4.100] n 256 –",
    "denoising error, image (mean squared error) all held out – 0.6200",
    "Denoising error, image, train",
    "in patches 0 512",
  ):
    assert words in said, words


def test_the_same_files_give_the_same_bytes(runs):
  first = report.write(runs[0]).read_bytes()
  assert report.write(runs[0]).read_bytes() == first
  assert not list(runs[0].glob("*tmp*"))


def test_equal_runs_differ_in_nothing(tmp_path):
  pair = [fakes.write_run(tmp_path / name) for name in "ab"]
  out = report.compare(pair, tmp_path / "ab.html")
  assert "The configurations are the same in every key." in read(out)


def test_captions_that_only_one_run_drew_are_left_out(tmp_path):
  pair = [
    fakes.write_run(tmp_path / name, caption=name) for name in ("pear", "plum")
  ]
  out = report.compare(pair, tmp_path / "ab.html")
  assert "No two of the runs drew the same captions." in read(out)


def test_no_page_loads_anything(runs, tmp_path):
  said = report.compare(runs, tmp_path / "all.html").read_text("utf-8")
  assert "http" not in said
  assert "<script" not in said
  ids = re.findall(r'\bid="([^"]*)"', said)
  assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
  ("given", "said"), [([0], "two or more"), ([0, 0], "are one folder")]
)
def test_less_than_two_folders_are_refused(runs, tmp_path, given, said):
  with pytest.raises(UserError, match=said):
    report.compare([runs[i] for i in given], tmp_path / "all.html")


def test_the_command_writes_and_prints_where(
  runs, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert main(["mot"]) == 0
  assert main(["mot", "--out", "page.html"]) == 0
  assert main(["mot", "dense"]) == 0
  assert main(["mot", "dense", "--out", "ab.html"]) == 0
  paths = ["mot/report.html", "page.html", "comparison.html", "ab.html"]
  assert capsys.readouterr().out.split() == paths
  assert all((tmp_path / path).stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["nowhere"], "nowhere does not exist; give the folder of a run"),
    (["file"], "file is a file"),
    (["empty"], "empty holds no run"),
    (["mot", "mot/../mot"], "one folder"),
    (["mot", "--out", "no/page.html"], "cannot write no/page.html"),
    (["mot", "--out", "empty"], "cannot write empty"),
  ],
)
def test_a_mistake_is_one_line(
  runs, tmp_path, capsys, monkeypatch, words, said
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").touch()
  (tmp_path / "empty").mkdir()
  assert main(words) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert len(captured.err.splitlines()) == 1
  assert said in captured.err
  assert not list(tmp_path.rglob("*.tmp"))


def test_help_shows_the_ways_to_call_it(capsys):
  with pytest.raises(SystemExit) as stop:
    main(["--help"])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  assert "python -m fusionlab.report runs/a runs/b runs/c" in shown
  assert "--out FILE" in shown


def test_both_files_of_metrics_read_the_same(tmp_path):
  for name in ("csv", "jsonl"):
    (tmp_path / name).mkdir()
    fakes.write_metrics(tmp_path / name, name)
  ours, theirs = (read_metrics(tmp_path / name) for name in ("csv", "jsonl"))
  assert ours.steps.tolist() == theirs.steps.tolist() == [1, 10, 20, 30, 40]
  assert ours.columns.keys() == theirs.columns.keys()
  for name in ours.columns:
    assert ours.series(name)[1].tolist() == theirs.series(name)[1].tolist()


def test_torn_lines_of_metrics_are_left_out(tmp_path):
  (tmp_path / "metrics.csv").write_bytes(
    b"step,train/loss\n1,2.0\n\n2\n\xff\n10,1.0\n\0\0\n20,"
  )
  assert read_metrics(tmp_path).series("train/loss")[0].tolist() == [1, 10]
  (tmp_path / "metrics.csv").unlink()
  (tmp_path / "metrics.jsonl").write_text(
    json.dumps({"step": 1, "train/loss": 2.0}) + '\n[]\n{"step'
  )
  assert read_metrics(tmp_path).steps.tolist() == [1]
