"""`config.train` and `config.optimizer`."""

import dataclasses

from fusionlab.config import option
from fusionlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, with a schedule that depends on the step alone."""

  kind: str = option(
    "adamw",
    "adamw, or muon for the layers' matrices (AdamW for the rest): dearer steps"
    " that learn more, at AdamW's rates",
    choices=("adamw", "muon"),
  )
  learning_rate: float = option(3e-3, "peak learning rate", minimum=0.0)
  schedule: str = option(
    "cosine",
    "shape after the warm-up",
    choices=("cosine", "linear", "constant", "wsd"),
  )
  warmup_steps: int = option(50, "steps of linear warm-up", minimum=0)
  stable_fraction: float = option(
    0.0,
    "fraction of the steps after warm-up held at the peak before the schedule"
    " falls (wsd: 0.8 is usual)",
    minimum=0.0,
    maximum=1.0,
  )
  final_fraction: float = option(
    0.02, "last learning rate over the peak", minimum=0.0, maximum=1.0
  )
  b1: float = option(
    0.9, "decay of the first moment", minimum=0.0, maximum=0.999999
  )
  b2: float = option(
    0.98, "decay of the second moment", minimum=0.0, maximum=0.999999
  )
  muon_momentum: float = option(
    0.95, "muon: decay of the momentum", minimum=0.0, maximum=0.999999
  )
  eps: float = option(
    1e-8, "added to the root of the second moment", minimum=0.0
  )
  weight_decay: float = option(0.1, "decoupled weight decay", minimum=0.0)
  no_decay: str = option(
    r"(norm|\bembed)", "regular expression of parameter paths without decay"
  )
  freeze: str = option(
    "",
    "towers that are not trained, e.g. 'text', with their ids' rows of the"
    " tables; shared: what no tower has of its own",
  )
  frozen_dtype: str = option(
    "float32",
    "what frozen matrices are kept in; bfloat16 halves them, and rounds them"
    " where float32 is computed in (tables of ids and norms stay)",
    choices=("float32", "bfloat16"),
  )
  learning_rate_of: str = option(
    "", "factors on the learning rate by tower, e.g. 'text:0.1'"
  )
  weight_decay_of: str = option(
    "", "weight decay of some towers in its place, e.g. 'text:0 image:0.2'"
  )
  clip_norm: float = option(
    1.0,
    "global gradient norm above which it is scaled down; 0: never",
    minimum=0.0,
  )
  ema_decay: float = option(
    0.0,
    "decay of a moving average of the parameters; 0: none",
    minimum=0.0,
    maximum=1.0,
  )


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Where the first parameters come from; a resumed run does not look."""

  checkpoint: str = option(
    "",
    "workdir or checkpoint whose parameters training starts from, without its"
    " steps and moments; '' draws them",
  )
  add_towers: str = option(
    "",
    "towers that the checkpoint lacks, each with the one it starts as a copy"
    " of, e.g. 'speech:text'; 'speech:random' draws it",
  )
  text_steps: int = option(
    0,
    "steps on text alone that make the checkpoint, a dense model of the same"
    " size in <workdir>/text_model; 0: none",
    minimum=0,
  )
  copy_towers: str = option(
    "",
    "towers that start as a copy of another where nothing is loaded, e.g."
    " 'image:text'",
  )

  def check(self, path: str) -> None:
    """Raises ConfigError where one key needs another."""
    given = [key for key in ("checkpoint", "text_steps") if getattr(self, key)]
    if self.text_steps and self.checkpoint:
      raise ConfigError(
        f"{path}.text_steps={self.text_steps} makes a checkpoint and"
        f" {path}.checkpoint={self.checkpoint!r} names one; give one of them"
      )
    if self.add_towers and not given:
      raise ConfigError(
        f"{path}.add_towers={self.add_towers!r} adds to a checkpoint, but"
        f" {path}.checkpoint is empty; {path}.copy_towers is for new parameters"
      )
    if self.copy_towers and given:
      raise ConfigError(
        f"{path}.copy_towers={self.copy_towers!r} is for new parameters; with"
        f" {path}.{given[0]} use {path}.add_towers"
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop: how long, how often, from which seed."""

  num_steps: int = option(1000, "optimizer steps in all", minimum=1)
  schedule_steps: int = option(
    0, "length of the learning-rate schedule; 0: num_steps", minimum=0
  )
  max_seconds: float = option(
    0.0,
    "wall-clock seconds after which the run ends cleanly; 0: never",
    minimum=0.0,
  )
  batch_size: int = option(8, "rows per step, over all devices", minimum=1)
  accumulate: int = option(
    1, "microbatches whose gradients make one step", minimum=1
  )
  writers: str = option(
    "csv jsonl tensorboard",
    "where metrics go: names separated by spaces, or package.module:Class",
  )
  log_every: int = option(
    10, "steps between rows of training metrics", minimum=1
  )
  eval_every: int = option(
    250, "steps between evaluations; 0: at the end only", minimum=0
  )
  eval_batches: int = option(
    16,
    "held-out batches at intervals, all at the end; 0: always all",
    minimum=0,
  )
  checkpoint_every: int = option(
    250, "steps between checkpoints; 0: at the end only", minimum=0
  )
  keep_checkpoints: int = option(3, "newest checkpoints kept", minimum=1)
  on_nonfinite: str = option(
    "stop",
    "what a NaN or Inf loss or gradient does: stop with a dump, or skip"
    " the update",
    choices=("stop", "skip"),
  )
  seed: int = option(
    0, "root of every random stream", minimum=0, maximum=2**32 - 1
  )
  profile_start: int = option(
    0, "first step of the profiler window; 0: no profile", minimum=0
  )
  profile_steps: int = option(5, "steps in the profiler window", minimum=1)
  compile_cache: bool = option(True, "keep compiled programs on disk")
  peer_timeout: float = option(
    100.0,
    "several processes: seconds without a sign of life after which one counts"
    " as lost and the others end",
    minimum=5.0,
  )

  def check(self, path: str) -> None:
    """Raises ConfigError where the microbatches do not divide the batch."""
    if self.batch_size % self.accumulate:
      raise ConfigError(
        f"{path}.accumulate={self.accumulate} does not divide"
        f" {path}.batch_size={self.batch_size}"
      )
