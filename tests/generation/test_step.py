"""A step with a cache is the model: same numbers, fewer bytes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.batch import batch_of_ids
from fusionlab.routing import make_layout
from tests.generation.tiny import THREE, TWO, document, make
from tests.models.tiny import apply

VARIANTS = {
  "mot": {},
  "grouped queries": {"num_kv_heads": 2},
  "pre-norm": {"norm_placement": "pre"},
  "dense": {"untie": ""},
  "ffn alone": {"untie": "ffn"},
  "tied table, no qk norm": {"tie_embeddings": True, "qk_norm": "none"},
  "shared tower": {"vocabulary": THREE, "towers": (0, 1, 1)},
  "three towers": {"vocabulary": THREE},
}


def recomputed(model, params, documents):
  """Hidden states of whole documents, `[B, L, d]`."""
  towers = model.config.routed_towers.of_modality
  batch = batch_of_ids(documents, model.vocabulary, towers=towers)
  return np.asarray(apply(model, params, batch))


@functools.partial(jax.jit, static_argnums=0, static_argnames="layers")
def step(model, *arguments, **options):
  """`model.step`, compiled once for equal models and shapes."""
  return model.step(*arguments, **options)


def feed(model, params, cache, rows, start, **options):
  """Runs ragged new ids; returns their hidden states and the cache."""
  width = max(map(len, rows))
  tokens = np.zeros((len(rows), width), np.int32)
  for row, ids in enumerate(rows):
    tokens[row, : len(ids)] = ids
  return step(
    model,
    params,
    tokens,
    cache,
    start=np.asarray(start, np.int32),
    fresh=np.array([len(ids) for ids in rows], np.int32),
    **options,
  )


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_recomputed_at_every_step(name):
  """Ragged prompts by layout, then a token at a time, then a draft of five."""
  settings = dict(VARIANTS[name])
  vocabulary = settings.pop("vocabulary", TWO)
  model, params = make(vocabulary, **settings)
  rng = np.random.default_rng(0)
  documents = [document(rng, vocabulary)[:24] for _ in range(3)]
  expected = recomputed(model, params, documents)
  weights = model.decoding_params(params)
  cache = model.init_cache(3, 24)
  lengths = np.array([3, 11, 7])
  prompts = [ids[:n] for ids, n in zip(documents, lengths, strict=True)]
  towers = model.config.routed_towers
  layout = None
  if towers.count > 1:
    real = np.arange(11) < lengths[:, None]
    padded = np.zeros((3, 11), np.int32)
    for row, ids in enumerate(prompts):
      padded[row, : len(ids)] = ids
    modality = np.where(real, vocabulary.modality_of(padded), 0)
    tower = np.asarray(towers.of_modality)[modality]
    counts = [int((real & (tower == k)).sum()) for k in range(towers.count)]
    counts[0] = 33 - sum(counts[1:])
    layout = make_layout(
      modality, real, towers=towers.of_modality, counts=counts, group_rows=3
    )
  done = feed(model, weights, cache, prompts, [0, 0, 0], layout=layout)
  for row, n in enumerate(lengths):
    close(done.hidden[row, :n], expected[row, :n])
  at = lengths.copy()
  for _ in range(8):
    new = [ids[n : n + 1] for ids, n in zip(documents, at, strict=True)]
    done = feed(model, weights, done.cache, new, at)
    for row in range(3):
      close(done.hidden[row, 0], expected[row, at[row]])
    at = at + 1
  draft = [ids[n : n + 5] for ids, n in zip(documents, at, strict=True)]
  done = feed(model, weights, done.cache, draft, at)
  for row in range(3):
    close(done.hidden[row], expected[row, at[row] : at[row] + 5])


def test_rows_without_a_new_token_change_nothing():
  model, params = make()
  weights = model.decoding_params(params)
  ids = document(np.random.default_rng(0))[:8]
  one = feed(model, weights, model.init_cache(2, 16), [ids, ids], [0, 0])
  two = feed(model, weights, one.cache, [[7], []], [8, 8])
  for before, after in zip(
    jax.tree.leaves(one.cache), jax.tree.leaves(two.cache), strict=True
  ):
    np.testing.assert_array_equal(before[1], after[1])


def test_forgetting_is_a_smaller_start():
  """After another continuation, the cache up to `start` gives the same."""
  model, params = make()
  weights = model.decoding_params(params)
  rng = np.random.default_rng(0)
  ids, other = document(rng)[:20], document(rng)[:20]
  cache = model.init_cache(1, 24)
  prompt = feed(model, weights, cache, [ids[:8]], [0])
  straight = feed(model, weights, prompt.cache, [ids[8:12]], [8])
  astray = feed(model, weights, prompt.cache, [other[8:20]], [8])
  back = feed(model, weights, astray.cache, [ids[8:12]], [8])
  np.testing.assert_array_equal(straight.hidden, back.hidden)


def test_chosen_layers_are_the_streams_after_them():
  """The last one, normed, is the hidden state; they do not change it."""
  model, params = make()
  weights = model.decoding_params(params)
  ids = document(np.random.default_rng(0))[:8]
  plain = feed(model, weights, model.init_cache(1, 8), [ids], [0])
  both = feed(model, weights, model.init_cache(1, 8), [ids], [0], layers=(0, 1))
  np.testing.assert_array_equal(plain.hidden, both.hidden)
  assert plain.chosen == () and len(both.chosen) == 2
  scale = weights["final_norm"]
  tower = model.vocabulary.modality_of(np.array(ids))
  stream = np.asarray(both.chosen[1])[0]
  unit = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-5)
  scales = np.stack([scale["text"]["scale"], scale["image"]["scale"]])
  close(unit * scales[tower], both.hidden[0])


def bytes_of_branches(compiled):
  """Bytes that each branch of the program's conditionals is handed, in all."""
  text = compiled.as_text()
  size = {}
  for name, shapes in re.findall(r"(%\S+) = \((.*?)\) tuple\(", text):
    found = re.findall(r"f32\[([\d,]*)\]", shapes)
    size[name] = sum(4 * math.prod(map(int, s.split(","))) for s in found if s)
  branches = re.findall(r"conditional\(%\S+, (%\S+), (%\S+), (%\S+)\)", text)
  return np.sum([[size[name] for name in each] for each in branches], axis=0)


