"""Kind `tfds`: prepared datasets are read without TensorFlow."""

import io
import json
import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import load_source
from fusionlab.errors import UserError


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Twenty grey pictures and five."""

  VERSION = tfds.core.Version("1.0.0")
  name = "tiny"

  @classmethod
  def _get_pkg_dir_path(cls):
    return None

  def _info(self):
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "caption": text,
          "label": tfds.features.ClassLabel(names=["red_fox", "owl"]),
          "captions": tfds.features.Sequence({"text": text}),
          "number": np.int64,
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(20),
      "test": self._generate_examples(5),
    }

  def _generate_examples(self, count):
    for n in range(count):
      file = io.BytesIO()
      Image.new("RGB", (8, 6), (n, n, n)).save(file, "PNG")
      file.seek(0)
      yield (
        n,
        {
          "image": file,
          "caption": f"né {n}",
          "label": n % 2,
          "captions": [{"text": f"one {n}"}, {"text": f"two {n}"}],
          "number": n,
        },
      )


@pytest.fixture(scope="module", params=["array_record", "parquet"])
def prepared(request, tmp_path_factory):
  root = tmp_path_factory.mktemp(request.param)
  builder = Tiny(data_dir=str(root), file_format=request.param)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )
  return root


def source(path, **options):
  options = {"kind": "tfds", "path": str(path), **options}
  return load_source("mine", SourceConfig(**options))


def test_reads_by_folder_and_by_name(prepared, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  folder = prepared / "tiny" / "1.0.0"
  for path in (folder, folder.parent, "tiny", "tiny:1.0.0"):
    made = source(path, heldout=0.0)
    examples = list(made.examples())
    assert len(examples) == len(made) == 20
    assert {e.split for e in examples} == {"train"}
    assert examples[3].key == "train/3"
    text, image = examples[3].parts
    n = int(text.alternatives[0].removeprefix("né "))
    assert image.alternatives[0].shape == (6, 8, 3)
    assert (image.alternatives[0] == n).all()
  assert "tensorflow" not in sys.modules


def test_fields_and_splits(prepared):
  folder = prepared / "tiny" / "1.0.0"
  made = source(
    folder,
    text_field="captions.text",
    heldout_split="test",
    split="train[:50%]",
  )
  examples = list(made.examples())
  assert Counter(e.split for e in examples) == {"train": 10, "heldout": 5}
  assert len(examples[0].parts[0].alternatives) == 2
  cut = source(folder, split="train[:15]+test[1:]", heldout_split="train[15:]")
  split = {e.key: e.split for e in cut.examples()}
  assert len(split) == len(cut) == 24
  assert {k for k, s in split.items() if s == "heldout"} == {
    f"train/{n}" for n in range(15, 20)
  }
  named = next(iter(source(folder, text_field="label").examples()))
  assert named.parts[0].alternatives[0] in ("red fox", "owl")
  alone = next(iter(source(folder, image_field="").examples()))
  assert len(alone.parts) == 1
  some = Counter(e.split for e in source(folder, heldout=0.5).examples())
  assert 4 <= some["heldout"] <= 16
  assert made.fingerprint() != source(folder).fingerprint()
  assert source(folder).fingerprint() == source(folder).fingerprint()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"text_field": "captoin"}, r"text_field='captoin'.*did you mean 'caption"),
    ({"image_field": "imag"}, r"image_field='imag'.*did you mean 'image'"),
    ({"text_field": "captions.txt"}, "did you mean 'text'"),
    ({"text_field": "number"}, "field 'number' holds .*int.*, not text"),
    ({"image_field": "caption"}, "field 'caption' is .*; a picture is uint8"),
    ({"split": "trian"}, r"split='trian': .* did you mean 'train'"),
    ({"heldout_split": "tset"}, "heldout_split='tset'.*did you mean 'test'"),
    ({"heldout_split": "train"}, "shares records with split='train'"),
    (
      {"split": "train[:60%]", "heldout_split": "train[50%:]"},
      "shares records with split=",
    ),
    ({"split": "train[:x]"}, r"split='train\[:x\]'.* not a slice"),
    ({"split": "train[30:]"}, "not a slice"),
    ({"split": "train[:0]"}, "has no records there"),
  ],
)
def test_bad_options_name_the_nearest(prepared, options, message):
  with pytest.raises(UserError, match=message) as error:
    list(source(prepared / "tiny" / "1.0.0", **options).examples())
  assert "mine" in str(error.value) and "\n" not in str(error.value)


COMMAND = r"where TensorFlow is: tfds build {} --file_format=array_record"


@pytest.mark.smoke
def test_an_unprepared_dataset_is_met_with_the_command(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(UserError, match=COMMAND.format("coco_captions/2014")):
    source("coco_captions/2014")
  with pytest.raises(UserError, match="path is empty"):
    source("")
  folder = tmp_path / "mnist" / "3.0.1"
  folder.mkdir(parents=True)
  info = folder / "dataset_info.json"
  info.write_text(json.dumps({"name": "mnist", "fileFormat": "tfrecord"}))
  with pytest.raises(UserError, match=r"prepared as tfrecord.*build mnist "):
    source("mnist")
  with pytest.raises(
    UserError, match=r"is not prepared in .*build mnist:2\.0\.0 "
  ):
    source("mnist:2.0.0")
  info.write_text("{")
  with pytest.raises(UserError, match=r"unreadable .*dataset_info\.json"):
    source("mnist")
