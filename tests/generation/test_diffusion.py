"""Continuous pictures in rows: text, noise taken away in place, text again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.batch import batch_of_ids
from fusionlab.errors import UserError
from fusionlab.generation.config import Sampling
from fusionlab.generation.denoising import snapshot_steps
from fusionlab.generation.rows import RUNNING, fork, rollback
from fusionlab.generation.sampler import Sampler
from tests.generation import tiny
from tests.generation.tiny import PICTURES
from tests.models import pictures
from tests.models.pictures import BOI, EOI, GRID, PATCH, PICTURE, VOCABULARY

STEPS, LENGTH, N = 4, 40, GRID.positions
# Enough for all to end, though rows wait for each other's pictures.
END = 80
FREE = Sampling(temperature=1.0, top_k=0, diffusion_steps=STEPS)
# The second id says when a row opens pictures, see `scripted`; 20: never.
PROMPTS = [[1, 7, 8], [1, 9, 10, 11, 12], [1, 20], [1, 8, 9, BOI]]
OPENS = ((7, 4), (7, 12), (9, 7), (8, 11))
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def scripted(logits, state):
  """Opens pictures where `OPENS` has it, and never ends."""
  mark, length = state.tokens[:, 1], state.length
  opens = functools.reduce(
    jnp.logical_or, ((mark == m) & (length == n) for m, n in OPENS)
  )
  logits = logits.at[:, jnp.array([2, PATCH])].set(-jnp.inf)
  return logits.at[:, BOI].set(jnp.where(opens, 1e3, -1e3))


def sampler_for(model, sampling=FREE, **options):
  options = {"may_open": (1,), "processors": (scripted,)} | options
  return Sampler(*model, PICTURES, sampling=sampling, **options)


def begin(sampler, prompts=PROMPTS, keys=None, **options):
  keys = tiny.keys_of(len(prompts)) if keys is None else keys
  return sampler.begin(prompts, keys, max_new=20, length=LENGTH, **options)


def rows(state):
  """Ids, and latents of the patches, of each row."""
  tokens, length, latents = jax.device_get(
    (state.tokens, state.length, state.latents)
  )
  ids = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
  values = [x[t == PATCH] for x, t in zip(latents, tokens, strict=True)]
  return ids, values


def assert_equal(found, expected):
  """Ids, and latents to the bit."""
  assert found[0] == expected[0]
  for a, b in zip(found[1], expected[1], strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def model():
  return pictures.make()


@pytest.fixture(scope="module")
def sampler(model):
  return sampler_for(model, snapshots=2)


@pytest.fixture(scope="module")
def finished(sampler):
  """All rows at their end."""
  return sampler.advance(begin(sampler), END)


@functools.partial(jax.jit, static_argnums=0)
def one_more(model, params, tokens, cache, start):
  """Hidden states of ids `[B, 1]` behind what a cache holds."""
  weights, fresh = model.decoding_params(params), jnp.ones_like(start)
  decoded = model.step(weights, tokens, cache, start=start, fresh=fresh)
  return decoded.hidden[:, 0]


def assert_caches_what_the_model_computes(model, state):
  """The step after a row's end gives what the whole row gives without a cache."""
  network, params = model
  ids, latents = rows(state)
  batch = batch_of_ids(
    ids,
    VOCABULARY,
    towers=network.config.routed_towers.of_modality,
    row_length=LENGTH,
    latents=latents,
    causal=False,
  )
  hidden, _ = pictures.denoise(network, params, batch.replace(time=None))
  last = state.length - 1
  found = one_more(
    network,
    params,
    jnp.take_along_axis(state.tokens, last[:, None], axis=1),
    jax.tree.map(lambda x: x[: len(ids)], state.cache),
    last,
  )
  close(found, hidden[np.arange(len(ids)), np.asarray(last)])


def test_rows_open_pictures_when_they_like_and_go_on_behind_them(
  model, finished
):
  """Ragged rows, two pictures in one, none in another; the cache holds them."""
  ids, latents = rows(finished)
  assert finished.length.tolist() == [len(p) + 20 for p in PROMPTS]
  assert [i.count(BOI) for i in ids] == [2, 1, 0, 2]
  for row, values in zip(ids, latents, strict=True):
    PICTURES.check(row)
    assert row.count(PATCH) == N * row.count(BOI) == len(values)
    assert np.abs(values).max(initial=0) <= 5
    for at in np.flatnonzero(np.array(row) == BOI):
      assert row[at : at + N + 2] == PICTURE
  assert ids[0][4] == BOI and ids[3][3 : 3 + N + 2] == PICTURE
  assert not np.allclose(latents[0][:N], latents[0][N:])
  outside = np.asarray(finished.tokens != PATCH)
  assert not np.asarray(finished.latents)[outside].any()
  assert_caches_what_the_model_computes(model, finished)


def test_a_row_alone_is_the_row_among_others(sampler, finished):
  """Whenever the others reach their pictures."""
  ids, latents = rows(finished)
  for row in (0, 3):
    alone = begin(sampler, [PROMPTS[row]], tiny.keys_of(4)[row : row + 1])
    found, values = rows(sampler.advance(alone, END))
    assert found == [ids[row]]
    close(values[0], latents[row])


