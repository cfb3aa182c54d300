"""Where a row stands, and what may follow, against a plain reading of the ids."""

import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.generation.blocks import Blocks
from tests.generation.tiny import ALONE, BLOCKS, THREE, TWO, document

RULES = {"two": BLOCKS, "three": Blocks(THREE, (0, 4, 2))}


def read(blocks, ids):
  """Open modality and ids inside, one id after the other."""
  opened = inside = 0
  for i in ids:
    if opened and i == blocks.vocabulary.end[opened]:
      opened = inside = 0
    elif not opened and i in blocks.vocabulary.begin[1:]:
      opened, inside = blocks.vocabulary.begin.index(i, 1), 1
    elif opened:
      inside += 1
  return opened, inside


@pytest.mark.parametrize("name", RULES)
def test_where_a_row_stands_follows_from_its_ids(name):
  blocks = RULES[name]
  rng = np.random.default_rng(0)
  ids = [blocks.vocabulary.bos]
  for _ in range(6):
    m = int(rng.integers(1, len(blocks.lengths)))
    v = blocks.vocabulary
    codes = rng.integers(v.offset(m), v.ends[m], blocks.lengths[m]).tolist()
    ids += [7, v.begin[m], *codes, v.end[m]]
  tokens = np.tile(np.array(ids, np.int32), (len(ids), 1))
  opened, inside = blocks.where(
    jnp.asarray(tokens), jnp.arange(1, len(ids) + 1)
  )
  expected = [read(blocks, ids[: n + 1]) for n in range(len(ids))]
  assert list(zip(opened.tolist(), inside.tolist(), strict=True)) == expected


def allowed(blocks, ids, *, room=100, may_open=(1,)):
  tokens = jnp.asarray(np.array([ids], np.int32))
  opened, inside = blocks.where(tokens, jnp.array([len(ids)]))
  logits = blocks.restrict(
    jnp.zeros((1, blocks.vocabulary.size + 3)),
    opened,
    inside,
    room=jnp.array([room]),
    may_open=may_open,
  )
  return set(np.flatnonzero(np.isfinite(np.asarray(logits[0]))).tolist())


def test_text_alone_may_end_by_the_id_that_begins_it():
  """One id at both ends of documents: it still ends them."""
  assert allowed(Blocks(ALONE, (0,)), [29, 7], may_open=()) == set(range(30))


def test_text_goes_on_as_text_or_opens_a_block_or_ends():
  assert allowed(BLOCKS, [1, 7]) == {TWO.eos, 3, *range(5, 30)}
  assert allowed(BLOCKS, [1, 7], may_open=()) == {TWO.eos, *range(5, 30)}


def test_a_block_has_exactly_its_codes_and_then_its_end():
  codes = set(range(30, 46))
  assert allowed(BLOCKS, [1, 7, 3]) == codes
  assert allowed(BLOCKS, [1, 7, 3, 30, 31, 32]) == codes
  assert allowed(BLOCKS, [1, 7, 3, 30, 31, 32, 33]) == {4}
  assert allowed(BLOCKS, [1, 3, 30, 31, 32, 33, 4]) == {2, 3, *range(5, 30)}


def test_a_block_that_would_not_fit_is_not_opened():
  assert 3 in allowed(BLOCKS, [1, 7], room=6)
  assert 3 not in allowed(BLOCKS, [1, 7], room=5)


@pytest.mark.parametrize(
  ("ids", "said"),
  [
    ([1, 46], "not in 0..45"),
    ([1, 30], "stands outside of a block"),
    ([1, 3, 30, 31, 4], "ends at position 4 after 2 of its 4 codes"),
    ([1, 3, 30, 31, 32, 33, 7], "where the end of a image block"),
  ],
)
def test_broken_prompts_are_refused(ids, said):
  with pytest.raises(UserError, match=said):
    BLOCKS.check(ids)


def test_whole_and_open_documents_pass():
  ids = document(np.random.default_rng(0))
  for n in range(1, len(ids)):
    BLOCKS.check(ids[:n])
