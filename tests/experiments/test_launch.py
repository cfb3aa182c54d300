"""The launch files: what they start, and when they start it again.

Nothing here has SLURM, Google Cloud or Kubernetes: their commands are small
scripts in front of PATH, and the files of experiments/launch run for real.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import string
import subprocess
import time

import pytest
import yaml
from absl import flags

from experiments.command_line import Options, define_flags, parse
from fusionlab.sharding.mesh import PRESETS

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SLURM, TPU_VM, GKE = "slurm.sbatch", "tpu_vm.sh", "gke.yaml"
RUN = {
  "CONFIG": "configs/mot_chameleon.py:tiny",
  "WORKDIR": "/shared/my runs/mot",
  "PRESET": "gpu_h100_64",
}
SLICE = {
  "TPU": "mot",
  "ZONE": "us-west4-a",
  "TYPE": "v5litepod-16",
  "RUNTIME": "v2-alpha-tpuv5-lite",
  "REPO": "/shared/fusionlab",
}
CLUSTER = {
  "NAME": "mot",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "TOPOLOGY": "4x4",
  "HOSTS": "4",
  "IMAGE": "example.com/fusionlab",
  "CLAIM": "shared",
}
OVERRIDE = "--config.model.towers=0, 0"


@pytest.fixture
def bash(tmp_path):
  """Runs bash with fake commands in front of PATH."""
  fakes = tmp_path / "bin"
  fakes.mkdir()

  def run(words, variables, **commands: str) -> subprocess.CompletedProcess:
    for name, script in commands.items():
      (fakes / name).write_text(f"#!/bin/bash\n{script}\n")
      (fakes / name).chmod(0o755)
    path = f"{fakes}:{os.environ['PATH']}"
    return subprocess.run(
      ["bash", *map(str, words)],
      env={"PATH": path, "T": str(tmp_path), **variables},
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=20,
      check=False,
    )

  return run


def understood(words: list[str]) -> Options:
  """What experiments.run makes of a command that a launcher starts."""
  at = words.index("experiments.run")
  assert words[at - 1] == "-m"
  assert pathlib.Path(words[at - 2]).name == "python"
  values = flags.FlagValues()
  define_flags(values, words[at:])
  return parse(values, words[at:])


def check(words: list[str]) -> None:
  """The command trains RUN's config, in its workdir, with what was added."""
  options = understood(words)
  assert (options.mode, options.workdir) == ("train", RUN["WORKDIR"])
  assert options.experiment is not None
  assert options.experiment.mesh.preset == RUN["PRESET"]
  assert options.experiment.model.towers == (0, 0)
  assert options.experiment.model.dim == 192  # tiny


def write_status(folder: pathlib.Path, status: str, step: int) -> None:
  content = {"status": status, "step": step, "reason": ""}
  folder.mkdir(exist_ok=True)
  text = json.dumps(content, indent=2) + "\n"
  (folder / "status.json").write_text(text)


@pytest.mark.parametrize("name", [SLURM, TPU_VM, GKE])
def test_launch_files_are_short(name):
  assert len((LAUNCH / name).read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", [SLURM, TPU_VM])
def test_scripts_are_bash(bash, name):
  done = bash(["-n", LAUNCH / name], {})
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
  ("name", "variables"), [(SLURM, RUN), (TPU_VM, RUN | SLICE)]
)
def test_a_missing_variable_is_one_line(bash, name, variables):
  for missing in variables:
    given = {k: v for k, v in variables.items() if k != missing}
    done = bash([LAUNCH / name], given | {"DRY_RUN": "1"})
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert f"{missing}: is missing" in line


def test_slurm_starts_the_run(bash):
  done = bash([LAUNCH / SLURM, OVERRIDE], RUN | {"DRY_RUN": "1"})
  assert done.returncode == 0, done.stderr
  words = shlex.split(done.stdout)
  assert words[0] == "srun"
  check(words)


