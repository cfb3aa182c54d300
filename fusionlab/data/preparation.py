"""Tokenises a source once, into a TFDS dataset with its token counts beside it.

`<cache>/prepared/<name>-<hash>/` holds the dataset (array_record, written and
read without TensorFlow), `counts.npz` (the shapes of all records, so that
planning reads none) and `manifest.json`, written last, which says what the
folder was made from and holds its checksums. A preparation works in a folder of
its own and moves it into place when it is whole: one that is killed leaves
nothing that is believed, and of two at a time the first to finish is used. Of a
job's processes the first prepares; another does only where its cache is its own.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tensorflow_datasets as tfds

from fusionlab.data.documents import Counts, Record
from fusionlab.data.manifest import (
  COUNTS_ARRAYS,
  FORMAT,
  damaged,
  read_manifest,
  write_manifest,
)
from fusionlab.data.sources import Example, Source
from fusionlab.data.sources.pictures import square
from fusionlab.errors import UserError
from fusionlab.processes import agree, from_first
from fusionlab.tokenizers import Tokenizers

EXAMPLES_AT_ONCE = 128
MEMORY_BYTES = 256 * 2**20
_RECORD_ARRAYS = ("part_modality", "part_alternatives", "lengths", "ids")


class RecordDataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The TFDS dataset of a prepared source: `fusionlab.data.documents.Record`.

  Splits are the source's own. Integers are int32 and ragged; ids are in the
  shared vocabulary. Continuous modalities have float32 values beside them.
  """

  VERSION = tfds.core.Version(f"{FORMAT}.0.0")
  name = "records"

  def __init__(
    self, *, folder: Path, splits: Sequence[str], latent_dim: int, **kwargs: Any
  ):
    """Prepares to write what was spooled to `folder/<split>.spool`."""
    self._folder = folder
    self._splits = splits
    self._latent_dim = latent_dim
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features: dict[str, Any] = {
      name: tfds.features.Tensor(shape=(None,), dtype=np.int32)
      for name in _RECORD_ARRAYS
    }
    if self._latent_dim:
      features["latents"] = tfds.features.Tensor(
        shape=(None, self._latent_dim), dtype=np.float32
      )
    return tfds.core.DatasetInfo(
      builder=self,
      description="Tokenised examples of fusionlab.data.preparation.",
      features=tfds.features.FeaturesDict(
        {"key": tfds.features.Text(), **features}
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    return {split: self._generate_examples(split) for split in self._splits}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    with open(self._folder / f"{split}.spool", "rb") as spool:
      for index in range(2**62):
        try:
          yield index, pickle.load(spool)
        except EOFError:
          return


class Records:
  """Random access to the records of one split.

  A split of less than `MEMORY_BYTES` is kept in memory as it is read.
  """

  def __init__(self, folder: Path, split: str, size_bytes: int):
    """Opens a split.

    Args:
      folder: the prepared folder.
      split: its name.
      size_bytes: bytes of all ids of the split.

    Raises:
      UserError: files that cannot be opened.
    """
    self._folder = folder
    try:
      builder: Any = tfds.builder_from_directory(_dataset_folder(folder))
      self._source = builder.as_data_source(split)
      self._length = len(self._source)
    except Exception as error:  # array_record and TFDS raise kinds of their own
      damaged(folder, f"split {split!r} cannot be opened", error)
    self._memory: dict[int, Record] | None = None
    if size_bytes < MEMORY_BYTES:
      self._memory = {}

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    if self._memory is not None and index in self._memory:
      return self._memory[index]
    try:
      fields = self._source[index]
    except Exception as error:
      damaged(self._folder, f"record {index} cannot be read", error)
    arrays = {n: fields[n] for n in (*_RECORD_ARRAYS, "latents") if n in fields}
    record = Record(key=fields["key"].decode(), **arrays)
    if self._memory is not None:
      self._memory[index] = record
    return record


class Prepared:
  """A prepared source: records at random and the counts of all of them.

  Attributes:
    folder: where it lies.
    manifest: what `manifest.json` says.
    splits: names of the splits, "train" first where there is one.
  """

  def __init__(self, folder: Path):
    """Opens a prepared folder and checks it.

    Raises:
      UserError: a folder that is not whole, or is damaged.
    """
    self.folder = folder
    self.manifest = read_manifest(folder)
    self.splits: tuple[str, ...] = tuple(self.manifest["splits"])
    self._records: dict[str, Records] = {}
    content = (folder / "counts.npz").read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      self._counts = {
        split: Counts(**{n: arrays[f"{split}/{n}"] for n in COUNTS_ARRAYS})
        for split in self.splits
      }

  @property
  def fingerprint(self) -> str:
    """Hash of everything that determined the source's examples."""
    return self.manifest["fingerprint"]

  def counts(self, split: str) -> Counts:
    """The shapes of a split's records."""
    return self._counts[split]

  def records(self, split: str) -> Records:
    """The records of a split, opened when first asked for."""
    if split not in self._records:
      size = 4 * int(self._counts[split].lengths.sum(dtype=np.int64))
      self._records[split] = Records(self.folder, split, size)
    return self._records[split]


def prepare(
  source: Source,
  tokenizers: Tokenizers,
  cache_dir: str | Path,
  *,
  name: str,
) -> Prepared:
  """Opens the prepared form of a source, making it first where it is missing.

  Args:
    source: where examples come from.
    tokenizers: of the run; their hash is part of the folder's.
    cache_dir: root of all prepared datasets.
    name: the source's name in the config.

  Raises:
    UserError: an example the tokenizers cannot take, a source without
      examples, a cache that cannot be written, a prepared folder that was
      damaged, or processes of one job that see other data.
  """
  origin = {
    "format": FORMAT,
    "source": name,
    "fingerprint": source.fingerprint(),
    "tokenizers": tokenizers.hash,
  }
  digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
  root = Path(cache_dir) / "prepared"
  folder = root / f"{name}-{digest.hexdigest()[:12]}"

  def make() -> None:
    if not folder.exists():
      _make(name, source, tokenizers, origin, folder)

  from_first(make)
  if not folder.exists():
    with _alone_on_host(root):
      make()
  prepared = Prepared(folder)
  for key, value in origin.items():
    if prepared.manifest[key] != value:
      damaged(folder, f"its manifest has another {key}")
  # Fingerprints may know the times of files, of which each host has its own.
  counts = prepared.manifest["files"]["counts.npz"]["sha256"]
  agree(
    f"source {name!r}", {"tokenizers": tokenizers.hash, "token counts": counts}
  )
  return prepared


def _make(
  name: str,
  source: Source,
  tokenizers: Tokenizers,
  origin: dict,
  folder: Path,
) -> None:
  """Prepares into a folder of its own, and moves that into place."""
  root = folder.parent
  try:
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=root))
  except OSError as error:
    raise UserError(
      f"cannot write to the cache {root} ({error.strerror}); set"
      f" config.data.cache_dir or FUSIONLAB_CACHE to a folder of yours"
    ) from error
  try:
    _write(name, source, tokenizers, origin, work)
    # Fails where another process finished first; its folder is as good.
    with contextlib.suppress(OSError):
      work.rename(folder)
  finally:
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _alone_on_host(root: Path) -> Iterator[None]:
  """Lets one process of a host at a time prepare; another finds what it made."""
  with contextlib.ExitStack() as stack:
    # Where nothing can be written or locked, preparing says so or does twice.
    with contextlib.suppress(OSError):
      root.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context((root / ".lock").open("a"))
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _write(
  name: str,
  source: Source,
  tokenizers: Tokenizers,
  origin: dict,
  folder: Path,
) -> None:
  """Fills `folder` with dataset, counts and, last, the manifest."""
  counts: dict[str, dict[str, list]] = {}
  keys: set[str] = set()
  with contextlib.ExitStack() as stack:
    spools: dict[str, Any] = {}
    console = rich.console.Console(stderr=True)
    quiet = not console.is_terminal
    if quiet:
      what = "examples" if tokenizers.image else "examples, their text alone"
      console.print(f"preparing {name}: {len(source):,} {what}")
    bar = rich.progress.Progress(console=console, transient=True, disable=quiet)
    progress = stack.enter_context(bar)
    task = progress.add_task(f"preparing {name}", total=len(source))
    examples = source.examples()
    if tokenizers.image is None:
      examples = _of_text(examples)
    for batch in _batches(examples):
      tokenised = _tokenise(batch, tokenizers, name)
      for example, record in zip(batch, tokenised, strict=True):
        split = example.split
        if (key := f"{split}/{example.key}") in keys:
          raise UserError(
            f"source {name!r} has two examples with the key"
            f" {example.key!r} in split {split!r}; keys must be unique"
          )
        keys.add(key)
        if split not in spools:
          spools[split] = stack.enter_context(
            open(folder / f"{split}.spool", "wb")
          )
          counts[split] = {array: [] for array in COUNTS_ARRAYS}
        pickle.dump(record, spools[split])
        counts[split]["parts"].append(np.array([len(record["part_modality"])]))
        for array in COUNTS_ARRAYS[1:]:
          counts[split][array].append(record[array])
      progress.advance(task, len(batch))
  if not counts:
    raise UserError(
      f"source {name!r} has no examples; look at its path and kind"
    )
  splits = sorted(counts, key=lambda s: (s != "train", s))
  builder = RecordDataset(
    folder=folder,
    splits=splits,
    latent_dim=tokenizers.vocabulary.latent_dim,
    data_dir=str(folder / "dataset"),
    file_format="array_record",
  )
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  shutil.rmtree(folder / "dataset" / "downloads", ignore_errors=True)
  for split in splits:
    (folder / f"{split}.spool").unlink()
  arrays = {
    f"{split}/{array}": np.concatenate(counts[split][array]).astype(np.int32)
    for split in splits
    for array in COUNTS_ARRAYS
  }
  np.savez(folder / "counts.npz", **arrays)  # type: ignore[arg-type]
  write_manifest(folder, origin, splits, arrays, tokenizers)


