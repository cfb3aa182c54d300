"""Rows: their rules, their randomness, cutting back, copying, guidance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.batch import batch_of_ids
from fusionlab.errors import UserError
from fusionlab.generation import program
from fusionlab.generation.config import Sampling
from fusionlab.generation.rows import EOS, FULL, STOP, fork, rollback
from fusionlab.generation.sampler import Sampler
from tests.generation.tiny import BLOCKS, TWO, keys_of, make

FREE = Sampling(temperature=1.0, top_k=0)
PROMPTS = [[1, 7, 8], [1, 9, 10, 11, 12, 3, 30], [1], [1, 3, 31, 32, 33, 34, 4]]


@pytest.fixture(scope="module")
def tiny():
  return make()


def sampler_for(tiny, sampling=FREE, **options):
  options = {"may_open": (1,)} | options
  return Sampler(*tiny, BLOCKS, sampling=sampling, **options)


def run(sampler, prompts=PROMPTS, steps=30, **options):
  options = {"max_new": 30, "length": 40} | options
  state = sampler.begin(prompts, keys_of(len(prompts)), **options)
  return sampler.advance(state, steps)


def rows(state):
  tokens, length = jax.device_get((state.tokens, state.length))
  return [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]


def never(token):
  """A processor that rules an id out."""

  def processor(logits, state):
    del state
    return logits.at[:, token].set(-jnp.inf)

  return processor


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_sampled_obeys_the_rules(tiny, guidance):
  """Blocks of exactly their codes, closed, none torn, whatever is drawn."""
  sampling = dataclasses.replace(FREE, guidance=guidance)
  state = run(sampler_for(tiny, sampling), PROMPTS * 8, steps=40)
  blocks = 0
  for ids in rows(state):
    BLOCKS.check(ids)
    assert ids.count(3) == ids.count(4)
    blocks += ids.count(3)
    assert not {0, 1} & set(ids[1:])
  assert blocks > 20


def whole(ids):
  """A document alone in a row whose shapes hold any of these tests."""
  # Padding takes the places that are left.
  return batch_of_ids([ids], TWO, towers=(0, 1), row_length=64, counts=(40, 24))


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model, params, batch, length):
  """Logits `[1, V]` after the last id, compiled once for all lengths."""
  hidden = model.apply({"params": params}, batch)[:, length - 1]
  return model.logits(params, hidden)


@jax.jit
def restricted(logits, ids, length):
  """Logits `[1, V]` with what may not follow ruled out."""
  opened, inside = BLOCKS.where(ids[None], length[None])
  return BLOCKS.restrict(
    logits, opened, inside, room=jnp.array([100]), may_open=(1,)
  )


def greedy_by_recomputing(tiny, prompt, number):
  """The likeliest allowed id, from the whole document, every time."""
  ids = list(prompt)
  for _ in range(number):
    length = jnp.array(len(ids))
    padded = jnp.array(ids + [0] * (64 - len(ids)))
    logits = last_logits(*tiny, whole(ids), length)
    ids.append(int(restricted(logits, padded, length)[0].argmax()))
    if ids[-1] == TWO.eos:
      break
  return ids


def test_greedy_is_what_recomputing_gives_in_any_batch(tiny):
  greedy = sampler_for(tiny, Sampling(temperature=0.0))
  together = rows(run(greedy, steps=12))
  for prompt, ids in zip(PROMPTS, together, strict=True):
    assert ids == greedy_by_recomputing(tiny, prompt, len(ids) - len(prompt))
    assert rows(run(greedy, [prompt], steps=12)) == [ids]


def test_a_row_does_not_depend_on_its_neighbours(tiny):
  """Its key and prompt give the same draws alone and in a batch."""
  sampler = sampler_for(tiny)
  together = rows(run(sampler))
  state = sampler.begin(PROMPTS[1:2], keys_of(4)[1:2], max_new=30, length=40)
  assert rows(sampler.advance(state, 30)) == together[1:2]


def test_steps_may_be_taken_in_any_pieces(tiny):
  sampler = sampler_for(tiny)
  state = sampler.begin(PROMPTS, keys_of(4), max_new=30, length=40)
  for steps in (1, 2, 11, 16):
    state = sampler.advance(state, steps)
  assert rows(state) == rows(run(sampler))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cutting_back_restores_what_would_have_come(tiny, guidance):
  """Ids, cache and randomness: row by row another number of ids."""
  sampling = dataclasses.replace(FREE, guidance=guidance)
  sampler = sampler_for(tiny, sampling, processors=(never(2),))
  straight = rows(run(sampler))
  state = run(sampler)
  back = rollback(state, jnp.array([20, 3, 0, 30]))
  assert [len(r) for r in rows(back)] == [13, 34, 31, 7]
  assert rows(sampler.advance(back, 30)) == straight


def test_copies_go_on_as_their_row_does(tiny):
  sampler = sampler_for(tiny, processors=(never(2),))
  half = run(sampler, steps=10)
  three = fork(half, np.array([2, 0, 0]))
  straight = rows(run(sampler))
  assert rows(sampler.advance(three, 20)) == [straight[i] for i in (2, 0, 0)]
  half = run(sampler, steps=10)
  other = dataclasses.replace(
    fork(half, np.array([0, 0])), keys=keys_of(2, seed=1)
  )
  one, two = rows(sampler.advance(other, 20))
  assert one != two and one[:13] == two[:13] == straight[0][:13]


def test_copies_of_guided_rows_take_their_bare_rows_along(tiny):
  sampler = sampler_for(
    tiny, dataclasses.replace(FREE, guidance=3.0), processors=(never(2),)
  )
  straight = rows(run(sampler))
  forked = fork(run(sampler, steps=9), np.array([3, 1]))
  assert rows(sampler.advance(forked, 21)) == [straight[3], straight[1]]


def test_guidance_is_what_two_documents_give(tiny):
  """c + (w - 1)(c - u), u from <bos> and the block alone, at every code."""
  seen = []

  def record(logits, state):
    jax.debug.callback(
      lambda x, t, n: seen.append((np.array(x), np.array(t), int(n[0]))),
      logits,
      state.tokens,
      state.length,
      ordered=True,
    )
    return logits

  sampling = Sampling(temperature=0.0, guidance=3.0)
  sampler = sampler_for(tiny, sampling, processors=(record,))
  run(sampler, [[1, 7, 8, 3]], steps=5)
  jax.effects_barrier()
  for logits, tokens, length in seen:
    ids = tokens[0, :length].tolist()
    both = [ids, [1, *ids[ids.index(3) :]]]
    c, u = (last_logits(*tiny, whole(d), jnp.array(len(d))) for d in both)
    np.testing.assert_allclose(logits, c + 2 * (c - u), rtol=1e-3, atol=1e-3)
  assert len(seen) == 5


def test_guidance_of_one_equals_none(tiny):
  """Also where the bare rows are run: a weight of 1 takes them away."""
  plain = sampler_for(tiny)
  guided = sampler_for(tiny, dataclasses.replace(FREE, guidance=2.0))
  guided._values["guidance"] = jnp.float32(1.0)
  assert rows(run(guided)) == rows(run(plain))


def test_another_temperature_compiles_nothing(tiny):
  run(sampler_for(tiny, Sampling(temperature=0.5, top_k=3)))
  before = program.advance._cache_size()
  run(sampler_for(tiny, Sampling(temperature=0.9, top_k=3)))
  assert program.advance._cache_size() == before


def test_rows_end_at_eos_a_stop_id_or_their_limit(tiny):
  def force(token, at):
    def processor(logits, state):
      now = (state.length == at)[:, None]
      wanted = jnp.arange(logits.shape[1]) == token
      return jnp.where(now & wanted, 100.0, jnp.where(wanted, -100.0, logits))

    return processor

  sampler = sampler_for(
    tiny,
    may_open=(),
    stop_ids=(20,),
    processors=(force(2, 6), force(20, 9)),
  )
  state = run(sampler, [[1, 7, 8], [1, 7, 8, 9, 7, 8, 9], [1] + [7] * 9])
  assert state.finished.tolist() == [EOS, STOP, FULL]
  assert state.length.tolist() == [7, 10, 40]


def test_the_repetition_penalty_leaves_codes_alone(tiny):
  """Text that occurred becomes unlikely; a block may repeat a code."""
  seen = []

  def record(logits, state):
    jax.debug.callback(lambda x: seen.append(np.array(x)), logits)
    return logits

  sampling = Sampling(temperature=0.0, repetition_penalty=50.0)
  for s in (sampling, Sampling(temperature=0.0)):
    run(
      sampler_for(tiny, s, processors=(record,)),
      [[1, 7, 3, 30, 31, 32, 33, 4]],
      steps=1,
    )
  jax.effects_barrier()
  penalised, plain = seen[0][0], seen[1][0]
  changed = np.flatnonzero(penalised != plain)
  assert changed.tolist() == [7]
  assert penalised[7] < plain[7]


@pytest.mark.parametrize(
  ("prompts", "options", "said"),
  [
    ([[]], {}, "prompts of .0. tokens"),
    ([[1] * 40], {}, "each needs 1 to 39"),
    ([[1, 30]], {}, "outside of a block"),
    ([[1, 7, 3]], {"max_new": 4}, "needs 5 more ids; max_new_tokens=4"),
  ],
)
def test_prompts_that_cannot_go_on_are_refused(tiny, prompts, options, said):
  with pytest.raises(UserError, match=said):
    run(sampler_for(tiny), prompts, **options)