def test_sbatch_directives_ask_for_a_task_per_gpu():
  parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
  for name in ("job-name", "output", "open-mode", "signal"):
    parser.add_argument(f"--{name}", required=True)
  for name in ("nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task"):
    parser.add_argument(f"--{name}", type=int, required=True)
  parser.add_argument("--mem", type=int)
  for name in ("requeue", "exclusive"):
    parser.add_argument(f"--{name}", action="store_true", required=True)
  lines = (LAUNCH / SLURM).read_text().splitlines()
  first = next(i for i, x in enumerate(lines) if x and x[0] != "#")
  found = [i for i, x in enumerate(lines) if x.startswith("#SBATCH ")]
  assert max(found) < first  # sbatch reads none after a command
  given = parser.parse_args([lines[i].removeprefix("#SBATCH ") for i in found])
  assert given.ntasks_per_node == given.gpus_per_node
  assert given.open_mode == "append"
  # To the step; "B:" would be to the script, which saves nothing.
  assert given.signal.startswith("TERM@")


@pytest.mark.parametrize(
  ("before", "restarts", "after", "code", "requeued"),
  [
    (None, 0, ("finished", 9), 0, False),
    (("preempted", 5), 3, ("finished", 9), 1, False),  # scores failed
    (None, 0, ("preempted", 5), 0, True),
    (("preempted", 5), 1, ("preempted", 5), 0, True),
    (None, 0, None, 2, True),
    (None, 1, None, 2, False),  # it never came as far as a step
    (("running", 5), 1, ("running", 8), 134, True),
    (("running", 5), 1, ("running", 5), 134, False),
    (("failed", 7), 1, ("running", 5), 134, False),
    (("failed", 5), 0, ("failed", 5), 1, True),  # submitted by hand
    (("preempted", 5), 1, ("failed", 5), 1, True),
  ],
)
def test_slurm_requeues_unless_finished(
  bash, tmp_path, before, restarts, after, code, requeued
):
  workdir = tmp_path / "my run"
  if before:
    write_status(workdir, *before)
  if after:
    write_status(tmp_path / "after", *after)
  done = bash(
    [LAUNCH / SLURM],
    RUN
    | {
      "WORKDIR": str(workdir),
      "SLURM_JOB_ID": "77",
      "SLURM_RESTART_COUNT": str(restarts),
    },
    srun=f'[ -d "$T/after" ] && mkdir -p "$T/my run" &&'
    f' cp "$T/after/status.json" "$T/my run"; exit {code}',
    scontrol='echo "$*" > "$T/scontrol"',
  )
  asked = tmp_path / "scontrol"
  assert asked.exists() == requeued
  if requeued:
    assert asked.read_text() == "requeue 77\n"
    assert done.returncode == 0, done.stderr
  else:
    assert done.returncode == code
    assert ("not requeued" in done.stderr) == (not after or after[1] != 9)


