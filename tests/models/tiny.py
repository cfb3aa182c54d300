"""Tiny float32 models whose parameters are all drawn, and their batches.

Equal models share their compiled programs, over all tests of a process.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.analysis import parameters
from fusionlab.batch import Vocabulary
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.objectives import build_objective
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.testing.batches import random_batch

NAMES = ("text", "image", "speech")


def vocabulary(k):
  """Vocabulary of k modalities with 40 ids each."""
  return Vocabulary(NAMES[:k], (40,) * k, begin=(0,) * k, end=(0,) * k)


@functools.cache
def make(k=2, *, ids=None, spread=0.2, **changes):
  """A tiny float32 model; scales are drawn so that norms are not neutral.

  `ids` is its vocabulary, `spread` the parameters' standard deviation.
  """
  ids = ids or vocabulary(k)
  settings = {
    "modalities": ids.modalities,
    "towers": tuple(range(len(ids.modalities))),
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "compute_dtype": "float32",
  } | changes
  model = build_model(MixtureOfTransformersConfig(**settings), ids)
  shapes = model.abstract_params()
  rng = np.random.default_rng(1)
  params = jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(
      rng.normal(size=leaf.shape) * spread
      + ("scale" in parameters.path_name(path)),
      leaf.dtype,
    ),
    shapes,
  )
  return model, params


def batch_for(model, seed=0, rows=2, length=24, **options):
  """A random interleaving for the model's vocabulary and towers."""
  towers = model.config.routed_towers.of_modality
  return random_batch(
    np.random.default_rng(seed),
    model.vocabulary,
    rows=rows,
    length=length,
    towers=towers,
    **options,
  )


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(model, params, batch):
  """Mean loss and gradient tree."""
  objective = build_objective(
    NextTokenConfig(), model.vocabulary, np.ones(40, np.int32)
  )

  def f(p):
    mean = objective(model, p, batch, train=True)["loss"]
    return mean.total / mean.count

  return jax.value_and_grad(f)(params)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
  """Hidden states, compiled as one program."""
  return model.apply({"params": params}, batch)


def close(a, b, rtol=1e-5, atol=1e-6):
  """Trees equal to float32 rounding."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b
  )


def on_real(hidden, batch):
  """Hidden states of real positions only."""
  return np.asarray(hidden)[np.asarray(batch.segment) > 0]
