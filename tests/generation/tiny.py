"""A tiny model of texts and 2 x 2 pictures, with every parameter drawn."""

import jax
import jax.numpy as jnp

from fusionlab.batch import Vocabulary
from fusionlab.generation.blocks import Blocks
from tests.models import pictures, tiny

# 0-4 pad, bos, eos, boi, eoi; texts 5-29; codes 30-45.
TWO = Vocabulary(("text", "image"), (30, 16))
# 5 and 6 open and close a speech block.
THREE = Vocabulary(
  ("text", "image", "speech"), (30, 16, 8), begin=(0, 3, 5), end=(0, 4, 6)
)
BLOCKS = Blocks(TWO, (0, 4))
# Continuous pictures, see `pictures.make`.
PICTURES = Blocks(pictures.VOCABULARY, (0, pictures.GRID.positions))
# One id at both ends of a document.
ALONE = Vocabulary(("text",), (30,), pad=29, bos=29, eos=29)


def make(vocabulary=TWO, **changes):
  """Model and parameters, float32."""
  return tiny.make(ids=vocabulary, spread=0.3, **changes)


def keys_of(n, seed=0):
  """Random streams of rows."""
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(seed), jnp.arange(n)
  )


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
