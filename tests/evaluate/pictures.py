"""A few captioned pictures, and a scorer whose likelihoods are written down."""

import functools

import numpy as np

from fusionlab.batch import Vocabulary
from fusionlab.data.documents import Counts, Record
from fusionlab.data.preparation import Prepared
from fusionlab.evaluate.captioned import Captioned
from fusionlab.objectives.diffusion import (
  NextTokenDiffusion,
  NextTokenDiffusionConfig,
)
from tests.models import pictures as continuous

VOCABULARY = Vocabulary(("text", "image"), (40, 10))
CONTINUOUS, GRID = continuous.VOCABULARY, continuous.GRID


class FakePrepared(Prepared):
  """A prepared source from lists of parts: (modality, alternatives)."""

  def __init__(self, **splits):
    self.splits = tuple(splits)
    self._records = {
      split: [record(f"{split}{n}", parts) for n, parts in enumerate(documents)]
      for split, documents in splits.items()
    }

  def records(self, split):
    return self._records[split]

  def counts(self, split):
    records = self._records[split]
    none = np.zeros(0, np.int32)
    return Counts(
      parts=np.array([len(r.part_modality) for r in records], np.int32),
      part_modality=np.concatenate([none, *(r.part_modality for r in records)]),
      part_alternatives=np.concatenate(
        [none, *(r.part_alternatives for r in records)]
      ),
      lengths=np.concatenate([none, *(r.lengths for r in records)]),
    )


def record(key, parts, **latents):
  alternatives = [ids for _, several in parts for ids in several]
  return Record(
    key=key,
    part_modality=np.array([m for m, _ in parts], np.int32),
    part_alternatives=np.array([len(a) for _, a in parts], np.int32),
    lengths=np.array([len(ids) for ids in alternatives], np.int32),
    ids=np.concatenate([np.array(ids, np.int32) for ids in alternatives]),
    **latents,
  )


def captioned(number):
  """Examples whose caption is [10 + n] and whose codes are 40 + digits of n."""
  return [
    Captioned(
      source="fake",
      index=n,
      key=str(n),
      modality=1,
      caption=np.array([10 + n], np.int32),
      codes=np.array([40 + n // 10, 40 + n % 10], np.int32),
    )
    for n in range(number)
  ]


def painted(number, vocabulary=CONTINUOUS):
  """Examples whose caption is [10 + n], with n random continuous pictures."""
  rng = np.random.default_rng(0)
  grid = vocabulary.grid(1)
  size = (number, grid.positions, grid.dim)
  return [
    Captioned(
      source="fake",
      index=n,
      key=str(n),
      modality=1,
      caption=np.array([10 + n], np.int32),
      codes=np.full(grid.positions, vocabulary.offset(1), np.int32),
      latents=latents,
    )
    for n, latents in enumerate(rng.normal(size=size).astype(np.float32))
  ]


@functools.cache
def transfusion(**settings):
  """A tiny Transfusion with towers, its parameters and its objective."""
  model, params = continuous.make(num_layers=1, **settings)
  objective = NextTokenDiffusion(
    NextTokenDiffusionConfig(), CONTINUOUS, np.ones(24, np.int32)
  )
  return model, params, objective


class FakeScorer:
  """log p of a document's span is `rule(given, wanted)`, put on its first id."""

  vocabulary = VOCABULARY

  def __init__(self, rule):
    self.rule = rule
    self.documents = 0

  def log_probabilities(self, documents, spans, *, latents):
    assert len(latents) == len(documents)
    self.documents += len(documents)
    found = []
    for ids, (start, stop) in zip(documents, spans, strict=True):
      values = np.zeros(stop - start, np.float32)
      values[0] = self.rule(list(ids[:start]), list(ids[start:stop]))
      found.append(values)
    return found
