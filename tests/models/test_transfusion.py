"""Transfusion: what sees what, patches in and out, with a cache and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.batch import LatentGrid, Vocabulary, batch_of_ids, packed_batch
from fusionlab.errors import UserError
from fusionlab.models import build_model
from fusionlab.models.transfusion import SIZES, TransfusionConfig
from tests.models import pictures
from tests.models.pictures import GRID, PATCH, PICTURE, VOCABULARY

PATCHES = ("linear", "unet")


@pytest.mark.parametrize("causal", [False, True])
def test_positions_see_their_document_so_far_and_their_picture_whole(causal):
  """C1: the intervals are the paper's predicate, for random packings."""
  model, _ = pictures.make(causal=causal)
  batch = pictures.batch_for(model, seed=3, rows=6, length=60)
  key = np.arange(60)
  sees = (key >= batch.k_start[..., None]) & (key < batch.k_end[..., None])
  pictured = 0
  for row in range(6):
    segment, span = batch.segment[row], batch.span[row]
    pictured += span.max()
    for q in range(60):
      together = (segment == segment[q]) & (segment[q] > 0)
      allowed = together & (key <= q)
      if not causal and span[q]:
        allowed |= span == span[q]
      np.testing.assert_array_equal(sees[row, q], allowed)
  assert pictured > 6


def test_weights_are_of_next_tokens_and_of_pictures():
  """C2: none where the input is BOI or a patch; a picture's sum to 1."""
  model, _ = pictures.make()
  batch = pictures.batch_for(model, seed=4, rows=4, length=60)
  inside = batch.span > 0
  opens = batch.tokens == pictures.BOI
  assert inside.any() and opens.any()
  assert not batch.weight[opens].any()
  for row in range(4):
    for span in range(1, batch.span[row].max() + 1):
      assert batch.weight[row][batch.span[row] == span].sum() == 1
  rest = ~inside & ~opens & (batch.segment > 0)
  follows = np.zeros_like(rest)
  follows[:, :-1] = batch.segment[:, 1:] == batch.segment[:, :-1]
  np.testing.assert_array_equal(batch.weight[rest], follows[rest])


@pytest.mark.parametrize("patches", PATCHES)
def test_a_patch_reaches_its_whole_picture_and_nothing_before_it(patches):
  """M6, by the gradient of every prediction and hidden state."""
  model, params = pictures.make(patches=patches)
  ids = [1, 7, *PICTURE, 8, *PICTURE, 2]
  latents = np.random.default_rng(0).normal(size=(8, GRID.dim))
  batch = jax.tree.map(
    jnp.asarray,
    batch_of_ids(
      [ids], VOCABULARY, towers=(0, 1), latents=[latents], causal=False
    ),
  )

  @jax.jit
  def influence(latents):
    def sums(latents):
      seen = dataclasses.replace(batch, latents=latents)
      hidden, predicted = model.apply({"params": params}, seen, denoise=True)
      return jnp.sin(hidden[0]).sum(-1), jnp.sin(predicted[0]).sum(-1)

    return jax.jacrev(sums)(latents)

  hidden, predicted = (
    np.abs(x[:, 0]).sum(-1) > 0 for x in influence(batch.latents)
  )
  place = np.flatnonzero(np.asarray(ids) == PATCH)
  first, second = place[:4], place[4:]
  for source in first:
    assert hidden[first, source].all() and hidden[first[-1] + 1 :, source].all()
    assert not hidden[: first[0], source].any()
  for source in second:
    assert predicted[second, source].all()
    assert not hidden[: second[0], source].any()
  outside = np.setdiff1d(np.arange(len(ids)), place)
  assert not predicted[outside].any()


def test_causal_patches_see_no_later_one():
  """The ablation's other arm (Transfusion, Table 5)."""
  model, params = pictures.make(causal=True)
  batch = pictures.batch_for(model, seed=5, rows=1)
  last = np.flatnonzero(batch.span[0] == 1)[-1]
  changed = batch.latents.copy()
  changed[0, last] += 1
  before, _ = pictures.denoise(model, params, batch)
  after, _ = pictures.denoise(model, params, batch.replace(latents=changed))
  assert (before[0, :last] == after[0, :last]).all()
  assert (before[0, last] != after[0, last]).any()


@pytest.mark.parametrize("patches", PATCHES)
def test_towers_of_equal_parameters_are_the_dense_model(patches):
  """M1, and the oracle that runs every tower on every token agrees."""
  dense, shared = pictures.make(untie="", patches=patches)
  model, params = pictures.make(patches=patches)

  def copied(path, leaf):
    keys = [getattr(k, "key", "") for k in path]
    if keys[0] != "patches":  # a dense model's are the picture's too
      keys = ["shared" if k in ("text", "image") else k for k in keys]
    value = functools.reduce(lambda tree, key: tree[key], keys, shared)
    assert value.shape == leaf.shape
    return value

  params = jax.tree.map_with_path(copied, params)
  batch = pictures.batch_for(model, seed=6)
  oracle = model.clone(
    config=dataclasses.replace(model.config, dispatch="select")
  )
  expected = pictures.denoise(dense, shared, batch.replace(layout=None))
  for of_towers in (model, oracle):
    found = pictures.denoise(of_towers, params, batch)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
      found,
      expected,
    )


