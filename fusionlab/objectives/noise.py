"""Noise and noise levels of the pictures in a batch, however they are packed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fusionlab.batch import Batch, Vocabulary


def before_text(batch: Batch, vocabulary: Vocabulary) -> Bool[Array, "B L"]:
  """Positions with no text of their document before them and some after.

  Args:
    batch: rows of packed documents; special ids are no text.
    vocabulary: names them.
  """
  specials = jnp.asarray(vocabulary.specials)
  text = (batch.modality == 0) & ~jnp.isin(batch.tokens, specials)
  rows, length = batch.tokens.shape
  row = jnp.arange(rows)[:, None]
  # Where the text of a document begins; past its end where it has none.
  first = jnp.full((rows, length + 1), length)
  first = first.at[row, batch.segment].min(
    jnp.where(text, batch.position, length)
  )
  first = jnp.take_along_axis(first, jnp.asarray(batch.segment), axis=1)
  return (first > batch.position) & (first < length)


def uniform_of_spans(key: jax.Array, batch: Batch) -> Float[Array, "B L"]:
  """Draws a number of (0, 1] for each continuous span.

  Args:
    key: of `jax.random`.
    batch: spans may be anywhere in a row.

  Returns:
    At each position that of its span; without meaning outside.
  """
  span: Any = batch.span
  # As many as positions: more than a row has spans.
  drawn = 1 - jax.random.uniform(key, span.shape)
  return jnp.take_along_axis(drawn, span - 1, axis=1, mode="clip")


def normal_of_positions(key: jax.Array, batch: Batch) -> Float[Array, "B L C"]:
  """Draws standard normal noise for the latents.

  Args:
    key: of `jax.random`.
    batch: may be dealt to devices (`Batch.stored`); its positions get the same.
  """
  latents: Any = batch.latents
  noise = jax.random.normal(key, latents.shape)
  if batch.stored is None:
    return noise
  column = jnp.asarray(batch.k_start + batch.position)
  return jnp.take_along_axis(noise, column[..., None], axis=1)


def normal_of_values(seed: int, batch: Batch) -> Float[Array, "B L C"]:
  """Standard normal noise that depends on a picture's values alone.

  So a picture has the same noise wherever it stands, in any batch, on any mesh.

  Args:
    seed: gives other noise.
    batch: with clean latents.

  Returns:
    Noise of the latents; without meaning outside of spans.
  """
  span: Any = batch.span
  latents: Any = batch.latents
  rows, length, width = latents.shape
  row = jnp.arange(rows)[:, None]
  bits = jax.lax.bitcast_convert_type(latents, jnp.uint32).sum(axis=-1)
  # Sums of integers, which wrap, are the same in any order.
  marks = jnp.zeros((rows, length + 1), jnp.uint32).at[row, span].add(bits)
  first = jnp.full((rows, length + 1), length)
  first = first.at[row, span].min(batch.position)
  mark, begin = (jnp.take_along_axis(x, span, axis=1) for x in (marks, first))
  key = jax.random.key(seed, impl="threefry2x32")

  def draw(mark, place):
    own = jax.random.fold_in(jax.random.fold_in(key, mark), place)
    return jax.random.normal(own, (width,))

  return jax.vmap(jax.vmap(draw))(mark, batch.position - begin)
