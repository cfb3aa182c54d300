"""Tiny Transfusion models, and documents with continuous pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.analysis.parameters import path_name
from fusionlab.batch import LatentGrid, Vocabulary, packed_batch
from fusionlab.models import build_model
from fusionlab.models.transfusion import TransfusionConfig
from fusionlab.testing.batches import layout_of

GRID = LatentGrid(side=4, channels=2, patch=2)
VOCABULARY = Vocabulary(("text", "image"), (24, 1), grids=(None, GRID))
BOI, EOI = VOCABULARY.begin[1], VOCABULARY.end[1]
PATCH = VOCABULARY.offset(1)
PICTURE = [BOI, *[PATCH] * GRID.positions, EOI]


@functools.cache
def make(**changes):
  """A tiny float32 model; all parameters are drawn, so that none is neutral."""
  settings = {
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "unet_channels": 4,
    "unet_blocks": 1,
    "compute_dtype": "float32",
  } | changes
  model = build_model(TransfusionConfig(**settings), VOCABULARY)
  rng = np.random.default_rng(1)
  params = jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(
      rng.normal(size=leaf.shape) * 0.2 + ("scale" in path_name(path)),
      leaf.dtype,
    ),
    model.abstract_params(),
  )
  return model, params


def documents(rng, length):
  """Ids of a row: documents of texts and pictures in any order, then padding."""
  tokens, segment, position = (np.zeros(length, np.int32) for _ in range(3))
  at = number = 0
  while True:
    ids = [1]
    for _ in range(rng.integers(1, 5)):
      text = rng.integers(5, PATCH, rng.integers(0, 4)).tolist()
      ids += text if rng.random() < 0.5 else PICTURE
    ids.append(2)
    if at + len(ids) > length:
      return tokens, segment, position
    number += 1
    here = slice(at, at + len(ids))
    tokens[here], segment[here] = ids, number
    position[here] = np.arange(len(ids))
    at += len(ids)


def batch_for(model, seed=0, rows=2, length=40):
  """A packed batch of random documents with random latents and levels."""
  rng = np.random.default_rng(seed)
  packed = (documents(rng, length) for _ in range(rows))
  tokens, segment, position = (np.stack(x) for x in zip(*packed, strict=True))
  inside = tokens == PATCH
  latents = rng.normal(size=(*tokens.shape, GRID.dim)).astype(np.float32)
  batch = packed_batch(
    tokens,
    segment,
    position,
    VOCABULARY,
    latents=np.where(inside[..., None], latents, 0),
    causal=model.config.causal,
  )
  layout = layout_of(
    batch.modality,
    segment > 0,
    model.config.routed_towers.of_modality,
    rows,
  )
  time = np.where(inside, rng.random((rows, 1)), 0).astype(np.float32)
  return batch.replace(layout=layout, time=time)


@functools.partial(jax.jit, static_argnums=0)
def denoise(model, params, batch):
  """Hidden states and predictions."""
  return model.apply({"params": params}, batch, denoise=True)
