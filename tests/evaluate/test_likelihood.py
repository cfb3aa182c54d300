"""Scoring ragged documents: the plain softmax's values, however they batch."""

import jax
import numpy as np
import pytest

import fusionlab
from fusionlab.errors import UserError
from fusionlab.evaluate.likelihood import Scorer
from fusionlab.sharding.mesh import MeshConfig, make_mesh
from tests.models import tiny


def documents_of(vocabulary, seed=0):
  """Modalities interleaved at random; one document of one id, one of text."""
  rng = np.random.default_rng(seed)
  mixed = [
    rng.integers(0, vocabulary.size, n).tolist() for n in (22, 30, 19, 27)
  ]
  return [*mixed, [1], rng.integers(0, vocabulary.sizes[0], 40).tolist()]


def plain(model, params, documents):
  """Log-softmax [documents, L, V] of all logits at once."""
  batch = fusionlab.batch_of_ids(
    documents,
    model.vocabulary,
    towers=model.config.routed_towers.of_modality,
  )
  hidden = tiny.apply(model, params, batch)
  return np.asarray(jax.nn.log_softmax(model.logits(params, hidden)))


def expected(table, documents):
  return [
    table[row, np.arange(len(ids) - 1), ids[1:]]
    for row, ids in enumerate(documents)
  ]


def same(found, wanted, atol=1e-4):
  assert [len(f) for f in found] == [len(w) for w in wanted]
  np.testing.assert_allclose(
    np.concatenate(found), np.concatenate(wanted), atol=atol, rtol=0
  )


@pytest.mark.parametrize(
  ("modalities", "changes"),
  [
    (1, {}),
    (2, {}),
    (2, {"untie": ""}),
    (3, {}),
    (3, {"towers": (0, 1, 1)}),
    (2, {"tie_embeddings": True, "vocab_size": 96}),
  ],
)
def test_equals_the_plain_softmax(modalities, changes):
  """One, two and three modalities, with towers and dense."""
  model, params = tiny.make(modalities, **changes)
  documents = documents_of(model.vocabulary)
  found = Scorer(model, params).log_probabilities(documents)
  assert all(f.dtype == np.float32 for f in found)
  same(found, expected(plain(model, params, documents), documents))


@pytest.mark.smoke
def test_does_not_depend_on_the_batching():
  """Alone, in another order and in batches of few rows: the same values."""
  model, params = tiny.make(2)
  documents = documents_of(model.vocabulary)
  scorer = Scorer(model, params)
  together = scorer.log_probabilities(documents)
  alone = [scorer.log_probabilities([ids])[0] for ids in documents]
  order = np.random.default_rng(1).permutation(len(documents))
  mixed = Scorer(model, params, batch_tokens=64).log_probabilities(
    [documents[i] for i in order]
  )
  same(alone, together, 1e-5)
  same([mixed[i] for i in np.argsort(order)], together, 1e-5)


def test_spans_are_parts_of_the_whole():
  """A span's values are the whole document's at these tokens."""
  model, params = tiny.make(2)
  documents = [d for d in documents_of(model.vocabulary) if len(d) > 2]
  spans = [(1 + len(d) // 3, len(d) - n % 2) for n, d in enumerate(documents)]
  scorer = Scorer(model, params)
  whole = scorer.log_probabilities(documents)
  parts = scorer.log_probabilities(documents, spans)
  wanted = [w[a - 1 : b - 1] for w, (a, b) in zip(whole, spans, strict=True)]
  same(parts, wanted, 1e-5)


def test_long_rows_go_through_the_logits_in_pieces(monkeypatch):
  """Chunks of positions, the last one shorter, change nothing."""
  model, params = tiny.make(2)
  documents = documents_of(model.vocabulary)
  whole = Scorer(model, params).log_probabilities(documents)
  monkeypatch.setattr("fusionlab.evaluate.likelihood._LOGITS", 1)
  monkeypatch.setattr("fusionlab.evaluate.likelihood._POSITIONS", 7)
  same(Scorer(model, params).log_probabilities(documents), whole, 1e-5)


def test_score_sums_and_knows_the_greedy_continuation():
  """The likeliest next ids are greedy; with one other id they are not."""
  model, params = tiny.make(2)
  prompts = [d for d in documents_of(model.vocabulary) if len(d) > 1][:4]
  best = plain(model, params, prompts).argmax(-1)
  greedy = [[int(best[i, len(p) - 1])] for i, p in enumerate(prompts)]
  other = [[(ids[0] + 1) % model.vocabulary.size] for ids in greedy]
  scorer = Scorer(model, params)
  assert scorer.score(prompts, greedy).greedy.tolist() == [True] * 4
  assert scorer.score(prompts, other).greedy.tolist() == [False] * 4
  longer = [[*a, *b] for a, b in zip(greedy, other, strict=True)]
  scores = scorer.score(prompts, longer)
  assert not scores.greedy.any()
  documents = [[*p, *c] for p, c in zip(prompts, longer, strict=True)]
  values = expected(plain(model, params, documents), documents)
  np.testing.assert_allclose(
    scores.log_probability, [v[-2:].sum() for v in values], atol=1e-4
  )
  empty = scorer.score(prompts, [[]] * 4)
  assert (empty.log_probability == 0).all()
  assert empty.greedy.all()


def test_alike_documents_share_a_program():
  """Captions of 1 to 13 ids and a picture: one program, however many."""
  model, params = tiny.make(2)
  rng = np.random.default_rng(0)
  documents = [
    [
      1,
      *rng.integers(5, 40, n % 13 + 1).tolist(),
      3,
      *rng.integers(40, 80, 16).tolist(),
      4,
    ]
    for n in range(16)
  ]
  scorer = Scorer(model, params)
  for number in (16, 9, 12):
    scorer.log_probabilities(documents[:number])
  assert scorer._step._cache_size() == 1


def test_rows_are_split_over_a_mesh():
  """Eight devices give what one gives."""
  model, params = tiny.make(2)
  documents = documents_of(model.vocabulary)
  one = Scorer(model, params).log_probabilities(documents)
  many = Scorer(model, params, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
  same(many.log_probabilities(documents), one, 1e-5)


@pytest.mark.parametrize(
  ("documents", "spans", "message"),
  [
    ([[]], None, "document 0 of shape"),
    ([[1], [1, 2]], [(1, 1), (0, 2)], "document 1 .* token 0 to 2"),
    ([[1, 2]], [(1, 3)], "token 1 to 3"),
    ([[1, 80]], None, "ids from 1 to 80; the vocabulary has 0 to 79"),
    ([[1, 2]], [], "1 documents and 0 spans"),
  ],
)
def test_mistakes_are_named(documents, spans, message):
  """Which document, what is allowed."""
  model, params = tiny.make(2)
  with pytest.raises(UserError, match=message):
    Scorer(model, params).log_probabilities(documents, spans)


def test_prompts_and_continuations_come_in_pairs():
  model, params = tiny.make(2)
  with pytest.raises(UserError, match="2 prompts and 1 continuations"):
    Scorer(model, params).score([[1], [1]], [[2]])
