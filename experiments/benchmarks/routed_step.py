r"""Forward and backward pass of the layers: routed over dense, at equal FLOPs.

  python -m experiments.benchmarks.routed_step
  python -m experiments.benchmarks.routed_step --modalities=2,3 --json

One process, in turns; a ratio is taken within a round. The batch is interleaved at
random, token by token, which is the hardest case. The layers alone are timed: the
output table is the same for every model and would only dilute the ratio.

Variants: `mot` (everything untied), `ffn` (only the FFN and its norm), `ragged` (MoT
by sort and `jax.lax.ragged_dot`), `select` (every tower on every token).

By default CPU: d=512, 8 layers, 2 rows of 1,024, float32. Accelerators: the paper's
443M widths, 4 rows of 4,096, bfloat16.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.table import Table

from experiments.benchmarks import timing
from fusionlab.analysis.devices import peak_flops
from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError, nearest
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  SIZES,
  MixtureOfTransformersConfig,
)
from fusionlab.nn.stack import REMAT_POLICIES
from fusionlab.testing.batches import random_batch

_NAMES = ("text", "image", "speech", "video")
_COUNTS = ("2", "3", "4")
_VARIANTS = {
  "mot": {},
  "ffn": {"untie": "ffn ffn_norm"},
  "ragged": {"dispatch": "ragged"},
  "select": {"dispatch": "select"},
}
_IDS = 1024  # of each modality; they only need to be there

flags.adopt_module_key_flags(timing)  # so that --help lists them
_MODALITIES = flags.DEFINE_list("modalities", ["2", "3"], "numbers of towers K")
_WHICH = flags.DEFINE_list("variants", list(_VARIANTS), "measured beside dense")
_DIM = flags.DEFINE_integer("dim", None, "width d", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", None, "layers", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", None, "heads", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", None, "rows B", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", None, "tokens L", lower_bound=1)
_REMAT = flags.DEFINE_enum(
  "remat", "none", ("none", *REMAT_POLICIES), "as config.model.remat"
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is measured.

  Attributes:
    dim, layers, heads: of the model.
    rows, length: of the batch.
  """

  dim: int
  layers: int
  heads: int
  rows: int
  length: int


def default_shape(platform: str) -> Shape:
  """d=512 on CPU; the paper's 443M widths on accelerators."""
  if platform == "cpu":
    return Shape(512, 8, 8, 2, 1024)
  size = SIZES["443m"]
  return Shape(size.dim, size.num_layers, size.num_heads, 4, 4096)


def step(
  shape: Shape, count: int, variant: dict[str, Any], seed: int, remat: str
) -> tuple[Callable[[], Any], dict[str, float]]:
  """Compiles the forward and backward pass of one model.

  Args:
    shape: of model and batch.
    count: number of modalities K.
    variant: fields of the model's config that differ from MoT.
    seed: of parameters and batch.
    remat: as `config.model.remat`.

  Returns:
    A call of no arguments, and its temporaries and model FLOPs.
  """
  names = _NAMES[:count]
  config = MixtureOfTransformersConfig(
    dim=shape.dim,
    num_layers=shape.layers,
    num_heads=shape.heads,
    modalities=names,
    towers=tuple(range(count)),
    remat=remat,
    **variant,
  )
  config.check("--dim, --heads")
  vocabulary = Vocabulary(names, (_IDS,) * count)
  model = build_model(config, vocabulary)
  batch = random_batch(
    np.random.default_rng(seed),
    vocabulary,
    rows=shape.rows,
    length=shape.length,
    towers=range(count) if config.routed_towers.count > 1 else (0,) * count,
  )
  batch = jax.tree.map(jnp.asarray, batch)
  params = jax.jit(model.init_params)(jax.random.key(seed))

  def gradient(params, batch, buffers):
    del buffers  # donated: their memory takes the result

    def loss(params):
      hidden: Any = model.apply({"params": params}, batch, train=True)
      return jnp.sum(hidden.astype(jnp.float32) ** 2)

    return jax.grad(loss)(params)

  grads = jax.tree.map(jnp.zeros_like, params)
  jitted = jax.jit(gradient, donate_argnums=2, keep_unused=True)
  compiled = jitted.lower(params, batch, grads).compile()

  def call():
    nonlocal grads
    grads = compiled(params, batch, grads)
    return grads

  head = 2 * shape.dim * vocabulary.size
  per_token = config.forward_flops_per_token(vocabulary.size, shape.length)
  return call, {
    "temporaries_mib": timing.temporaries_mib(compiled),
    "model_flops": 3.0 * (per_token - head) * shape.rows * shape.length,
  }


def run(words: Sequence[str]) -> None:
  """Measures and prints.

  Args:
    words: what stands on the command line beside this program's own flags.

  Raises:
    UserError: any of them, or sizes that do not fit.
  """
  timing.no_words(words)
  given = {
    "dim": _DIM.value,
    "layers": _LAYERS.value,
    "heads": _HEADS.value,
    "rows": _ROWS.value,
    "length": _LENGTH.value,
  }
  shape = dataclasses.replace(
    default_shape(jax.default_backend()),
    **{name: value for name, value in given.items() if value is not None},
  )
  for name in _WHICH.value:
    if name not in _VARIANTS:
      raise UserError(f"--variants: {name!r}{nearest(name, _VARIANTS)}")
  for text in _MODALITIES.value:
    if text not in _COUNTS:
      raise UserError(f"--modalities: {text!r} (allowed: {', '.join(_COUNTS)})")
  variants = {name: _VARIANTS[name] for name in _WHICH.value}
  counts = [int(k) for k in _MODALITIES.value]
  seed = flags.FLAGS.seed
  calls, facts = {}, {}
  cases = {"dense": (2, {"untie": ""})} | {
    f"{name} K={k}": (k, variant)
    for k in counts
    for name, variant in variants.items()
  }
  for name, (k, variant) in cases.items():
    calls[name], facts[name] = step(shape, k, variant, seed, _REMAT.value)
  seconds = timing.interleaved(calls, repeats=flags.FLAGS.repeats, seed=seed)
  over = timing.ratios(seconds, "dense")
  peak = peak_flops(jax.devices()[0])

  table = Table(
    title=f"forward + backward, d={shape.dim}, {shape.layers} layers,"
    f" {shape.rows} x {shape.length} tokens"
  )
  for column in ("", "over dense", "seconds", "MFU", "temporaries MiB"):
    table.add_column(column, justify="left" if not column else "right")
  rows = {}
  for name, fact in facts.items():
    time = timing.Quartiles.of(seconds[name])
    rows[name] = {
      "over_dense": dataclasses.asdict(over[name]),
      "seconds": dataclasses.asdict(time),
      "mfu": fact["model_flops"] / time.median / peak if peak else None,
      **fact,
    }
    table.add_row(
      name,
      str(over[name]),
      str(time),
      f"{rows[name]['mfu']:.3f}" if peak else "unknown peak",
      f"{fact['temporaries_mib']:.0f}",
    )
  result = {
    "benchmark": "routed_step",
    # The largest median over the K measured, for the bar holds for each.
    "mot_over_dense": max(
      (over[f"mot K={k}"].median for k in counts if "mot" in variants),
      default=None,
    ),
    "shape": dataclasses.asdict(shape),
    "cases": rows,
    "repeats": flags.FLAGS.repeats,
    "seed": seed,
  }
  timing.report(table, result)


if __name__ == "__main__":
  timing.program(run)
