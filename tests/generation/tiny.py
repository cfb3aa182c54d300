"""A tiny model of texts and 2 x 2 pictures, with every parameter drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from fusionlab.analysis import parameters
from fusionlab.batch import Vocabulary
from fusionlab.generation.blocks import Blocks
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)

# 0-4 pad, bos, eos, boi, eoi; texts 5-29; codes 30-45.
TWO = Vocabulary(("text", "image"), (30, 16))
# 5 and 6 open and close a speech block.
THREE = Vocabulary(
  ("text", "image", "speech"), (30, 16, 8), begin=(0, 3, 5), end=(0, 4, 6)
)
BLOCKS = Blocks(TWO, (0, 4))


def make(vocabulary=TWO, **changes):
  """Model and parameters, float32."""
  k = len(vocabulary.modalities)
  settings = {
    "modalities": vocabulary.modalities,
    "towers": tuple(range(k)),
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "compute_dtype": "float32",
  } | changes
  model = build_model(MixtureOfTransformersConfig(**settings), vocabulary)
  rng = np.random.default_rng(1)
  params = jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(
      rng.normal(size=leaf.shape) * 0.3
      + ("scale" in parameters.path_name(path)),
      leaf.dtype,
    ),
    parameters.abstract_params(model),
  )
  return model, params


def document(rng, vocabulary=TWO, length=24, block=4):
  """Ids of a document: texts and whole blocks in random order."""
  ids = [vocabulary.bos]
  while len(ids) < length:
    m = int(rng.integers(0, len(vocabulary.modalities)))
    if m == 0:
      ids += rng.integers(7, 30, int(rng.integers(1, 4))).tolist()
      continue
    codes = rng.integers(vocabulary.offset(m), vocabulary.ends[m], block)
    ids += [vocabulary.begin[m], *codes.tolist(), vocabulary.end[m]]
  return ids
