"""Continuous pictures: minus the objective's error, in any surroundings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusionlab
from fusionlab.errors import UserError
from fusionlab.evaluate.captioned import (
  caption_after_picture,
  picture_after_caption,
)
from fusionlab.evaluate.denoising import patch_errors
from fusionlab.evaluate.likelihood import Scorer
from fusionlab.evaluate.matching import match
from fusionlab.nn.functional.diffusion import Process
from fusionlab.objectives.noise import normal_of_values
from fusionlab.sharding.mesh import MeshConfig, make_mesh
from tests.evaluate.pictures import CONTINUOUS, GRID, painted, transfusion
from tests.models import tiny
from tests.models.pictures import PICTURE


@functools.partial(jax.jit, static_argnums=(0, 1))
def heldout(objective, model, params, batch):
  return objective(model, params, batch, train=False)["loss/image"].value()


def batch_of(model, document):
  return fusionlab.batch_of_ids(
    [document.ids],
    CONTINUOUS,
    towers=model.config.routed_towers.of_modality,
    row_length=16,
    counts=(16 - GRID.positions, GRID.positions),
    latents=[document.latents],
    causal=model.config.causal,
  )


def one_a_batch(model, params, objective=None):
  """A scorer that compiles little."""
  return Scorer(model, params, objective=objective, batch_tokens=32)


def scores_of(scorer, documents):
  return scorer.log_probabilities(
    [d.ids for d in documents],
    [d.span for d in documents],
    latents=[d.latents for d in documents],
  )


@pytest.mark.smoke
@pytest.mark.parametrize("settings", [{}, {"untie": "", "causal": True}])
def test_a_picture_gets_minus_its_held_out_loss(settings):
  """With its caption, another's and none, on one device and on eight."""
  model, params, objective = transfusion(**settings)
  a, b, c = painted(3)
  documents = [
    picture_after_caption(caption, picture, CONTINUOUS)
    for caption, picture in ((a, a), (None, a), (b, a), (None, c), (c, c))
  ]
  found = scores_of(one_a_batch(model, params, objective), documents)
  wanted = [
    heldout(objective, model, params, batch_of(model, d)) for d in documents
  ]
  assert len(set(map(float, wanted))) == 5
  assert all(f.shape == (GRID.positions,) for f in found)
  np.testing.assert_allclose(
    [-f.mean() for f in found], wanted, rtol=1e-5, atol=0
  )
  if not settings:
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    many = Scorer(model, params, objective=objective, mesh=mesh)
    for one, other in zip(found, scores_of(many, documents), strict=True):
      np.testing.assert_allclose(other, one, rtol=1e-5)


class Shift:
  """Predicts of every patch the mean of the row's first picture as it sees it."""

  process = Process()

  def apply(self, variables, batch, *, denoise):
    del variables
    assert denoise
    first = jnp.where((batch.span == 1)[..., None], batch.latents, 0)
    mean = first.sum(axis=1, keepdims=True) / GRID.positions
    hidden = jnp.zeros((*batch.tokens.shape, 1))
    return hidden, jnp.broadcast_to(mean, batch.latents.shape)


def test_other_pictures_of_the_document_stay_clean():
  model, _, objective = transfusion()
  a, b = painted(2)
  document = picture_after_caption(a, a, CONTINUOUS)
  document.ids.extend(picture_after_caption(None, b, CONTINUOUS).ids[1:])
  both = np.concatenate([a.latents, b.latents])
  batch = fusionlab.batch_of_ids(
    [document.ids],
    CONTINUOUS,
    towers=model.config.routed_towers.of_modality,
    latents=[both],
    causal=False,
  )
  (second,) = np.nonzero(batch.span[0] == 2)
  errors_of = jax.jit(functools.partial(patch_errors, objective, Shift()))
  errors = errors_of({}, batch, jnp.array([second[1]]))
  noise = jax.jit(functools.partial(normal_of_values, 0))(batch)[0, second]
  wanted = np.square(a.latents.mean(axis=0) - noise).mean(axis=-1)
  np.testing.assert_allclose(errors[0, second], wanted, rtol=1e-5)
  assert np.count_nonzero(errors) == GRID.positions


def test_captions_are_scored_after_clean_pictures():
  """The softmax, of what can be next, where latents are as they are."""
  model, params, _ = transfusion()
  a, b = painted(2)
  document = caption_after_picture(a, b, CONTINUOUS)
  (found,) = scores_of(one_a_batch(model, params), [document])
  batch = batch_of(model, document)
  logits = model.logits(params, tiny.apply(model, params, batch))
  table = jax.nn.log_softmax(logits[0, :, : CONTINUOUS.ends[0]])
  start, stop = document.span
  wanted = [table[i - 1, document.ids[i]] for i in range(start, stop)]
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_pictures_and_captions_are_matched():
  """A model that knows nothing: every kind of hit is there, of any value."""
  model, params, objective = transfusion()
  found = match(one_a_batch(model, params, objective), painted(3))
  assert {len(hits) for hits in found.hits.values()} == {3}


@pytest.mark.parametrize(
  ("span", "latents", "message"),
  [
    ((3, 7), [np.zeros((3, 8), np.float32)], "has 4 patches of 8 values"),
    ((3, 7), None, "has 4 patches of 8 values, and latents of shape"),
    ((3, 7), [np.zeros((4, 2), np.float32)], r"latents of shape \(4, 2\)"),
    ((2, 7), [np.zeros((4, 8), np.float32)], "4 of the tokens 2 to 7 are"),
    ((4, 6), [np.zeros((4, 8), np.float32)], "give Scorer the objective"),
    ((1, 2), [], "1 documents and 0 latents"),
  ],
)
def test_mistakes_are_named(span, latents, message):
  model, params, _ = transfusion()
  with pytest.raises(UserError, match=message):
    Scorer(model, params).log_probabilities(
      [[1, 9, *PICTURE]], [span], latents=latents
    )
