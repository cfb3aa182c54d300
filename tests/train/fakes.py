"""A small real model on synthetic data, so that the trainer is tested alone.

Only the data room is replaced: documents are drawn from the step's number, as
the real loader's are from the plan.
"""

import atexit
import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path

import jax
import numpy as np

from fusionlab.batch import Batch, packed_batch
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.tokenizers import ImageTokenizer, TextTokenizer, Tokenizers
from fusionlab.tokenizers.autoencoder import ImageConfig, init_params
from fusionlab.towers import Towers

LENGTH = 32
CODES = 4


@functools.cache
def tokenizer_files() -> tuple[bytes, bytes]:
  """Contents of a byte-level BPE without merges and a random 4-code VQ."""
  image = ImageConfig(
    image_size=4,
    patch=1,
    codebook_size=8,
    code_dim=2,
    fine_channels=4,
    coarse_channels=4,
    encoder_coarse_blocks=1,
    decoder_coarse_blocks=1,
    decoder_fine_blocks=1,
  )
  text = TextTokenizer.train(["a"], 261)
  shapes = jax.eval_shape(lambda: init_params(image, jax.random.key(0)))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(lambda a: rng.normal(size=a.shape), shapes)
  codebook = rng.normal(size=(image.codebook_size, image.code_dim))
  vq = ImageTokenizer.from_params(image, weights, codebook)
  return text._content, vq._content