def test_images_parameters_do_not_touch_text_before_the_first_picture():
  """M5, bit for bit; behind the picture they do."""
  model, params = pictures.make()
  batch = pictures.batch_for(model, seed=7, rows=4)
  other = jax.tree.map_with_path(
    lambda path, leaf: (
      leaf + 0.1 if "image" in [getattr(k, "key", "") for k in path] else leaf
    ),
    params,
  )
  before, _ = pictures.denoise(model, params, batch)
  after, _ = pictures.denoise(model, other, batch)
  changed = np.asarray((before != after).any(-1))
  behind = np.zeros_like(changed)
  for row in range(4):
    for q in range(changed.shape[1]):
      keys = slice(batch.k_start[row, q], batch.k_end[row, q])
      behind[row, q] = (batch.span[row, keys] > 0).any()
  np.testing.assert_array_equal(changed, behind)


@pytest.mark.parametrize("patches", PATCHES)
def test_a_row_in_pieces_is_the_row_at_once(patches):
  """With a cache: text, a picture run twice, its end, and a padded prompt."""
  model, params = pictures.make(patches=patches)
  ids = np.array([[1, 7, *PICTURE, 8, 9, *PICTURE, 2]])
  latents = np.random.default_rng(0).normal(size=(8, GRID.dim))
  batch = batch_of_ids(
    ids.tolist(), VOCABULARY, towers=(0, 1), latents=[latents], causal=False
  )
  time = np.where(batch.span == 1, 0.2, np.where(batch.span == 2, 0.7, 0))
  batch = batch.replace(time=time.astype(np.float32))
  hidden, predicted = pictures.denoise(model, params, batch)
  step = jax.jit(model.step, static_argnames="denoise")
  weights = model.decoding_params(params)

  def run(cache, first, last, width=0, scale=1.0, **options):
    pad = [(0, 0), (0, max(width - (last - first), 0))]
    piece = slice(first, last)
    return step(
      weights,
      np.pad(ids[:, piece], pad),
      cache,
      start=jnp.array([first]),
      fresh=jnp.array([last - first]),
      latents=np.pad(batch.latents[:, piece] * scale, [*pad, (0, 0)]),
      time=np.pad(batch.time[:, piece], pad),
      **options,
    )

  prompt = run(model.init_cache(1, 24), 0, 11, width=16)
  np.testing.assert_allclose(prompt.hidden[:, :11], hidden[:, :11], atol=1e-5)
  # What the first run of the picture leaves in the cache, the second overwrites.
  noisy = run(prompt.cache, 11, 15, scale=3.0, denoise=True)
  again = run(noisy.cache, 11, 15, denoise=True)
  assert not np.allclose(noisy.prediction, again.prediction)
  np.testing.assert_allclose(
    again.prediction, predicted[:, 11:15], rtol=1e-4, atol=1e-5
  )
  for old, new in zip(prompt.cache, again.cache, strict=True):
    for name in "kv":
      kept = [c["attention"][name][:, :, :11] for c in (old, new)]
      assert (kept[0] == kept[1]).all()
  end = step(
    weights,
    ids[:, 15:16],
    again.cache,
    start=jnp.array([15]),
    fresh=jnp.array([1]),
  )
  np.testing.assert_allclose(end.hidden, hidden[:, 15:16], atol=1e-5)


def test_the_level_changes_the_prediction():
  """The noise level enters; without one, latents are clean ones."""
  model, params = pictures.make()
  batch = pictures.batch_for(model)
  clean = batch.replace(time=np.zeros_like(batch.time))
  predicted = [
    pictures.denoise(model, params, b)[1]
    for b in (batch, clean, batch.replace(time=None))
  ]
  assert not np.allclose(predicted[0], predicted[1])
  assert (predicted[1] == predicted[2]).all()


@pytest.mark.parametrize(("name", "total"), [("163m", 162.4), ("760m", 777.8)])
def test_the_papers_sizes(name, total):
  """Dense totals of the facts' table; patches and the image's id come on top."""
  size = SIZES[name]
  ids = Vocabulary(
    ("text", "image"), (31_999, 1), grids=(None, LatentGrid(32, 8, 2))
  )
  config = TransfusionConfig(
    dim=size.dim,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    untie="",
  )
  shapes = dict(build_model(config, ids).abstract_params())
  patches = shapes.pop("patches")
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert round(count / 1e6, 1) == pytest.approx(total, abs=0.11)
  # Transfusion, section 3.2: less than 0.5% of the parameters.
  assert sum(x.size for x in jax.tree.leaves(patches)) < 0.005 * count


def test_what_does_not_fit_is_refused():
  """Discrete tokenizers, batches without latents, latents of another width."""
  config = TransfusionConfig(dim=32, num_heads=4)
  discrete = Vocabulary(("text", "image"), (24, 8))
  with pytest.raises(UserError, match="image_tokenizer=kl"):
    build_model(config, discrete).abstract_params()
  model, params = pictures.make()
  batch = pictures.batch_for(model)
  with pytest.raises(UserError, match="the batch has no latents"):
    model.apply({"params": params}, batch.replace(latents=None))
  with pytest.raises(UserError, match=r"\[\(3, 8\)\].*\[\(4, 8\)\]"):
    batch_of_ids(
      [PICTURE], VOCABULARY, towers=(0, 1), latents=[np.zeros((3, 8))]
    )
  nothing = [np.zeros((1, 4), np.int32) for _ in range(3)]
  with pytest.raises(UserError, match="0 latent values a position"):
    packed_batch(*nothing, VOCABULARY)