def test_tpu_vm_starts_the_run_on_every_worker(bash, tmp_path):
  repo = tmp_path / "my repo"
  (repo / ".venv" / "bin").mkdir(parents=True)
  python = repo / ".venv" / "bin" / "python"
  python.write_text(
    '#!/bin/bash\nprintf "%s\\0" "$PWD" "$FUSIONLAB_CACHE" "$0" "$@"\n'
  )
  python.chmod(0o755)
  variables = RUN | SLICE | {"REPO": str(repo), "DRY_RUN": "1"}
  variables["SETUP"] = "false || export FUSIONLAB_CACHE=/shared/cache"
  dry = bash([LAUNCH / TPU_VM, OVERRIDE], variables)
  words = shlex.split(dry.stdout)
  assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mot"]
  assert words[6:8] == ["--zone=us-west4-a", "--worker=all"]
  remote = words[8].removeprefix("--command=")
  # As a worker runs it, no other start there.
  done = bash(["-c", remote], {}, pkill='echo "$*" >> "$T/pkill"; exit 1')
  folder, cache, *command = done.stdout.rstrip("\0").split("\0")
  assert (folder, cache) == (str(repo), "/shared/cache")
  check(command)
  pattern = (tmp_path / "pkill").read_text().split(" ", 1)[1].strip()
  found = subprocess.run(
    ["grep", "-c", "-E", pattern],
    input=" ".join(command) + f"\nbash -c {remote}\n",
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.stdout == "1\n"  # the run, and not the shell that looks for it


GCLOUD = """
echo "$*" >> "$T/gcloud"
case "$*" in
  *queued-resources\\ describe*) cat "$T/slice" ;;
  *queued-resources\\ create*) echo ACTIVE > "$T/slice" ;;
  *queued-resources\\ delete*) rm "$T/slice" ;;
  *--worker=all*) source "$T/start_$(grep -c worker=all "$T/gcloud")" ;;
  *--worker=0*) grep -q ACTIVE "$T/slice" && eval "${8#--command=}" ;;
esac
"""


@pytest.mark.parametrize(
  ("starts", "code", "slices"),
  [
    ([("finished", 9, 0)], 0, 1),
    ([("preempted", 4, 0), ("running", 4, 1), ("finished", 9, 0)], 0, 1),
    ([("lost", 0, 255), ("finished", 9, 0)], 0, 2),
    ([("running", 3, 1), ("lost", 0, 255), ("finished", 9, 0)], 0, 2),
    ([("running", 3, 1), ("running", 5, 1), ("failed", 5, 1)], 1, 1),
    ([("none", 0, 2), ("none", 0, 2)], 2, 1),
  ],
)
def test_tpu_vm_starts_again_until_finished(
  bash, tmp_path, starts, code, slices
):
  workdir = tmp_path / "my run"
  for i, (status, step, exit_code) in enumerate(starts, 1):
    saved = tmp_path / f"after_{i}"
    does = f'cp -r "{saved}/." "{workdir}"'
    if status == "lost":
      does = 'echo SUSPENDED > "$T/slice"'
    elif status == "none":
      does = ":"
    else:
      write_status(saved, status, step)
    (tmp_path / f"start_{i}").write_text(f"{does}\nexit {exit_code}\n")
  workdir.mkdir()
  variables = RUN | SLICE | {"WORKDIR": str(workdir), "PAUSE": "0"}
  done = bash([LAUNCH / TPU_VM], variables | {"SPOT": "1"}, gcloud=GCLOUD)
  assert done.returncode == code, done.stderr
  asked = (tmp_path / "gcloud").read_text().splitlines()
  assert sum("worker=all" in line for line in asked) == len(starts)
  created = [line for line in asked if "queued-resources create" in line]
  assert len(created) == slices
  for word in ("--node-id=mot", "--accelerator-type=v5litepod-16", "--spot"):
    assert word in created[0].split()


def rendered(**changes: str) -> dict:
  text = (LAUNCH / GKE).read_text()
  body = "\n".join(x for x in text.splitlines() if not x.startswith("#"))
  overrides = {"OVERRIDES": shlex.quote(OVERRIDE)}
  return yaml.safe_load(
    string.Template(body).substitute(RUN | CLUSTER | overrides | changes)
  )


# The fields of jobset.x-k8s.io/v1alpha2 and of the Job in it that are used; a
# list's one element is what each of its members looks like.
JOBSET = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str, "annotations": {str: str}},
  "spec": {
    "failurePolicy": {"maxRestarts": int, "restartStrategy": str},
    "replicatedJobs": [
      {
        "name": str,
        "replicas": int,
        "template": {
          "spec": {
            "parallelism": int,
            "completions": int,
            "completionMode": str,
            "backoffLimit": int,
            "template": {
              "spec": {
                "restartPolicy": str,
                "terminationGracePeriodSeconds": int,
                "nodeSelector": {str: str},
                "containers": [
                  {
                    "name": str,
                    "image": str,
                    "resources": {"limits": {str: int}},
                    "env": [{"name": str, "value": str}],
                    "volumeMounts": [{"name": str, "mountPath": str}],
                    "command": [str],
                    "args": [str],
                  }
                ],
                "volumes": [
                  {"name": str, "persistentVolumeClaim": {"claimName": str}}
                ],
              }
            },
          }
        },
      }
    ],
  },
}


def conform(value, schema, where="") -> None:
  """Compares a value with `JOBSET`: the same keys, values of its types."""
  if isinstance(schema, type):
    assert type(value) is schema, where
  elif isinstance(schema, list):
    assert isinstance(value, list) and value, where
    for i, item in enumerate(value):
      conform(item, schema[0], f"{where}[{i}]")
  elif str in schema:
    assert all(isinstance(key, str) for key in value), where
    for key, item in value.items():
      conform(item, schema[str], f"{where}.{key}")
  else:
    assert value.keys() == schema.keys(), where
    for key, item in value.items():
      conform(item, schema[key], f"{where}.{key}")