def test_denoising_leaves_the_prefix_and_overwrites_the_picture(sampler):
  """C4: to the bit, in the row with a picture and in those without."""
  prompts = [[1, 9, 9, BOI], [1, 20], [1, 20], [1, 20, 7]]
  state = sampler.advance(begin(sampler, prompts), 1)
  rest = dataclasses.replace(
    state, finished=jnp.array([RUNNING, 1, 1, 1], jnp.int32)
  )
  before = jax.device_get(state.cache)
  after = jax.device_get(sampler.advance(rest, 1).cache)
  for old, new in zip(before, after, strict=True):
    for name in "kv":
      a, b = old["attention"][name], new["attention"][name]
      np.testing.assert_array_equal(a[0, :, :4], b[0, :, :4])
      np.testing.assert_array_equal(a[1:], b[1:])
      assert (a[0, :, 4 : 4 + N] != b[0, :, 4 : 4 + N]).any(axis=(0, 2)).all()
      np.testing.assert_array_equal(a[0, :, 4 + N :], b[0, :, 4 + N :])


@functools.partial(jax.jit, static_argnums=0)
def predicted(model, params, batch):
  return model.apply({"params": params}, batch, denoise=True)[1]


def by_recomputing(model, prompt, key, sampling):
  """A picture by whole documents: no cache, each level its own pass."""
  network, params = model
  sampler, start = network.process.samplers[0], len(prompt)
  key = jax.random.fold_in(key, start)

  def noise(i):
    return jax.random.normal(jax.random.fold_in(key, i), (N, GRID.dim))

  x, times = noise(0), network.process.times(sampling.diffusion_steps)
  documents = [[*prompt, *[PATCH] * N], [1, BOI, *[PATCH] * N]]
  for i, time in enumerate(times[:-1]):
    batch = batch_of_ids(
      documents,
      VOCABULARY,
      towers=(0, 1),
      latents=[np.asarray(x)] * 2,
      causal=False,
    )
    level = np.where(batch.span > 0, time, 0).astype(np.float32)
    both = predicted(network, params, batch.replace(time=level))
    c, u = both[0, start : start + N], both[1, 2 : 2 + N]
    x = network.process.step(
      x,
      u + sampling.guidance * (c - u),
      time,
      times[i + 1],
      noise(i + 1),
      sampler=sampler,
      clip=sampling.clip_latents,
    )
  return x


@pytest.mark.parametrize(
  ("options", "guidance"),
  [
    ({}, 3.0),
    ({"patches": "unet", "untie": "", "process": "flow", "num_layers": 1}, 1.0),
  ],
)
def test_a_picture_is_what_recomputing_gives(options, guidance):
  """Guided by the document without caption; a dense U-Net, rectified flow."""
  model = pictures.make(**options)
  sampling = dataclasses.replace(FREE, guidance=guidance)
  sampler = sampler_for(model, sampling, stop_ids=(EOI,))
  state = sampler.advance(begin(sampler), END)
  ids, latents = rows(state)
  assert ids[3] == [*PROMPTS[3], *PICTURE[1:]]
  expected = by_recomputing(model, PROMPTS[3], tiny.keys_of(4)[3], sampling)
  close(latents[3], expected)
  assert_caches_what_the_model_computes(model, state)


def test_guidance_of_one_is_none(model, finished):
  """It compiles the same program; where bare rows are run, they count for 0."""
  plain, guided = (
    sampler_for(model, dataclasses.replace(FREE, guidance=w), stop_ids=(EOI,))
    for w in (1.0, 2.0)
  )
  assert sampler_for(model, stop_ids=(EOI,))._program == plain._program
  guided._values["guidance"] = jnp.float32(1.0)
  found = rows(guided.advance(begin(guided), END))
  for a, b, before, after in zip(*found, *rows(finished), strict=True):
    assert a == before[: len(a)]
    close(b, after[: len(b)])


def test_steps_may_be_taken_in_any_pieces(sampler, finished):
  state = begin(sampler)
  for steps in (1, 2, 3, 5, 69):
    state = sampler.advance(state, steps)
  assert_equal(rows(state), rows(finished))


def test_cutting_back_draws_the_same_again(sampler, finished):
  """Also inside of a picture, whose patches are of no use by halves."""
  straight = rows(finished)
  state = jax.tree.map(jnp.copy, finished)
  # To the second picture's second patch; before the first; nothing; to its end.
  back = rollback(state, jnp.array([8, 20, 0, 15]))
  ids, _ = rows(back)
  assert [row[-1] for row in ids[:2]] == [PATCH, 12]
  assert back.finished[2] and ids[3] == [*PROMPTS[3][:-1], *PICTURE]
  beyond = np.arange(LENGTH) >= np.asarray(back.length)[:, None]
  assert not np.asarray(back.latents)[beyond].any()
  again = sampler.advance(back, END)
  assert_equal(rows(again), straight)
  np.testing.assert_array_equal(again.snapshots, finished.snapshots)