def write_tokenizers(folder: Path) -> None:
  """Writes text.json and image.safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  text, image = tokenizer_files()
  (folder / "text.json").write_bytes(text)
  (folder / "image.safetensors").write_bytes(image)


class FakeLoader:
  """Rows of captioned pictures and text; batch n depends on n alone."""

  def __init__(
    self,
    experiment: Experiment,
    tokenizers: Tokenizers,
    *,
    stream: int,
    batches: int,
    captions: bool = True,
    nan_at: tuple[int, ...] = (),
    delay: float = 0.0,
  ):
    self.experiment = experiment
    self.vocabulary = tokenizers.vocabulary
    self.stream = stream
    self.batches = batches
    self.captions = captions
    self.nan_at = nan_at
    self.delay = delay

  def __len__(self):
    return self.batches

  def __getitem__(self, step: int) -> Batch:
    rng = np.random.default_rng([self.stream, step])
    rows = self.experiment.train.batch_size
    v = self.vocabulary
    tokens = np.zeros((rows, LENGTH), np.int32)
    segment, position = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(rows):
      at, number = 0, 0
      while at + 12 <= LENGTH:
        letter = int(rng.integers(8))
        caption = [10 + letter] * 3 if self.captions else []
        codes = [v.offset(1) + (letter + k) % 8 for k in range(CODES)]
        document = [v.bos, *caption, v.begin[1], *codes, v.end[1], v.eos]
        number += 1
        span = slice(at, at + len(document))
        tokens[row, span] = document
        segment[row, span] = number
        position[row, span] = np.arange(len(document))
        at += len(document)
    model = self.experiment.model
    towers = Towers.parse(model.modalities, model.towers, model.untie)
    group = self.experiment.data.group_rows
    batch = packed_batch(
      tokens,
      segment,
      position,
      v,
      towers=towers.of_modality if towers.count > 1 else None,
      counts=(group * (LENGTH - 12), group * 12),
      group_rows=group,
    )
    if step in self.nan_at:
      batch = batch.replace(weight=batch.weight * np.float32(np.nan))
    return batch

  def iterate(self, start: int):
    """Yields batches from a step on."""
    step = start
    while True:
      time.sleep(self.delay)
      yield self[step]
      step += 1

  def epoch_of(self, step: int) -> int:
    """Ten steps make an epoch."""
    return step // 10

  def fill(self, step: int) -> dict[str, float]:
    """Constant."""
    return {"text": 0.98, "image": 0.99}


@dataclasses.dataclass
class FakeData:
  """What `open_data` returns."""

  vocabulary: object
  token_bytes: np.ndarray
  layout_counts: tuple[int, ...]
  train: FakeLoader
  heldout: dict
  uncaptioned: dict
  prepared: dict


def open_fake_data(
  experiment,
  tokenizers,
  *,
  process_index=0,
  process_count=1,
  group_rows=0,
  parts=1,
  slow_open=0.0,
  fingerprint="0",
  **train_options,
):
  """Stands in for `fusionlab.data.open_data`."""
  assert (process_count, parts) == (1, 1)
  time.sleep(slow_open)
  make = functools.partial(FakeLoader, experiment, tokenizers)
  lengths = tokenizers.text.byte_lengths()
  return FakeData(
    vocabulary=tokenizers.vocabulary,
    token_bytes=np.pad(lengths, (0, tokenizers.vocabulary.sizes[1])),
    layout_counts=(group_rows * (LENGTH - 12), group_rows * 12),
    train=make(stream=0, batches=0, **train_options),
    heldout={
      "heldout_picture": make(stream=1, batches=3),
      "heldout_place": make(stream=2, batches=2),
    },
    uncaptioned={"heldout_picture": make(stream=1, batches=3, captions=False)},
    prepared={
      "fake": types.SimpleNamespace(fingerprint=fingerprint, splits=())
    },
  )


def experiment_of(folder: Path, **flat) -> Experiment:
  """A tiny experiment; flat keys are 'train__num_steps'."""
  if not (folder / "tokenizers").exists():
    write_tokenizers(folder / "tokenizers")
  mapping = {
    "model": {
      "kind": "mixture_of_transformers",
      "untie": "q k v o qk_norm mixer_norm ffn ffn_norm final_norm",
      "dim": 16,
      "num_layers": 1,
      "num_heads": 2,
      "ffn_dim": 16,
    },
    "objective": {"kind": "next_token"},
    "data": {
      "sources": {"fake": {"kind": "jsonl"}},
      "text_tokenizer": str(folder / "tokenizers" / "text.json"),
      "image_tokenizer": str(folder / "tokenizers" / "image.safetensors"),
      "row_length": LENGTH,
    },
    "optimizer": {"warmup_steps": 4, "learning_rate": 1e-2},
    "train": {
      "num_steps": 12,
      # One length for all, so that all runs share one compiled step.
      "schedule_steps": 12,
      "batch_size": 4,
      "log_every": 1,
      "eval_every": 0,
      "eval_batches": 1,
      "checkpoint_every": 4,
      "writers": "csv jsonl",
    },
  }
  for key, value in flat.items():
    section, _, name = key.partition("__")
    mapping.setdefault(section, {})[name] = value
  return Experiment.from_mapping(mapping)


def run_training(folder, workdir, flat, kill_at="", **data_options):
  """A training process of its own: exits with the code of `train`."""
  from fusionlab.train import loop, setup

  setup.open_data = functools.partial(open_fake_data, **data_options)
  if kill_at:
    _arm(kill_at)
  log = open(Path(folder) / "log.txt", "a", buffering=1)  # noqa: SIM115
  sys.stdout = sys.stderr = log
  os.dup2(log.fileno(), 2)
  experiment = experiment_of(Path(folder), **flat)
  sys.exit(loop.train(experiment, str(workdir)))


def write_documents(folder: Path) -> None:
  """Writes `documents.jsonl`, 64 short texts."""
  rng = np.random.default_rng(0)
  letters = np.array(list("abcdefgh"))
  texts = ["".join(rng.choice(letters, rng.integers(4, 20))) for _ in range(64)]
  lines = [json.dumps({"text": text}) + "\n" for text in texts]
  (folder / "documents.jsonl").write_text("".join(lines))


def run_process(
  folder,
  workdir,
  flat,
  index,
  count,
  address,
  devices,
  log,
  kill_at="",
  mode="train",
  **at,
):
  """One process of a job, on the real data room and command line.

  Args:
    folder: tokenizers, documents and cache.
    workdir: the run's.
    flat: see `experiment_of`.
    index: this process.
    count: processes of the job.
    address: of the coordinator.
    devices: CPU devices of this process.
    log: file for what is printed.
    kill_at: point of the second save at which the process kills itself.
    mode: of the command line.
    at: `<signal>=step` sends itself a signal when it reads that step's batch,
      `delay=seconds` waits before each, `error=step` raises.
  """
  # Of two that are given the last holds.
  os.environ["XLA_FLAGS"] += (
    f" --xla_force_host_platform_device_count={devices}"
  )
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  os.environ.update(zip(names, (address, str(count), str(index)), strict=True))
  sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
  os.dup2(sys.stderr.fileno(), 1)
  os.dup2(sys.stderr.fileno(), 2)
  from experiments import run
  from experiments.command_line import Options

  run._report = lambda workdir: 0  # takes longer than the training
  if kill_at:
    _arm(kill_at)
  _record(Path(workdir), index, **at)
  experiment = experiment_of(Path(folder), **flat)
  options = Options(mode, str(workdir), experiment)
  try:
    code = run.guarded(lambda: run.run(options))
  except BaseException:
    traceback.print_exc()
    code = 1
  atexit._run_exitfuncs()  # which multiprocessing leaves out
  os._exit(code)


def _record(workdir, index, delay=0.0, error=-1, **signals) -> None:
  """Makes training loaders write down which documents of which step they read."""
  from fusionlab.data.loader import Loader

  numbers = {step: getattr(signal, name) for name, step in signals.items()}
  read, documents = Loader.__getitem__, Loader._documents
  step_of = threading.local()

  def __getitem__(self, step):
    step_of.step = None if self._one_pass else step
    if not self._one_pass:
      time.sleep(delay)
      if step in numbers:
        os.kill(os.getpid(), numbers[step])
      if step == error:
        raise UserError("a file is missing on this host")
    return read(self, step)

  def _documents(self, plan, pieces):
    if step_of.step is not None:
      columns = (plan.document, plan.start, plan.stop, plan.passes)
      found = [
        [int(column[piece]) for column in columns]
        for piece in range(*pieces.indices(len(plan.document)))
      ]
      line = json.dumps({"step": step_of.step, "documents": found})
      path = workdir.parent / f"{workdir.name}_read_{index}.jsonl"
      with path.open("a") as file:
        file.write(line + "\n")
    return documents(self, plan, pieces)

  Loader.__getitem__, Loader._documents = __getitem__, _documents


def _arm(point: str) -> None:
  """Makes the process kill itself at a point of its second save."""
  import shutil

  from fusionlab.train import checkpoint

  def die(*unused, **also_unused):
    os.kill(os.getpid(), signal.SIGKILL)

  class Dying(checkpoint.Checkpoints):
    saves = 0

    def save(self, state):
      Dying.saves += 1
      super().save(state)
      if Dying.saves == 2 and point == "while orbax writes":
        die()

    def _finish(self, step, meta):
      if Dying.saves == 2:
        if point == "before meta":
          checkpoint.write_atomic = die
        if point == "before checksums":
          checkpoint.checksums = die
        if point == "while deleting":
          checkpoint.shutil = types.SimpleNamespace(rmtree=half_delete)
        if point == "before deleting":
          checkpoint.remove = die
      super()._finish(step, meta)

  def half_delete(path):
    shutil.rmtree(path / "params")
    die()

  checkpoint.Checkpoints = Dying