@pytest.mark.usefixtures("optimized")
def test_a_step_reads_only_the_towers_that_occur():
  """Branches: text alone, image alone, both. One tower is the dense model's bytes."""
  sizes = {"dim": 128, "ffn_dim": 512}
  model, params = make(**sizes)
  weights = model.decoding_params(params)
  cache = model.init_cache(2, 16)
  one = jnp.ones(2, jnp.int32)

  def compiled(model, weights):
    step = jax.jit(
      lambda w, c: model.step(w, one[:, None], c, start=one * 0, fresh=one)
    )
    return step.lower(weights, cache).compile()

  program = compiled(model, weights)
  dense, dense_params = make(untie="", **sizes)
  alone = dense.decoding_params(dense_params)
  tower = sum(x.nbytes for x in jax.tree.leaves(alone["layers"]))
  text, image, both = bytes_of_branches(program)
  # Besides its matrices a branch is handed the stream, a few kilobytes.
  assert text == image
  assert tower <= text < 1.1 * tower
  assert 2 * tower <= both < 2.1 * tower
  # The compiler's own count takes each conditional's dearest branch.
  total, base = (
    c.cost_analysis()["bytes accessed"]
    for c in (program, compiled(dense, alone))
  )
  assert total > base + 0.9 * tower


def test_the_towers_are_chosen_when_it_runs():
  """One program with a branch for each set of towers serves any ids."""
  model, params = make()
  weights = model.decoding_params(params)
  traces = []

  @jax.jit
  def step(tokens, cache):
    traces.append(1)
    one = jnp.ones(2, jnp.int32)
    return model.step(weights, tokens, cache, start=one * 0, fresh=one)

  for ids in ([7, 8], [31, 32], [7, 31]):
    tokens = np.array(ids, np.int32)[:, None]
    got = step(tokens, model.init_cache(2, 8))
    expected = recomputed(model, params, [[i] for i in ids])
    close(got.hidden, expected)
  assert len(traces) == 1
