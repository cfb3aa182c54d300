"""The command line: every mistake is one line that says what to do."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from absl import flags

from experiments import run
from experiments.command_line import define_flags, load_config, parse
from fusionlab.errors import UserError
from tests.train import processes

ROOT = pathlib.Path(__file__).parents[2]
MOT = "--config=configs/mot_chameleon.py"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def options(*words: str):
  argv = ["run", *words]
  values = flags.FlagValues()
  define_flags(values, argv)
  return parse(values, argv)


def mistake(*words: str) -> str:
  with pytest.raises(UserError) as caught:
    options(*words)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    ([], ["--config is missing", MOT]),
    (["configs/mot_chameleon.py"], ["not a flag", "--config="]),
    (["--config=configs/mot_chamelon.py"], ["'configs/mot_chameleon.py'"]),
    (["--config=mot_chameleon"], ["'configs/mot_chameleon.py'"]),
    ([f"{MOT}:7bb"], ["size '7bb'", "'7b'"]),
    ([MOT, "--mode=trian"], ["--mode=trian", "'train'"]),
    ([MOT, "--wrkdir=x"], ["wrkdir", "workdir"]),
    (["--mode=evaluate"], ["--workdir"]),
    (["--mode=generate", "--prompt=a"], ["--workdir"]),
    ([MOT, "--prompt=a"], ["--prompt is for --mode=generate", "train"]),
    (
      [MOT, "--mode=generate", "--prompt_file=no.txt"],
      ["cannot read", "no.txt"],
    ),
    ([MOT, "--mode=generate", "--top_k=few"], ["top_k", "few"]),
    (["--config.model.dim=3"], ["none is given", MOT]),
    (["--config.model.dim=3", MOT], ["before"]),
    ([MOT, "--config.model.dmi=3"], ["config.model.dmi", "'dim'"]),
    ([MOT, "--config.model.dmi", "3"], ["config.model.dmi", "'dim'"]),
    ([MOT, "--config.modle.dim=3"], ["config.modle", "'model'"]),
    ([MOT, "--config.batch_size=3"], ["'config.train.batch_size'"]),
    ([MOT, "--config.model=3"], ["config.model is a section"]),
    ([MOT, "--config.model.dim.x=3"], ["config.model.dim is one value"]),
    ([MOT, "--config.train.seed=a"], ["config.train.seed='a'", "an integer"]),
    ([MOT, "--config.train.seed=1.5"], ["config.train.seed", "an integer"]),
    (
      [MOT, "--config.optimizer.learning_rate=fast"],
      ["config.optimizer.learning_rate='fast'", "a number"],
    ),
    ([MOT, "--config.train.compile_cache=maybe"], ["true or false"]),
    ([MOT, "--config.model.towers=0 1"], ["config.model.towers", "commas"]),
    ([MOT, "--config.model.towers=0,a"], ["config.model.towers"]),
    ([MOT, "--config.train.batch_size=0"], ["at least 1"]),
    ([MOT, "--config.data.image_first=1.5"], ["at most 1.0"]),
    ([MOT, "--config.model.norm_placement=post"], ["norm_placement='post'"]),
    (
      [MOT, "--config.mesh.preset=tpu_v5_256"],
      ["mesh.preset='tpu_v5_256'", "'tpu_v5e_256'"],
    ),
    ([MOT, "--config.model.kind=transformr"], ["'transformer'"]),
    ([MOT, "--config.model.untie=qq"], ["config.model.untie", "'q'"]),
    ([MOT, "--config.data.sources.my-own.kind=jsonl"], ["letters, digits"]),
    ([MOT, "--config.=3"], ["unknown key config."]),
    ([MOT, "--nodebug=3"], ["debug"]),
    ([MOT, "--config.data.sources.flags.weight=inf"], ["finite"]),
    ([MOT, "--config.train.seed=9223372036854775808"], ["at most 4294967295"]),
    ([MOT, "--config.model.kind=collections:Counter"], ["Config"]),
    ([MOT, "--config.objective.kind=collections:Counter"], ["Config"]),
    (
      [MOT, "--config.model.modalities=text,image,speech"],
      ["config.model.towers=(0, 1)", "3 modalities"],
    ),
    (
      [MOT, "--config.data.sources.openmojii.weight=1"],
      ["'openmoji'", "openmojii.kind="],
    ),
    (
      [
        MOT,
        "--config.data.sources.mine.kind=jsonl",
        "--config.data.sources.mine.paht=x",
      ],
      ["config.data.sources.mine.paht", "'path'"],
    ),
  ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(words, said):
  message = mistake(*words)
  for part in said:
    assert part in message


@pytest.mark.smoke
def test_overrides_reach_the_experiment():
  found = options(
    MOT,
    "--config.model.dim=96",
    "--config.model.towers=0,0",
    "--config.model.untie=",
    "--config.optimizer.learning_rate",
    "1",
    "--noconfig.train.compile_cache",
    "--config.mesh.fsdp=2",
    "--config.data.sources.flags.weight=0",
  )
  config = found.experiment
  assert (found.mode, found.workdir) == ("train", "runs/mot_chameleon")
  assert config.model.dim == 96
  assert config.model.towers == (0, 0)
  assert config.model.untie == ""
  assert config.optimizer.learning_rate == 1.0
  assert config.train.compile_cache is False
  assert config.mesh.fsdp == 2
  assert config.data.sources["flags"].weight == 0.0


def test_the_size_is_part_of_the_run_name():
  assert options(f"{MOT}:1_5b").workdir == "runs/mot_chameleon_1_5b"
  assert options(f"{MOT}:1_5b").experiment.model.dim == 2048
  assert options(MOT, "--workdir=here").workdir == "here"


def test_a_source_is_added_by_its_kind():
  config = options(
    MOT,
    "--config.data.sources.mine.kind=image_folder",
    "--config.data.sources.mine.path=pictures",
  ).experiment
  assert config.data.sources["mine"].path == "pictures"
  assert config.data.sources["mine"].weight == 1.0
  assert "openmoji" in config.data.sources


def test_another_model_kind_brings_its_own_defaults():
  config = options(MOT, "--config.model.kind=transformer").experiment
  assert type(config.model).__name__ == "TransformerConfig"
  assert config.model.untie == ""  # its default
  assert config.model.dim == options(MOT).experiment.model.dim  # the file's


def test_evaluate_needs_only_a_workdir():
  found = options("--mode=evaluate", "--workdir=runs/a")
  assert found.experiment is None


def test_a_request_is_read_from_its_flags(tmp_path):
  """Prompts of the command line and of a file, and every setting."""
  (tmp_path / "prompts.txt").write_text("two\n\nthree\n")
  found = options(
    "--mode=generate",
    "--workdir=w",
    "--prompt=one",
    f"--prompt_file={tmp_path / 'prompts.txt'}",
    "--image=a.png",
    "--make=image",
    "--num_samples=3",
    "--guidance=2",
    "--stop=.",
    "--out=there",
  )
  request = found.request
  assert request is not None and found.experiment is None
  assert request.prompts == ("one", "two", "three")
  assert request.images == ("a.png",) and request.out == "there"
  settings = {"make": "image", "num_samples": 3, "guidance": 2.0, "stop": ["."]}
  assert settings.items() <= request.settings.items()


def test_a_config_file_may_leave_keys_out(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "def get_config():\n"
    "  return {'data': {'sources': {'a': {'kind': 'jsonl'}}}}\n"
  )
  config = options(f"--config={file}", "--config.train.seed=5").experiment
  assert config.train.seed == 5


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("get_config = (", "SyntaxError"),
    ("x = 1", "no function get_config"),
    ("def get_config(): return 3", "must return a ConfigDict"),
    ("def get_config(): return 1 / 0", "ZeroDivisionError"),
    ("def get_config(): return {'modle': {}}", "'model'"),
    ("def get_config(): return {'model': {'kind': 3}}", "must be a str"),
    ("from fusionlab.batch import nope", "cannot import name"),
    ("import fusionlab.nope", "fusionlab.nope"),
    ("raise SystemExit(3)", "SystemExit"),
  ],
)
def test_a_broken_config_file_is_one_line(tmp_path, text, said):
  file = tmp_path / "mine.py"
  file.write_text(text)
  message = mistake(f"--config={file}")
  assert said in message


def test_a_config_without_an_argument_refuses_one(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("def get_config(): return {}")
  with pytest.raises(UserError, match="takes no argument, got ':7b'"):
    load_config(str(file), "7b")


def failing(error: BaseException):
  def work() -> int:
    raise error

  return work


@pytest.mark.parametrize(
  ("error", "code", "said"),
  [
    (UserError("two\nlines"), 2, "error: two lines\n"),
    (
      ModuleNotFoundError("No module named 'tokamax'", name="tokamax"),
      2,
      "error: the package 'tokamax' is missing; install it with"
      " `pip install -e '.[kernels]'` in the repository\n",
    ),
    (
      ModuleNotFoundError("No module named 'emoji'", name="emoji.core"),
      2,
      "error: the package 'emoji' is missing; install it with"
      " `pip install -e '.[data]'` in the repository\n",
    ),
    (
      PermissionError(13, "Permission denied", "runs/x"),
      2,
      "error: runs/x: Permission denied\n",
    ),
    (
      OSError(28, "No space left on device"),
      2,
      "error: No space left on device\n",
    ),
    (
      KeyboardInterrupt(),
      130,
      "interrupted; the same command goes on from here\n",
    ),
  ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code, said):
  assert run.guarded(failing(error)) == code
  captured = capsys.readouterr()
  assert (captured.out, captured.err) == ("", said)


@pytest.mark.parametrize(
  "error",
  [
    ZeroDivisionError("a bug"),
    ModuleNotFoundError("No module named 'fusionlab.x'", name="fusionlab.x"),
  ],
)
def test_a_bug_keeps_its_traceback(error):
  with pytest.raises(type(error)):
    run.guarded(failing(error))


def test_debug_shows_the_traceback():
  with pytest.raises(UserError):
    run.guarded(failing(UserError("x")), debug=True)


@pytest.mark.smoke
def test_the_process_exits_with_2_and_one_line():
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", "experiments.run", MOT, "--config.model.dmi=3"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: unknown key config.model.dmi")
  assert len(done.stderr.splitlines()) == 1
  assert time.monotonic() - start < 60


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--mode=evaluate", "--workdir=nowhere"], "give a workdir"),
    (
      [
        MOT,
        "--config.data.sources.mine.kind=image_folder",
        "--config.data.sources.mine.path=nowhere",
        "--config.data.sources.openmoji.weight=0",
        "--config.data.sources.flags.weight=0",
        "--config.data.sources.factbook.weight=0",
      ],
      "nowhere",
    ),
    ([MOT, "--config.mesh.preset=tpu_v5e_16"], "jax sees"),
  ],
)
def test_modes_exit_with_2_and_one_line(tmp_path, capsys, words, said):
  if "--mode=evaluate" not in words:
    words = [*words, f"--workdir={tmp_path / 'run'}"]
  found = options(*words)
  assert run.guarded(lambda: run.run(found)) == 2
  assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_process_shows_a_traceback_with_debug(tmp_path):
  words = [MOT, "--debug", "--config.model.dmi=3"]
  done = processes.command(tmp_path, "experiments.run", *words)
  assert done.returncode != 0
  assert "Traceback" in done.stderr
  assert "ConfigError" in done.stderr


def test_summary_of_a_large_size_runs_where_it_could_not_train(tmp_path):
  words = [f"{MOT}:7b", "--mode=summary"]
  # One device, as a laptop has.
  done = processes.command(tmp_path, "experiments.run", *words, XLA_FLAGS="")
  assert done.returncode == 0, done.stderr
  assert "13,489,430,528" in done.stdout or "13.49" in done.stdout


CHECKPOINT = ROOT / "tests" / "train" / "fixtures" / "checkpoint_v1"


def test_generate_writes_what_the_checkpoint_makes(tmp_path):
  """A picture and a text from the checkpoint of the first version."""
  done = processes.command(
    tmp_path,
    "experiments.run",
    "--mode=generate",
    f"--workdir={CHECKPOINT}",
    "--prompt=a",
    "--max_new_tokens=8",
    f"--out={tmp_path / 'out'}",
  )
  assert done.returncode == 0, done.stderr
  assert f"written: {tmp_path / 'out'}" in done.stdout.replace("\n", "")
  assert (tmp_path / "out" / "generated.txt").read_text().startswith("000_0  a")


def refused(tmp_path, capsys, *words):
  """What a mistake prints; nothing is written."""
  found = options("--mode=generate", f"--out={tmp_path / 'out'}", *words)
  assert run.guarded(lambda: run.run(found)) == 2
  assert not (tmp_path / "out").exists()
  (line,) = capsys.readouterr().err.strip().splitlines()
  return line


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--prompt=a", "--workdir=no/such"], "no/such does not exist"),
    (["--prompt=a", "--workdir=docs"], "docs has no complete checkpoint"),
    ([f"--workdir={CHECKPOINT}"], "needs --prompt, --image or --prompt_file"),
    (
      [f"--workdir={CHECKPOINT}", "--prompt=" + "long " * 300],
      "tokens; the model was trained on rows of",
    ),
    (
      [f"--workdir={CHECKPOINT}", "--image=README.md"],
      "README.md is not a picture",
    ),
    (
      [f"--workdir={CHECKPOINT}", "--prompt=a", "--make=imge"],
      "did you mean 'image'",
    ),
    (
      [f"--workdir={CHECKPOINT}", "--prompt=a", "--temperature=-1"],
      "temperature",
    ),
  ],
)
def test_generation_that_cannot_be_is_one_line(tmp_path, capsys, words, said):
  assert said in refused(tmp_path, capsys, *words)


def test_a_checkpoint_of_another_version_is_named(tmp_path, capsys):
  other = tmp_path / "run" / "checkpoints" / "3"
  shutil.copytree(CHECKPOINT, other)
  meta = json.loads((other / "meta.json").read_text())
  (other / "meta.json").write_text(json.dumps({**meta, "format": 99}))
  sums = json.loads((other / "checksums.json").read_text())
  digest = hashlib.sha256((other / "meta.json").read_bytes()).hexdigest()
  sums["sha256"]["meta.json"] = digest
  (other / "checksums.json").write_text(json.dumps(sums))
  line = refused(
    tmp_path, capsys, "--prompt=a", f"--workdir={tmp_path / 'run'}"
  )
  assert "checkpoint format 99" in line and "reads format" in line
