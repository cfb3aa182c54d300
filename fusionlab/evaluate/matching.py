"""Captions and pictures that belong together, found by likelihood.

Retrieval among 32: which picture of a group goes with a caption, and which
caption with a picture. The score of a pair is the pointwise mutual information

    PMI(c, x) = log p(x | c) - log p(x)       (caption to picture)
    PMI(c, x) = log p(c | x) - log p(c)       (picture to caption)

Where one candidate is drawn from p(x | c) and the others from p(x), as a group
is, Bayes' rule gives each candidate the posterior p(x | c) / p(x), up to a
factor that all share: PMI is the best rule there is for a model whose
probabilities are right. The likelihood alone prefers pictures that are likely
under any caption; it is reported beside. An ideal model has the same matrix both
ways; here the two ways ask for different abilities, drawing and naming.

Of a continuous picture minus the denoising error stands for log p(x | c) and
log p(x), both with the same noise (`fusionlab.evaluate.denoising`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError
from fusionlab.evaluate.captioned import (
  Captioned,
  Document,
  caption_after_picture,
  caption_alone,
  picture_after_caption,
)

GROUP = 32
CAPTION_TO_PICTURE = "caption_to_image"
PICTURE_TO_CAPTION = "image_to_caption"


@dataclasses.dataclass(frozen=True)
class Matching:
  """Hits of every example as a query.

  Attributes:
    hits: `caption_to_image` and `image_to_caption` by PMI, and the same by
      likelihood alone with `/likelihood` behind; each bool, one an example.
    chance: what guessing hits: 1 / candidates.
    examples: the queries, in the order of the hits.
    answers: per kind of hit, the index in `examples` of the candidate that was
      taken.
  """

  hits: dict[str, Bool[np.ndarray, " n"]]
  chance: float
  examples: list[Captioned]
  answers: dict[str, Int[np.ndarray, " n"]]


def match(
  scorer: Any, examples: Sequence[Captioned], *, group: int = GROUP
) -> Matching:
  """Retrieves every example's picture by its caption, and the other way round.

  Consecutive examples make groups. The last group is filled up with examples
  before it, as candidates only, so that chance is the same for all; fewer
  examples than a group make one group of what there is. A group of 32 is 2,048
  documents.

  Args:
    scorer: a `fusionlab.evaluate.likelihood.Scorer`.
    examples: in random order, captions and pictures all different
      (`captioned.distinct`).
    group: candidates of a query.

  Raises:
    UserError: fewer than 2 examples or candidates.
  """
  group = min(group, len(examples))
  if group < 2:
    raise UserError(
      f"matching {len(examples)} captioned pictures in groups of {group} has no"
      f" wrong answer; give at least 2 examples and groups of 2"
    )
  vocabulary = scorer.vocabulary
  pictures = document_scores(
    scorer, [picture_after_caption(None, e, vocabulary) for e in examples]
  )
  captions = document_scores(
    scorer, [caption_alone(e, vocabulary) for e in examples]
  )
  answers: dict[str, list[np.ndarray]] = {}
  hits: dict[str, list[np.ndarray]] = {}
  for start in range(0, len(examples), group):
    # Members' own places in the group are those from `new` on.
    begin = min(start, len(examples) - group)
    members, new = np.arange(begin, begin + group), start - begin
    chosen = examples[begin : begin + group]
    for name, documents, alone in (
      (CAPTION_TO_PICTURE, _pictures_of, pictures),
      (PICTURE_TO_CAPTION, _captions_of, captions),
    ):
      scores = _matrix(scorer, chosen, documents, vocabulary)
      for kind, matrix in (
        (name, scores - alone[members]),
        (f"{name}/likelihood", scores),
      ):
        answers.setdefault(kind, []).append(members[matrix.argmax(1)][new:])
        hits.setdefault(kind, []).append(diagonal_wins(matrix)[new:])
  return Matching(
    hits={kind: np.concatenate(parts) for kind, parts in hits.items()},
    chance=1 / group,
    examples=list(examples),
    answers={kind: np.concatenate(parts) for kind, parts in answers.items()},
  )


def diagonal_wins(
  matrix: Float[np.ndarray, "n n"],
) -> Bool[np.ndarray, " n"]:
  """Whether each row's own column is above all others; a tie is no hit.

  Args:
    matrix: scores, a query a row and a candidate a column.
  """
  others = np.where(np.eye(len(matrix), dtype=bool), -np.inf, matrix)
  return matrix.diagonal() > others.max(1)


def _pictures_of(
  query: Captioned, candidate: Captioned, vocabulary: Vocabulary
) -> Document:
  return picture_after_caption(query, candidate, vocabulary)


def _captions_of(
  query: Captioned, candidate: Captioned, vocabulary: Vocabulary
) -> Document:
  return caption_after_picture(candidate, query, vocabulary)


def _matrix(
  scorer: Any,
  chosen: Sequence[Captioned],
  document: Callable[[Captioned, Captioned, Vocabulary], Document],
  vocabulary: Vocabulary,
) -> Float[np.ndarray, "n n"]:
  """Scores log p(candidate | query), a query a row."""
  pairs = [document(q, c, vocabulary) for q in chosen for c in chosen]
  return document_scores(scorer, pairs).reshape(len(chosen), len(chosen))


def document_scores(
  scorer: Any, documents: Sequence[Document]
) -> Float[np.ndarray, " n"]:
  """Sums log p over each document's span.

  Args:
    scorer: a `fusionlab.evaluate.likelihood.Scorer`.
    documents: see `fusionlab.evaluate.captioned`.

  Returns:
    float64, nats where the span is of ids; of patches minus their denoising
    errors.
  """
  values = scorer.log_probabilities(
    [d.ids for d in documents],
    [d.span for d in documents],
    latents=[d.latents for d in documents],
  )
  return np.array([v.sum(dtype=np.float64) for v in values])
