"""Puts sources, preparation, plan and loaders together: `open_data`."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from fusionlab.batch import Vocabulary
from fusionlab.data import documents as docs
from fusionlab.data.documents import Chances
from fusionlab.data.loader import Loader, Rows
from fusionlab.data.plan import Stream, check_fit, layout_counts
from fusionlab.data.preparation import Prepared, prepare
from fusionlab.data.sources import load_source
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.tokenizers import Tokenizers
from fusionlab.towers import tower_names

TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads.

  Attributes:
    vocabulary: the shared vocabulary.
    token_bytes: int32 [vocabulary], bytes of text that each id stands for; 0
      for special ids and other modalities.
    layout_counts: places of each modality in a group.
    train: the endless mixture.
    heldout: per held-out split, one pass in stored order: captions first, in
      their first language, none dropped.
    uncaptioned: per held-out split with captioned pictures, the same pictures
      without their captions.
    prepared: the sources' prepared datasets, by name.
  """

  vocabulary: Vocabulary
  token_bytes: Int[np.ndarray, " V"]
  layout_counts: tuple[int, ...]
  train: Loader
  heldout: dict[str, Loader]
  uncaptioned: dict[str, Loader]
  prepared: dict[str, Prepared]


def cache_folder(cache_dir: str) -> Path:
  """The cache: `cache_dir`, else $FUSIONLAB_CACHE, else ~/.cache/fusionlab."""
  chosen = cache_dir or os.environ.get("FUSIONLAB_CACHE", "")
  return Path(chosen or "~/.cache/fusionlab").expanduser()


def open_data(
  experiment: Experiment,
  tokenizers: Tokenizers,
  *,
  process_index: int = 0,
  process_count: int = 1,
  group_rows: int,
  parts: int = 1,
) -> Data:
  """Prepares the sources where needed and opens the loaders of a run.

  Sources of weight 0 are left alone.

  Args:
    experiment: `data`, `train.batch_size`, `train.seed` and the model's towers
      are read.
    tokenizers: of the run.
    process_index: this process's share of a batch.
    process_count: shares that a batch is read in.
    group_rows: rows of a group (where `config.data.group_rows` is 0, the
      caller's rows per device).
    parts: context-parallel devices that share a row.

  Raises:
    UserError: data that cannot be read or does not fit the rows and the layout,
      and processes that cannot share a batch.
  """
  config = experiment.data
  vocabulary = tokenizers.vocabulary
  modalities = vocabulary.modalities
  if tuple(experiment.model.modalities) != modalities:
    raise UserError(
      f"config.model.modalities={tuple(experiment.model.modalities)} are not the"
      f" tokenizers' {modalities}; set config.model.modalities to those"
    )
  prepared: dict[str, Prepared] = {}
  for name, source in config.sources.items():
    if source.weight > 0:
      prepared[name] = prepare(
        load_source(name, source),
        tokenizers,
        cache_folder(config.cache_dir),
        name=name,
      )
  streams = {
    name: Stream(name, p.counts(TRAIN), config.sources[name].weight)
    for name, p in prepared.items()
    if TRAIN in p.splits
  }
  if not streams:
    raise UserError(
      f"none of the sources {', '.join(prepared)} has a train split; look at"
      f" config.data.sources.<name>.heldout and .split"
    )
  chances = Chances(
    config.image_first, config.caption_drop, config.first_caption
  )
  counts = layout_counts(
    config.layout,
    modalities,
    _expected(list(streams.values()), chances, len(modalities)),
    _units(prepared.values(), len(modalities)),
    row_length=config.row_length,
    group_rows=group_rows,
    align=math.lcm(config.align, parts),
  )
  # Held-out and train differ in the group's shape in nothing, so that one
  # compiled step scores both.
  rows = rows_of(
    experiment,
    counts,
    latent_dim=vocabulary.latent_dim,
    group_rows=group_rows,
    process_index=process_index,
    process_count=process_count,
    parts=parts,
  )

  def loader(
    split: str, streams: Mapping[str, Stream], chances: Chances
  ) -> Loader:
    check_fit(list(streams.values()), modalities, counts, config.row_length)
    return Loader(
      list(streams.values()),
      [prepared[name].records(split) for name in streams],
      vocabulary,
      rows,
      seed=experiment.train.seed,
      chances=chances,
      lookahead=config.lookahead,
      prefetch=config.prefetch,
      one_pass=split != TRAIN,
    )

  heldout, uncaptioned = {}, {}
  for split in sorted(
    {s for p in prepared.values() for s in p.splits} - {TRAIN}
  ):
    of = {
      name: Stream(name, p.counts(split), 1.0)
      for name, p in prepared.items()
      if split in p.splits
    }
    heldout[split] = loader(split, of, Chances())
    pictures = {
      name: Stream(name, s.counts, 1.0, np.flatnonzero(s.counts.captioned))
      for name, s in of.items()
      if s.counts.captioned.any()
    }
    if pictures:
      uncaptioned[split] = loader(split, pictures, Chances(caption_drop=1.0))
  token_bytes = np.zeros(vocabulary.size, np.int32)
  lengths = tokenizers.text.byte_lengths()
  token_bytes[: len(lengths)] = lengths
  return Data(
    vocabulary=vocabulary,
    token_bytes=token_bytes,
    layout_counts=counts,
    train=loader(TRAIN, streams, chances),
    heldout=heldout,
    uncaptioned=uncaptioned,
    prepared=prepared,
  )


def rows_of(
  experiment: Experiment,
  counts: tuple[int, ...],
  *,
  group_rows: int,
  latent_dim: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  parts: int = 1,
) -> Rows:
  """The shape of a run's batches; without towers where nothing is untied.

  Args:
    experiment: its rows, batch and towers.
    counts: places of each modality in a group.
    latent_dim: values of a continuous position.
    group_rows: rows of a group.
    process_index: this process's share of a batch.
    process_count: shares that a batch is read in.
    parts: context-parallel devices that share a row.

  Raises:
    UserError: towers that are not the modalities', or see `Rows`.
  """
  model = experiment.model
  towers = tuple(model.towers)
  tower_names(model.modalities, towers)
  routed = max(towers) > 0 and bool(model.untie.split())
  return Rows(
    row_length=experiment.data.row_length,
    group_rows=group_rows,
    batch_rows=experiment.train.batch_size,
    counts=counts,
    towers=towers if routed else None,
    process_index=process_index,
    process_count=process_count,
    parts=parts,
    latent_dim=latent_dim,
    causal=model.causal,
  )


def _expected(
  streams: Sequence[Stream], chances: Chances, num_modalities: int
) -> Float[np.ndarray, " K"]:
  """Tokens of each modality in an epoch, in expectation over the draws."""
  return sum(
    (
      s.weight * docs.expected_lengths(s.counts, chances, num_modalities)
      for s in streams
    ),
    np.zeros(num_modalities),
  )


def _units(
  prepared: Iterable[Prepared], num_modalities: int
) -> Int[np.ndarray, " K"]:
  """What each modality's tokens come in multiples of; 1 for text."""
  unit = np.ones(num_modalities, np.int64)
  for modality in range(1, num_modalities):
    lengths = [
      c.lengths[np.repeat(c.part_modality, c.part_alternatives) == modality]
      for p in prepared
      if TRAIN in p.splits
      for c in [p.counts(TRAIN)]
    ]
    unit[modality] = max(np.gcd.reduce(np.concatenate(lengths)), 1)
  return unit
