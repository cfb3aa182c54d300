"""The launch files: what they start, and when they start it again.

Nothing here has SLURM, Google Cloud or Kubernetes: their commands are small
scripts in front of PATH, and the files of experiments/launch run for real.
"""

import argparse
import shlex
import subprocess

import pytest

from fusionlab.sharding.mesh import PRESETS
from tests.experiments.launching import (
  GKE,
  LAUNCH,
  OVERRIDE,
  ROOT,
  RUN,
  SLICE,
  SLURM,
  TPU_VM,
  check,
  write_status,
)


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


def test_the_guide_names_the_hardware_of_every_preset():
  text = (ROOT / "docs" / "guides" / "pods.md").read_text()
  for name, preset in PRESETS.items():
    (row,) = [x for x in text.splitlines() if x.startswith(f"| `{name}` |")]
    cells = [cell.strip(" `") for cell in row.split("|")]
    # A host has four TPU chips or eight GPUs.
    assert str(preset.devices // (4 if preset.topology else 8)) in cells
    if preset.topology:
      assert preset.topology.split(":")[1] in cells
