"""The JobSet: its fields, its rendering, and when its pods start again."""

import os
import shlex
import signal
import string
import subprocess
import time

import pytest
import yaml

from tests.experiments.launching import (
  CLUSTER,
  GKE,
  LAUNCH,
  OVERRIDE,
  RUN,
  check,
  write_status,
)


def rendered(**changes: str) -> dict:
  text = (LAUNCH / GKE).read_text()
  body = "\n".join(x for x in text.splitlines() if not x.startswith("#"))
  overrides = {"OVERRIDES": shlex.quote(OVERRIDE)}
  return yaml.safe_load(
    string.Template(body).safe_substitute(RUN | CLUSTER | overrides | changes)
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
