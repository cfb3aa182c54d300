r"""Forward and backward pass of attention, by implementation.

  python -m experiments.benchmarks.attention
  python -m experiments.benchmarks.attention --shapes=8x4096x16x64 --documents=8

One process, in turns; a ratio is over `xla_blockwise` in the same round. Besides the
gate's own implementations there is `jax.nn`, which holds the scores and computes the
masked half too. GFLOP/s count the products that are needed, whatever was computed.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.table import Table

from experiments.benchmarks import timing
from fusionlab.errors import UserError, nearest
from fusionlab.intervals import causal_intervals
from kernels_pallas.attention import RefusedError, attention
from kernels_pallas.attention.api import IMPLEMENTATIONS

_JAX_NN = "jax.nn"
_BASE = "xla_blockwise"
_FASTEST = {
  "cpu": ("reference", _JAX_NN),
  "gpu": ("tokamax", "cudnn", _JAX_NN),
  "tpu": ("splash", _JAX_NN),
}

flags.adopt_module_key_flags(timing)  # so that --help lists them
_SHAPES = flags.DEFINE_list(
  "shapes", ["2x1024x8x64", "4x512x6x32"], "rows x length x heads x width"
)
_DOCUMENTS = flags.DEFINE_integer(
  "documents", 1, "documents of a row", lower_bound=1
)
_WHICH = flags.DEFINE_list("implementations", None, "beside xla_blockwise")


def call(name: str, shape: tuple[int, ...], *, documents: int, seed: int):
  """Compiles the gradients of q, k and v.

  Args:
    name: an implementation of the gate, or `jax.nn`.
    shape: rows, length, heads, width.
    documents: equal documents of each row.
    seed: of the data.

  Returns:
    A call of no arguments, and the MiB of temporaries.
  """
  rows, length, *_ = shape
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, g = (jax.random.normal(key, shape, dtype) for key in keys)
  size = -(-length // documents)
  column = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  intervals = causal_intervals(column // size + 1, column % size)
  start, end = map(jnp.asarray, intervals)

  def loss(q, k, v, g, start, end):
    if name == _JAX_NN:
      key = jnp.arange(length)
      mask = (key >= start[..., None]) & (key < end[..., None])
      out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    else:
      out = attention(q, k, v, start, end, documents=True, implementation=name)
    return jnp.sum((out * g).astype(jnp.float32))

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  arguments = (q, k, v, g, start, end)
  compiled = gradients.lower(*arguments).compile()
  return (
    functools.partial(compiled, *arguments),
    timing.temporaries_mib(compiled),
  )


def run(words: Sequence[str]) -> None:
  """Measures and prints.

  Args:
    words: what stands on the command line beside this program's own flags.

  Raises:
    UserError: any of them, a shape that is none, or an implementation asked for
      by name that cannot do it.
  """
  timing.no_words(words)
  names = [_BASE, *(_WHICH.value or _FASTEST[jax.default_backend()])]
  allowed = (*IMPLEMENTATIONS, _JAX_NN)
  for name in names:
    if name not in allowed:
      raise UserError(f"--implementations: {name!r}{nearest(name, allowed)}")
  table = Table(title="attention, forward + backward")
  for column in ("", "over " + _BASE, "seconds", "GFLOP/s", "temporaries MiB"):
    table.add_column(column, justify="right" if column else "left")
  results = {}
  for text in _SHAPES.value:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
      raise UserError(f"--shapes: {text!r} must be like 2x1024x8x64")
    shape = tuple(int(size) for size in text.split("x"))
    rows, length, heads, width = shape
    calls, temporaries = {}, {}
    for name in names:
      try:
        calls[name], temporaries[name] = call(
          name, shape, documents=_DOCUMENTS.value, seed=flags.FLAGS.seed
        )
      except RefusedError as refused:
        if _WHICH.value:
          raise UserError(f"--implementations: {refused}") from refused
        table.add_row(f"{name} {text}", "refused", "", "", "")
        results[f"{name} {text}"] = {"refused": str(refused)}
    seconds = timing.interleaved(
      calls, repeats=flags.FLAGS.repeats, seed=flags.FLAGS.seed
    )
    over = timing.ratios(seconds, _BASE)
    # Two products forward and five backward, over half of a document's scores.
    size = -(-length // _DOCUMENTS.value)
    flops = 7 * 2 * rows * heads * (length * size / 2) * width
    for name in calls:
      time = timing.Quartiles.of(seconds[name])
      rate = flops / time.median
      results[f"{name} {text}"] = {
        "over_base": dataclasses.asdict(over[name]),
        "seconds": dataclasses.asdict(time),
        "flops_per_s": rate,
        "temporaries_mib": temporaries[name],
      }
      table.add_row(
        f"{name} {text}",
        str(over[name]),
        f"{time.median:.4f}",
        f"{rate / 1e9:.0f}",
        f"{temporaries[name]:.0f}",
      )
  timing.report(
    table,
    {
      "benchmark": "attention",
      "base": _BASE,
      "documents": _DOCUMENTS.value,
      "cases": results,
      "repeats": flags.FLAGS.repeats,
      "seed": flags.FLAGS.seed,
    },
  )


if __name__ == "__main__":
  timing.program(run)
