"""The lines of text at a page's top and end: how a run went, in words."""

import dataclasses
import shlex
from typing import Any

from fusionlab.report import formatting
from fusionlab.report.records import Run

_LINE = 90


@dataclasses.dataclass(frozen=True)
class Start:
  """One start of the run, from starts.jsonl."""

  time: str
  step: str
  what: str
  commit: str
  device: str
  command: str


def headline(run: Run) -> list[tuple[str, str]]:
  """Status, step, tokens, time and device, as (what, value)."""
  facts = [("status", status(run)), ("step", _step(run))]
  tokens = run.metrics.tokens_seen()
  if tokens:
    facts.append(("tokens seen", f"about {formatting.amount(tokens)}".strip()))
  training, evaluating = run.metrics.seconds()
  if training:
    text = f"{formatting.duration(training)} in steps"
    if evaluating:
      text += f", {formatting.duration(evaluating)} in evaluations"
    facts.append(("time", text))
  if device(run):
    facts.append(("device", device(run)))
  return facts


def status(run: Run) -> str:
  """'finished (num_steps)', 'failed (…)', 'running', or 'not known'."""
  word = run.status.get("status")
  if not isinstance(word, str):
    return "not known (no status.json)"
  reason = run.status.get("reason")
  if word == "failed":
    return "failed"  # the reason is long and stands below
  return f"{word} ({reason})" if reason else word


def status_note(run: Run) -> str:
  """A sentence on a status that may mislead or needs its reason; or ''."""
  word, reason = run.status.get("status"), run.status.get("reason")
  if word == "running":
    return (
      "The run is going on, or was killed: status.json is written at a run's"
      " start and end, so the step is that of the newest metrics."
    )
  if word == "failed":
    return f"The run failed: {reason or 'no reason was recorded'}"
  return ""


def device(run: Run) -> str:
  """'1 × NVIDIA H100', '8 × TPU v5 lite, 2 processes' or 'cpu, 2 cores'."""
  devices = _section(run.environment, "devices")
  kind, count = devices.get("kind"), devices.get("count")
  if not kind:
    return ""
  if devices.get("platform") == "cpu":
    cores = _section(run.environment, "host").get("cpus")
    return f"CPU, {cores} cores" if cores else "CPU"
  text = f"{count} × {kind}"
  processes = devices.get("processes")
  return f"{text}, {processes} processes" if (processes or 1) > 1 else text


def command(run: Run) -> str:
  """The command line as a shell takes it; '' where it was not recorded."""
  return _command(run.environment.get("command"))


def environment(run: Run) -> list[tuple[str, str]]:
  """Python, commit, host and packages, as (what, value)."""
  recorded = run.environment
  commit = str(recorded.get("commit") or "not a git checkout")
  if commit.endswith("+"):
    commit = f"{commit[:-1]} with uncommitted changes"
  facts = [("commit", commit)]
  facts += [("device", device(run)), ("Python", recorded.get("python"))]
  host = _section(recorded, "host")
  facts += [("host", host.get("platform")), ("machine", host.get("machine"))]
  facts += _section(recorded, "packages").items()
  return [(str(name), str(value)) for name, value in facts if value]


def starts(run: Run) -> list[Start]:
  """Every start that was recorded, and whether it was a resume."""
  found = []
  for index, start in enumerate(run.starts):
    step = start.get("step")
    what = "start" if not index else "resume" if step else "from the beginning"
    found.append(
      Start(
        time=str(start.get("time", "")).replace("T", " "),
        step=f"{step:,}" if isinstance(step, int) else "",
        what=what,
        commit=str(start.get("commit") or "")[:12],
        device=str(start.get("device") or ""),
        command=_command(start.get("command")),
      )
    )
  return found


def skipped(run: Run) -> str:
  """A sentence on updates left out because they were not finite; or ''."""
  steps, values = run.metrics.series("train/skipped_steps")
  if not len(steps):
    return ""
  return (
    f"{int(values[-1]):,} updates were left out because loss or gradient was"
    f" not finite; the first was logged at step {int(steps[0]):,}."
  )


def checkpoints(run: Run) -> str:
  """A sentence on the checkpoints that are kept."""
  whole = [f"{s:,}" for s, complete in run.checkpoints.items() if complete]
  torn = [f"{s:,}" for s, complete in run.checkpoints.items() if not complete]
  text = f"Checkpoints of step {', '.join(whole)}." if whole else ""
  if torn:
    text += f" Incomplete, and not resumed from: step {', '.join(torn)}."
  return text.strip() or "There is no checkpoint."


def _step(run: Run) -> str:
  train = run.config.get("train")
  steps = train.get("num_steps") if isinstance(train, dict) else None
  of = f" of {steps:,}" if isinstance(steps, int) else ""
  return f"{run.step:,}{of}"


def _section(mapping: dict[str, Any], key: str) -> dict[str, Any]:
  section = mapping.get(key)
  return section if isinstance(section, dict) else {}


def _command(words: Any) -> str:
  """One line, or a flag a line where that is long."""
  if not isinstance(words, list):
    return ""
  quoted = [shlex.quote(str(word)) for word in words]
  line = " ".join(quoted)
  if len(line) <= _LINE:
    return line
  return " ".join(f"\\\n  {w}" if w.startswith("--") else w for w in quoted)
