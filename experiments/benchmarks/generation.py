r"""Tokens per second of generation, with the cache and by recomputing every row.

  python -m experiments.benchmarks.generation
  python -m experiments.benchmarks.generation --shapes=1x512,64x256 --kind=dense

One process, in turns; a ratio is over the cached step in the same round. Rows are
full but for the picture that is made, half of them codes. Recomputing runs the whole
padded row for every id, as a model without a cache does.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.table import Table

from experiments.benchmarks import timing
from fusionlab.batch import Vocabulary, batch_of_ids
from fusionlab.errors import UserError
from fusionlab.generation.blocks import Blocks
from fusionlab.generation.config import Sampling
from fusionlab.generation.sampler import Sampler
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)

_VOCABULARY = Vocabulary(("text", "image"), (3584, 512))
_CODES = 64
_NEW = 16  # ids of a timed call; the recomputed one makes one
_MODELS = {"mot": None, "dense": ""}

flags.adopt_module_key_flags(timing)  # so that --help lists them
_SHAPES = flags.DEFINE_list(
  "shapes", ["1x256", "16x256", "64x256"], "rows x length"
)
_KIND = flags.DEFINE_enum("kind", "mot", list(_MODELS), "towers or none")
_DIM = flags.DEFINE_integer("dim", 192, "model width", lower_bound=32)
_LAYERS = flags.DEFINE_integer("layers", 4, "layers", lower_bound=1)


def calls(
  rows: int, length: int, seed: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
  """Builds both ways of making ids.

  Args:
    rows: documents at a time.
    length: ids of a row when it is full.
    seed: of the parameters.

  Returns:
    Calls of no arguments, and the ids that each makes.
  """
  untie = _MODELS[_KIND.value]
  settings = {} if untie is None else {"untie": untie}
  config = MixtureOfTransformersConfig(
    dim=_DIM.value,
    num_layers=_LAYERS.value,
    num_heads=_DIM.value // 32,
    **settings,
  )
  model = build_model(config, _VOCABULARY)
  params = jax.jit(model.init_params)(jax.random.key(seed))
  # Texts and pictures in turns, and then a picture that is only opened.
  block = [3, *range(3584, 3584 + _CODES), 4]
  turn = [*[7] * len(block), *block]
  room = length - len(block) - 1  # for what stands between <bos> and that one
  turns = room // len(turn)
  text = [7] * (room - turns * len(turn))
  prompt = [1, *turn * turns, *text, 3]
  sampler = Sampler(
    model,
    params,
    Blocks(_VOCABULARY, (0, _CODES)),
    sampling=Sampling(temperature=1.0, top_k=0),
  )
  keys = jax.random.split(jax.random.key(seed), rows)
  state = sampler.begin(
    [prompt] * rows, keys, max_new=_CODES + 1, length=length
  )

  def cached() -> Any:
    # The state is used up by a call: a copy of it is part of the time.
    copy = jax.tree.map(jnp.copy, state)
    return sampler.advance(copy, _NEW).tokens

  towers = config.routed_towers.of_modality
  padded = [prompt + [3584] * (length - len(prompt))] * rows
  batch = jax.tree.map(
    jnp.asarray, batch_of_ids(padded, _VOCABULARY, towers=towers)
  )

  @jax.jit
  def recompute(params, batch):
    hidden: Any = model.apply({"params": params}, batch)
    last = jnp.take_along_axis(
      hidden, jnp.full((rows, 1, 1), len(prompt) - 1), axis=1
    )
    return jnp.argmax(model.logits(params, last), axis=-1)

  return (
    {
      "cached": cached,
      "recomputed": functools.partial(recompute, params, batch),
    },
    {"cached": rows * _NEW, "recomputed": rows},
  )


def run(words: Sequence[str]) -> None:
  """Measures and prints.

  Args:
    words: what stands on the command line beside this program's own flags.

  Raises:
    UserError: any of them, or a shape that is none.
  """
  timing.no_words(words)
  table = Table(title=f"generation, {_KIND.value}, {_DIM.value} wide")
  for column in ("", "tokens/s", "ms a step", "over recomputed"):
    table.add_column(column, justify="right" if column else "left")
  results = {}
  for text in _SHAPES.value:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
      raise UserError(f"--shapes: {text!r} must be like 16x256")
    rows, length = (int(size) for size in text.split("x"))
    if length < 3 * _CODES:
      raise UserError(f"--shapes: rows of {length} are too short; give 192")
    functions, made = calls(rows, length, flags.FLAGS.seed)
    seconds = timing.interleaved(
      functions, repeats=flags.FLAGS.repeats, seed=flags.FLAGS.seed
    )
    # Per id, so that calls of several ids and of one compare.
    each = {
      name: [s / made[name] for s in times] for name, times in seconds.items()
    }
    over = timing.Quartiles.of(
      [
        slow / quick
        for slow, quick in zip(each["recomputed"], each["cached"], strict=True)
      ]
    )
    for name, times in each.items():
      time = timing.Quartiles.of(times)
      results[f"{name} {text}"] = {
        "tokens_per_s": 1 / time.median,
        "seconds_per_step": time.median * rows,
      }
      table.add_row(
        f"{name} {text}",
        f"{1 / time.median:,.0f}",
        f"{1000 * time.median * rows:.1f}",
        str(over) if name == "cached" else "",
      )
    results[f"cached {text}"]["over_recomputed"] = dataclasses.asdict(over)
  timing.report(
    table,
    {
      "benchmark": "generation",
      "kind": _KIND.value,
      "dim": _DIM.value,
      "layers": _LAYERS.value,
      "cases": results,
      "repeats": flags.FLAGS.repeats,
      "seed": flags.FLAGS.seed,
    },
  )


if __name__ == "__main__":
  timing.program(run)