def test_copies_take_their_pictures_along(sampler, finished):
  ids, latents = rows(finished)
  half = sampler.advance(begin(sampler), 12)
  which = np.array([3, 0, 0, 1])
  found = rows(sampler.advance(fork(half, which), END))
  expected = [ids[i] for i in which], [latents[i] for i in which]
  assert_equal(found, expected)


def test_pictures_of_a_prompt_are_seen(model, sampler):
  """Clean, several, and beside a prompt without one."""
  rng = np.random.default_rng(0)
  prompts = [
    [1, 20, *PICTURE, 7, *PICTURE, 9],
    [1, 20, 8],
    [1, *PICTURE],
    [1, 8, *PICTURE, 6, BOI],
  ]
  latents = [
    rng.normal(size=(N * k, GRID.dim)).astype(np.float32) if k else None
    for k in (2, 0, 1, 1)
  ]
  state = begin(sampler, prompts, latents=latents)
  for found, given in zip(rows(state)[1], latents, strict=True):
    np.testing.assert_array_equal(
      found, np.zeros((0, 8)) if given is None else given
    )
  state = sampler.advance(state, END)
  ids, values = rows(state)
  start = len(prompts[3])
  assert ids[3][start : start + N + 1] == PICTURE[1:]
  np.testing.assert_array_equal(values[3][:N], latents[3])
  assert values[3][N:].shape == (N, GRID.dim) and values[3][N:].any()
  assert_caches_what_the_model_computes(model, state)


def test_a_hook_sees_and_changes_each_blocks_attention(model, finished):
  """At every step, for every layer; rows that it leaves alone stay to the bit."""
  calls = []

  def note(layer, step, time, due):
    calls.append((layer, int(step), float(time), due.tolist()))

  def hook(attended, moment):
    assert attended.shape == (4, N, 32)
    jax.debug.callback(
      functools.partial(note, moment.layer),
      moment.step,
      moment.time,
      moment.rows,
      ordered=True,
    )
    changed = attended * jnp.where(moment.time > 0.5, 0, 1)
    third = jnp.arange(4)[:, None, None] == 3
    return jnp.where(third, changed, attended)

  sampler = sampler_for(model, snapshots=2, denoise_hook=hook)
  state = sampler.advance(begin(sampler), END)
  jax.effects_barrier()
  found, expected = rows(state), rows(finished)
  assert_equal(*(tuple(x[:3] for x in both) for both in (found, expected)))
  assert found[0][3][:9] == expected[0][3][:9]
  assert not np.allclose(found[1][3], expected[1][3])
  # All four rows draw two times or less: the third finds no picture.
  times = model[0].process.times(STEPS)[:-1]
  once = [(k, i, pytest.approx(t)) for i, t in enumerate(times) for k in (0, 1)]
  assert [c[:3] for c in calls] == once * (len(calls) // len(once))
  assert calls[0][3] == [True, True, False, True]
  assert len(calls) // len(once) == 2


def test_snapshots_are_estimates_on_the_way(sampler, finished):
  """At evenly spaced steps; the later, the nearer to the picture."""
  assert snapshot_steps(4, 50) == [10, 20, 30, 40]
  assert snapshot_steps(2, 4) == [1, 2] and snapshot_steps(0, 4) == []
  kept = np.asarray(finished.snapshots)
  patches = np.asarray(finished.tokens == PATCH)
  assert kept.shape == (4, 2, LENGTH, GRID.dim)
  assert not np.moveaxis(kept, 1, 0)[:, ~patches].any()
  clean = np.asarray(finished.latents)[patches]
  errors = [np.abs(x[patches] - clean).mean() for x in np.moveaxis(kept, 1, 0)]
  assert errors[0] > errors[1] > 0


def test_randomness_is_of_the_row_the_place_and_the_step(sampler):
  """Another key, another place: another picture."""
  prompts = [[1, 9, BOI], [1, 9, BOI], [1, 9, 9, BOI], [1, 9, BOI]]
  keys = tiny.keys_of(2)[np.array([0, 0, 0, 1])]
  state = begin(sampler, prompts, keys)
  one, two, there, other = rows(sampler.advance(state, 2))[1]
  np.testing.assert_array_equal(one, two)
  assert not np.allclose(one, there) and not np.allclose(one, other)


@pytest.mark.parametrize(
  ("prompt", "latents", "said"),
  [
    ([1, BOI, PATCH, PATCH], np.zeros((2, 8)), "inside of a continuous"),
    ([1, *PICTURE], None, r"shape \(0, 8\); its ids need \(4, 8\)"),
    ([1, 7], np.zeros((4, 8)), r"\(4, 8\); its ids need \(0, 8\)"),
    ([1, *PICTURE, 7], np.zeros((4, 6)), r"\(4, 6\); its ids need \(4, 8\)"),
    ([1, *PICTURE[:-2], EOI], np.zeros((3, 8)), "after 3 of its 4 codes"),
  ],
)
def test_prompts_of_broken_pictures_are_refused(sampler, prompt, latents, said):
  values = None if latents is None else latents.astype(np.float32)
  with pytest.raises(UserError, match=said):
    begin(sampler, [prompt], latents=[values])
