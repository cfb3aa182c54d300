"""Random packings of text and continuous pictures, and a model of no layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.batch import packed_batch
from fusionlab.nn.functional.diffusion import Process
from tests.models.pictures import GRID, PATCH, VOCABULARY, documents

WIDTH, _DDPM = 16, Process()
BYTES = np.concatenate([np.zeros(5), np.arange(PATCH - 5) % 3 + 1])


def words(rng, most=5):
  """Ids of ordinary text."""
  return rng.integers(5, PATCH, rng.integers(1, most + 1)).tolist()


def batch_of(rows, rng, length=0):
  """Packs rows of documents, given by ids."""
  length = length or max(sum(map(len, row)) for row in rows)
  tokens, segment, position = np.zeros((3, len(rows), length), np.int32)
  for r, row in enumerate(rows):
    start = 0
    for number, ids in enumerate(row, 1):
      here = slice(start, start + len(ids))
      tokens[r, here], segment[r, here] = ids, number
      position[r, here] = np.arange(len(ids))
      start += len(ids)
  return with_latents(tokens, segment, position, rng)


def with_latents(tokens, segment, position, rng):
  """Completes a batch; every picture is drawn."""
  latents = rng.normal(size=(*tokens.shape, GRID.dim)).astype(np.float32)
  latents *= (tokens == PATCH)[..., None]
  return packed_batch(tokens, segment, position, VOCABULARY, latents=latents)


def random_pictures(seed, rows=4, length=48):
  """A batch of random documents, as many in each row as fit."""
  rng = np.random.default_rng(seed)
  packed = [documents(rng, length) for _ in range(rows)]
  return with_latents(*(np.stack(x) for x in zip(*packed, strict=True)), rng)


@dataclasses.dataclass(frozen=True)
class Tables:
  """A model of tables: a position sees itself and its row's mean latents."""

  process: Process = _DDPM

  def init(self, seed=0):
    """Random parameters."""
    shapes = {
      "embed": (PATCH + 1, WIDTH),
      "out": (WIDTH, PATCH + 1),
      "enter": (GRID.dim, WIDTH),
      "leave": (WIDTH, GRID.dim),
      "time": (WIDTH,),
    }
    rng = np.random.default_rng(seed)
    return {
      name: jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)
      for name, shape in shapes.items()
    }

  def apply(self, variables, batch, *, train=False, rngs=None, denoise=False):
    """Hidden states, and with `denoise` predictions."""
    p = variables["params"]
    entered = batch.latents @ p["enter"]
    x = p["embed"][batch.tokens] + entered
    x = x + entered.mean(axis=1, keepdims=True)
    if batch.time is not None:
      x = x + batch.time[..., None] * p["time"]
    x = jnp.tanh(x)
    inside = (batch.span > 0)[..., None]
    return (x, jnp.where(inside, x @ p["leave"], 0)) if denoise else x

  def unembedding(self, params):
    """The output table."""
    return params["out"]


def logits_of(model, params, batch):
  """All logits, for what is computed without the objective."""
  batch = jax.tree.map(jnp.asarray, batch)
  hidden = model.apply({"params": params}, batch, train=False)
  return hidden @ model.unembedding(params)