def _of_text(examples: Iterator[Example]) -> Iterator[Example]:
  """Examples without their pictures; those of pictures alone are left out."""
  for example in examples:
    parts = tuple(p for p in example.parts if p.modality != "image")
    if parts:
      yield dataclasses.replace(example, parts=parts)


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
  """Lists of `EXAMPLES_AT_ONCE` consecutive examples; the last may be shorter."""
  batch: list[Example] = []
  for example in examples:
    batch.append(example)
    if len(batch) == EXAMPLES_AT_ONCE:
      yield batch
      batch = []
  if batch:
    yield batch


def _tokenise(
  batch: Sequence[Example], tokenizers: Tokenizers, source: str
) -> list[dict[str, Any]]:
  """Turns examples into records' fields; texts and pictures in one call each."""
  vocabulary = tokenizers.vocabulary
  parts = [(e, part) for e in batch for part in e.parts]
  for example, part in parts:
    if part.modality not in vocabulary.modalities:
      raise UserError(
        f"source {source!r}, example {example.key!r}: no tokenizer for the"
        f" modality {part.modality!r} (allowed:"
        f" {', '.join(vocabulary.modalities)})"
      )
  texts = [t for _, p in parts for t in p.alternatives if isinstance(t, str)]
  pictures = [
    a for _, p in parts for a in p.alternatives if isinstance(a, np.ndarray)
  ]
  text_ids = iter(tokenizers.text.encode_batch(texts) if texts else ())
  encoded = iter(())
  if pictures:
    image = tokenizers.pictures(f"source {source!r}")
    squares = [square(picture, image.image_size) for picture in pictures]
    encoded = iter(image.encode(np.stack(squares)))
  records = []
  for example in batch:
    ids, latents = [], []
    for part in example.parts:
      modality = vocabulary.index(part.modality)
      for _ in part.alternatives:
        values = next(text_ids if part.modality == "text" else encoded)
        if modality in vocabulary.continuous:
          latents.append(np.asarray(values, np.float32))
          values = np.zeros(len(values))
        offset = vocabulary.offset(modality)
        ids.append(np.asarray(values, np.int32) + np.int32(offset))
    record = {
      "key": example.key,
      "part_modality": np.array(
        [vocabulary.index(p.modality) for p in example.parts], np.int32
      ),
      "part_alternatives": np.array(
        [len(p.alternatives) for p in example.parts], np.int32
      ),
      "lengths": np.array([len(i) for i in ids], np.int32),
      "ids": np.concatenate([np.zeros(0, np.int32), *ids]),
    }
    if width := vocabulary.latent_dim:
      nothing = np.zeros((0, width), np.float32)
      record["latents"] = np.concatenate([nothing, *latents])
    records.append(record)
  return records


def _dataset_folder(folder: Path) -> str:
  return os.path.join(
    folder, "dataset", RecordDataset.name, str(RecordDataset.VERSION)
  )
