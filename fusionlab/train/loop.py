"""The loop, in kauldron's order: evaluate, save, next batch, step, log.

The metrics of a step are fetched after the next one was sent, so the device
never waits for the host. NOTE: resuming bit-identically rests on this order: a
checkpoint of step n is written after every row up to n, and before batch n.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusionlab import processes
from fusionlab.batch import Batch
from fusionlab.config import flatten, to_mapping
from fusionlab.data import cache_folder
from fusionlab.errors import UserError
from fusionlab.evaluate.heldout import Interrupted, caption_worth, evaluate
from fusionlab.experiment import Experiment
from fusionlab.sharding.batches import place_batch
from fusionlab.sharding.mesh import make_mesh
from fusionlab.train import checkpoint as checkpoints
from fusionlab.train import environment, text_first
from fusionlab.train import workdir as workdirs
from fusionlab.train.metrics import Row, Throughput, train_row
from fusionlab.train.progress import ProgressReport
from fusionlab.train.setup import Setup, build, build_steps, default_group_rows
from fusionlab.train.signals import Preempted, Signals
from fusionlab.train.state import TrainState, with_shardings
from fusionlab.train.writers import Writers, write_atomic


def train(experiment: Experiment, workdir: str) -> int:
  """Trains until `num_steps`, `max_seconds` or a signal; resumes by itself.

  Writes config.json, environment.json, status.json, metrics and checkpoints
  into the workdir, and goes on from its newest good checkpoint.

  Args:
    experiment: the configuration.
    workdir: the run's folder, made if need be; on several hosts, one that all
      of them see.

  Returns:
    0 when finished, out of time or preempted (status.json says which).

  Raises:
    UserError: the user's mistakes, a workdir of another run, a corrupted
      checkpoint, or a loss that is not finite.
  """
  folder = Path(workdir).expanduser()
  processes.watch(experiment.train.peer_timeout)
  try:
    if experiment.init.text_steps and not _train_text_model(experiment, folder):
      return 0
    return _train(experiment, folder, time.monotonic())
  except BaseException as error:
    processes.fail(error)
    raise


def _train_text_model(experiment: Experiment, folder: Path) -> bool:
  """Trains what the run starts from, where there is none; whether it is there."""
  first = folder / text_first.FOLDER
  steps = experiment.init.text_steps

  def there() -> bool:
    begun = checkpoints.steps_in(folder / "checkpoints")
    return bool(begun) or workdirs.finished_at(first) == steps

  if not processes.from_first(there):
    if processes.is_first():
      print(f"first {steps} steps on text alone, in {first}", flush=True)
    _train(text_first.text_model(experiment), first, time.monotonic())
  return processes.from_first(there)


def _train(experiment: Experiment, folder: Path, started: float) -> int:
  writes = jax.process_index() == 0
  # What process 0 sees holds for all: another may look later, or elsewhere.
  before = processes.from_first(lambda: _recorded(folder))
  joined = None
  if before is not None:
    before = Experiment.from_mapping(before)
    joined = workdirs.resume(experiment, before, folder)
  _check_alike(experiment)
  lock = workdirs.Lock(folder) if writes else None
  finished_at = processes.from_first(lambda: workdirs.finished_at(folder))
  steps = checkpoints.steps_in(folder / "checkpoints")
  status = _Status(folder, writes, step=max(steps, default=0))
  processes.on_end(status.lost)
  try:
    with Signals() as signals, workdirs.seen_by_all(folder):
      status.write("running")
      run = _Run(joined or experiment, folder, started, signals, status)
      run.run(finished_at)
  except Preempted as signal:
    status.write("preempted", str(signal))
  except BaseException as error:
    processes.fail(error)  # before another's failure is recorded as this one's
    status.write("failed", f"{type(error).__name__}: {error}".split("\n")[0])
    raise
  finally:
    processes.on_end(None)
    if lock is not None:
      lock.release()
  return 0


def _recorded(folder: Path) -> dict[str, Any] | None:
  before = workdirs.recorded(folder)
  return None if before is None else to_mapping(before)


def _check_alike(experiment: Experiment) -> None:
  """Raises UserError where processes were started with other configs."""
  flat = flatten(to_mapping(experiment), "config.")
  # Paths may differ from host to host; what lies there is compared elsewhere.
  for name in ("cache_dir", "text_tokenizer", "image_tokenizer"):
    del flat[f"config.data.{name}"]
  processes.agree("config", flat)


@dataclasses.dataclass
class _Status:
  """`status.json`, with the step that was reached."""

  folder: Path
  writes: bool
  step: int

  def write(self, status: str, reason: str = "") -> None:
    if self.writes:
      workdirs.write_status(self.folder, status, self.step, reason)

  def lost(self, reason: str) -> None:
    """Says that another process ended the run, in process 0's place too."""
    if not self.writes:
      try:  # Whoever else holds the lock is alive: it, or the run's next start.
        workdirs.Lock(self.folder)
      except UserError:
        return
      if workdirs.status_of(self.folder) != "running":
        return
    workdirs.write_status(self.folder, "failed", self.step, reason)