def test_gke_is_a_jobset_of_one_slice():
  jobset = rendered()
  conform(jobset, JOBSET)
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["kind"] == "JobSet"
  policy = jobset["spec"]["failurePolicy"]
  assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
  assert policy["maxRestarts"] > 0
  (job,) = jobset["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4
  assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (container,), (volume,) = pod["containers"], pod["volumes"]
  (mount,) = container["volumeMounts"]
  assert mount["name"] == volume["name"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


# Stands for the container's python: notes its arguments, then does as told.
PYTHON = """
printf "%s\\0" "$0" "$@" > "$T/arguments"
trap 'cp "$T/after/status.json" "$WORKDIR"; exit 0' TERM
source "$T/does"
"""


def gke_script(**changes: str) -> str:
  (job,) = rendered(**changes)["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == ["bash", "-c"]
  (script,) = container["args"]
  return script


@pytest.mark.parametrize(
  ("status", "code", "ends"),
  [
    ("finished", 0, True),
    ("finished", 1, True),  # the scores failed
    ("preempted", 0, False),
    ("failed", 1, False),
    ("running", 134, False),
    (None, 2, False),
  ],
)
def test_gke_pod_succeeds_only_when_finished(
  bash, tmp_path, status, code, ends
):
  workdir = tmp_path / "my run"
  workdir.mkdir()
  if status:
    write_status(workdir, status, 5)
  (tmp_path / "does").write_text(f"exit {code}\n")
  script = gke_script(WORKDIR=str(workdir))
  done = bash(["-c", script], {}, python=PYTHON)
  assert (done.returncode == 0) == ends, done.stderr
  words = (tmp_path / "arguments").read_text().rstrip("\0").split("\0")
  words[words.index(f"--workdir={workdir}")] = f"--workdir={RUN['WORKDIR']}"
  check(words)


def test_gke_pod_waits_for_a_late_status(bash, tmp_path):
  write_status(tmp_path / "run", "running", 5)
  write_status(tmp_path / "after", "finished", 9)
  (tmp_path / "does").write_text("exit 0\n")
  late = 'cp "$T/after/status.json" "$T/run"'
  script = gke_script(WORKDIR=str(tmp_path / "run"))
  done = bash(["-c", script], {}, python=PYTHON, sleep=late)
  assert done.returncode == 0, done.stderr


def test_gke_pod_hands_the_signal_to_the_run(bash, tmp_path):
  workdir = tmp_path / "run"
  write_status(workdir, "running", 5)
  write_status(tmp_path / "after", "preempted", 7)
  (tmp_path / "does").write_text("touch $T/up; while :; do sleep 0.05; done\n")
  assert bash(["-c", ":"], {}, python=PYTHON).returncode == 0
  pod = subprocess.Popen(
    ["bash", "-c", gke_script(WORKDIR=str(workdir))],
    env={
      "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
      "T": str(tmp_path),
      "WORKDIR": str(workdir),
    },
  )
  end = time.monotonic() + 20
  while not (tmp_path / "up").exists() and time.monotonic() < end:
    time.sleep(0.02)
  pod.send_signal(signal.SIGTERM)
  assert pod.wait(timeout=20) == 1  # to be started again
  assert '"preempted"' in (workdir / "status.json").read_text()


def test_gke_header_renders_only_with_every_variable(bash):
  lines = (LAUNCH / GKE).read_text().splitlines()
  header = [x.removeprefix("#") for x in lines if x.startswith("#   ")]
  start = next(i for i, x in enumerate(header) if x.startswith("   (:"))
  command = "\n".join(header[start:])
  fakes = {"kubectl": 'echo "$@" && cat', "envsubst": "cat"}
  given = RUN | CLUSTER
  done = bash(["-c", command], given, **fakes)
  assert done.stdout.startswith("apply -f - --dry-run=server\n")
  assert "kind: JobSet" in done.stdout
  for missing in given:
    some = {k: v for k, v in given.items() if k != missing}
    done = bash(["-c", command], some, **fakes)
    assert missing in done.stderr
    assert "JobSet" not in done.stdout


def test_the_guide_names_the_hardware_of_every_preset():
  text = (ROOT / "docs" / "guides" / "pods.md").read_text()
  for name, preset in PRESETS.items():
    (row,) = [x for x in text.splitlines() if x.startswith(f"| `{name}` |")]
    cells = [cell.strip(" `") for cell in row.split("|")]
    # A host has four TPU chips or eight GPUs.
    assert str(preset.devices // (4 if preset.topology else 8)) in cells
    if preset.topology:
      assert preset.topology.split(":")[1] in cells