@dataclasses.dataclass
class _Pending:
  """A step that was sent and whose metrics were not fetched yet."""

  step: int
  metrics: dict[str, Any]
  batch: Batch


class _Run:
  """One start of a run: everything from setup to the last line of status."""

  def __init__(
    self,
    experiment: Experiment,
    folder: Path,
    started: float,
    signals: Signals,
    status: _Status,
  ):
    self.folder = folder
    self.signals = signals
    self.status = status
    self.writes = jax.process_index() == 0
    if experiment.train.compile_cache:
      environment.keep_compiled(
        cache_folder(experiment.data.cache_dir) / "compile"
      )
    mesh = make_mesh(experiment.mesh)
    experiment = workdirs.resolve(
      experiment, default_group_rows(experiment, mesh)
    )
    self.config = experiment.train
    self.experiment = experiment
    self.deadline = (
      started + self.config.max_seconds if self.config.max_seconds else None
    )
    self.setup: Setup = build(experiment, mesh=mesh)
    start = text_first.start_of(experiment, folder)
    self.steps = build_steps(self.setup, start=start)
    self.state, self.start = self._first_state()
    self.status.step = self.start

  def _first_state(self) -> tuple[TrainState, int]:
    """The newest good checkpoint's state, or a new one."""
    path = self._newest()
    self._saved = -1
    if path is None:
      return self.steps.init(), 0
    meta = checkpoints.read_meta(path)
    workdirs.check_inputs(
      path, meta, self.setup.tokenizers.hash, self._sources()
    )
    state = checkpoints.restore_state(
      path, with_shardings(self.steps.abstract, self.steps.shardings)
    )
    self._saved = meta["step"]
    return state, meta["step"]

  def _sources(self) -> dict[str, str]:
    prepared = self.setup.data.prepared
    return {name: source.fingerprint for name, source in prepared.items()}

  def _newest(self) -> Path | None:
    """Process 0 looks and verifies; the others follow."""
    folder = self.folder / "checkpoints"

    def find() -> str:
      path = checkpoints.newest(folder)
      return "" if path is None else path.name

    found = processes.from_first(find)
    return folder / found if found else None

  def run(self, finished_at: int | None = None) -> None:
    """Trains, saves, scores, and says how it ended.

    Args:
      finished_at: the step that an earlier start ended with and scored.
    """
    console = ProgressReport(
      self.start,
      self.config.num_steps,
      deadline=self.deadline,
      enabled=self.writes,
    )
    with contextlib.ExitStack() as stack:
      stack.callback(console.close)
      self.progress = console
      self._open_files(stack)
      # From here on there is a state to save: signals wait for the loop.
      self.signals.defer()
      with jax.transfer_guard("disallow"):
        reason = self._loop()
        if self._saved != self.status.step:
          self._save()
        ended = reason in ("num_steps", "max_seconds")
        if ended and self.status.step != finished_at:
          try:
            self._evaluate(limit=0)
          except Interrupted:
            reason = self.signals.reason
      self.saver.wait()
    finished = reason in ("num_steps", "max_seconds")
    self.status.write("finished" if finished else "preempted", reason)
    console.say(
      f"{'finished' if finished else 'preempted'} at step {self.status.step}"
      f" ({reason}); {self.folder}"
    )

  def _open_files(self, stack: contextlib.ExitStack) -> None:
    self.writers = None
    if self.writes:
      # Before config.json, which ties the folder to this configuration.
      self.writers = Writers(self.config.writers, self.folder)
      stack.callback(self.writers.close)
      workdirs.write_json(
        self.folder / "config.json", workdirs.to_mapping(self.experiment)
      )
      described = environment.describe()
      workdirs.write_json(self.folder / "environment.json", described)
      workdirs.record_start(self.folder, self.start, described)
      self.writers.truncate(self.start)
    if self._saved >= 0:
      self.progress.say(f"resumed {self.folder} at step {self.start}")
    self.saver = checkpoints.Checkpoints(
      self.folder / "checkpoints",
      self.experiment,
      self.setup.tokenizers,
      sources=self._sources(),
      group_rows=self.experiment.data.group_rows,
      keep=self.config.keep_checkpoints,
    )
    stack.callback(self.saver.close)

  def _loop(self) -> str:
    """Steps until something ends the run; returns what."""
    config, data, setup = self.config, self.setup.data, self.setup
    self.throughput = Throughput(setup.train_flops_per_token, setup.peak_flops)
    evaluated = self.start if self._evaluated_before() else -1
    pending: _Pending | None = None
    profiling = False
    batches = data.train.iterate(self.start)
    step = self.start
    with contextlib.closing(batches):
      while True:
        self.status.step = step
        reason = self._end_reason(step)
        eval_due = _due(step, config.eval_every) and evaluated != step
        save_due = _due(step, config.checkpoint_every) and self._saved != step
        if pending and (reason or eval_due or save_due):
          # A row is on disk before a checkpoint holds its step, and nothing
          # that is not finite is ever saved.
          self._log(pending, last=reason in ("num_steps", "max_seconds"))
          pending = None
        if profiling and (
          reason or step + 1 == config.profile_start + config.profile_steps
        ):
          jax.block_until_ready(self.state)
          jax.profiler.stop_trace()
          profiling = False
        if reason:
          return reason
        with self._paused():
          if eval_due:
            evaluated = step
            try:
              self._evaluate(limit=config.eval_batches)
            except Interrupted:
              continue
          if save_due:
            self._save()
        if config.profile_start == step + 1:
          jax.profiler.start_trace(str(self.folder / "profile"))
          profiling = True
        waiting = time.monotonic()
        host = next(batches)
        self.throughput.waited(time.monotonic() - waiting)
        self.state, metrics = self.steps.train_step(
          self.state, place_batch(host, setup.mesh)
        )
        step += 1
        if pending:
          self._log(pending)
        pending = _Pending(step, metrics, host)
        self.progress.step(step)

  def _end_reason(self, step: int) -> str:
    """Why to stop before the next step; the same on every process."""
    if step >= self.config.num_steps:
      return "num_steps"
    late = self.deadline is not None and time.monotonic() >= self.deadline
    if jax.process_count() == 1:
      return self.signals.reason or ("max_seconds" if late else "")
    if late and self.writes:
      self.signals.request("max_seconds")
    if not self.signals.reached():
      return ""
    return processes.from_first(lambda: self.signals.reason or "SIGTERM")

  def _log(self, pending: _Pending, *, last: bool = False) -> None:
    """Fetches a step's metrics; stops the run where they are not finite."""
    fetched = jax.device_get(pending.metrics)
    step, config = pending.step, self.config
    row = train_row(fetched)
    if not fetched["finite"] and config.on_nonfinite == "stop":
      self._stop_nonfinite(pending, row)
    if step == self.start + 1:
      self.throughput.restart()  # compilation is not throughput
    else:
      self.throughput.add(int(fetched["tokens"]))
    if not (step == 1 or _due(step, config.log_every) or last):
      return
    loader = self.setup.data.train
    row["data/epoch"] = float(loader.epoch_of(step - 1))
    for name, fill in loader.fill(step - 1).items():
      row[f"data/fill/{name}"] = float(fill)
    row.update(self.throughput.row())
    if self.writers is not None:
      self.writers.write(step, row)
    self.progress.row(step, row, self.throughput.step_s)

  def _evaluate(self, *, limit: int) -> None:
    several = jax.process_count() > 1
    row: Row = evaluate(
      self.steps.eval_step,
      self.state.eval_params,
      self.setup.data.heldout,
      self.setup.data.uncaptioned,
      self.setup.mesh,
      caption=caption_worth(self.setup.tokenizers),
      limit=limit,
      # Processes that stopped at different batches would wait for ever.
      should_stop=lambda: bool(self.signals.reason) and not several,
    )
    if self.writers is not None:
      self.writers.write(self.status.step, row)
    self.progress.evaluation(self.status.step, row)

  def _save(self) -> None:
    self.saver.save(self.state)
    self.status.write("running")
    self._saved = self.status.step

  @contextlib.contextmanager
  def _paused(self):
    begin = time.monotonic()
    yield
    self.throughput.paused(time.monotonic() - begin)

  def _evaluated_before(self) -> bool:
    writers = self.writers
    return processes.from_first(
      lambda: writers is not None and writers.has_evaluation(self.start)
    )

  def _stop_nonfinite(self, pending: _Pending, row: Row) -> None:
    """Dumps the batch and the metrics, then raises UserError."""
    folder = self.folder / "dump" / f"step_{pending.step}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
      jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(pending.batch)
    }
    np.savez(
      folder / f"batch_{jax.process_index()}.npz", allow_pickle=False, **arrays
    )
    if self.writes:
      text = {name: repr(value) for name, value in row.items()}
      write_atomic(folder / "metrics.json", json.dumps(text, indent=2))
    raise UserError(
      f"loss or gradient is not finite at step {pending.step}: its batch and"
      f" metrics are in {folder}; in a new --workdir, lower"
      f" config.optimizer.learning_rate or set config.train.on_nonfinite=skip"
    )


def _due(step: int, every: int) -> bool:
  return every > 0 and step > 0 and step % every == 0
