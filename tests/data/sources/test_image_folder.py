"""Kind `image_folder`: pictures beside captions, and what is refused."""

import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import load_source
from fusionlab.errors import UserError


def make(folder, count=3, ending=".png"):
  folder.mkdir(exist_ok=True, parents=True)
  for n in range(count):
    Image.new("RGB", (5 + n, 4), (n, 2 * n, 255)).save(folder / f"p{n}{ending}")
    (folder / f"p{n}.txt").write_text(f"picture {n}\nbild {n}\n", "utf-8")
  return folder


def source(folder, **options):
  options = {"kind": "image_folder", "path": str(folder), **options}
  return load_source("mine", SourceConfig(**options))


@pytest.mark.smoke
@pytest.mark.parametrize("ending", [".png", ".gif", ".bmp", ".webp", ".JPG"])
def test_pairs_at_any_depth_with_captions_a_line_each(tmp_path, ending):
  make(tmp_path / "in" / "deep", ending=ending)
  examples = list(source(tmp_path, heldout=0.0).examples())
  assert [e.key for e in examples] == [
    f"in/deep/p{n}{ending}" for n in range(3)
  ]
  text, image = examples[2].parts
  assert text.alternatives == ("picture 2", "bild 2")
  assert image.alternatives[0].shape == (4, 7, 3)
  assert image.alternatives[0].dtype == np.uint8
  assert abs(image.alternatives[0][0, 0].astype(int) - [2, 4, 255]).max() < 9


def test_held_out_by_content_and_copies_stay_together(tmp_path):
  make(tmp_path / "a", 200)
  make(tmp_path / "b", 200)
  split = {e.key: e.split for e in source(tmp_path, heldout=0.25).examples()}
  assert all(split[f"a/p{n}.png"] == split[f"b/p{n}.png"] for n in range(200))
  assert 60 < Counter(split.values())["heldout"] < 140
  assert len(source(tmp_path)) == 400


def test_fingerprint_follows_the_files_and_the_fraction(tmp_path):
  make(tmp_path)
  before = source(tmp_path).fingerprint()
  assert before == source(tmp_path).fingerprint()
  assert before != source(tmp_path, heldout=0.5).fingerprint()
  file = tmp_path / "p1.txt"
  os.utime(file, ns=(0, 5))
  assert before != source(tmp_path).fingerprint()


def broken(folder, what):
  make(folder)
  if what == "caption":
    (folder / "p1.txt").write_bytes("caf\u00e9".encode("latin-1"))
  elif what == "empty caption":
    (folder / "p1.txt").write_text(" \n")
  elif what == "picture":
    Image.effect_noise((64, 64), 50).save(folder / "p1.png")
    (folder / "p1.png").write_bytes((folder / "p1.png").read_bytes()[:2000])
  elif what == "no picture":
    (folder / "p1.png").write_text("hello")
  elif what == "no caption":
    (folder / "p1.txt").unlink()
  return folder


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("what", "message"),
  [
    ("caption", r"p1\.txt is not UTF-8 \(byte 0xe9 at offset 3\); convert"),
    ("empty caption", r"p1\.txt has no text; write a caption"),
    ("picture", r"p1\.png is a broken picture .*; replace or remove"),
    ("no picture", r"p1\.png is not a picture"),
    ("no caption", r"p1\.png has no caption; write p1\.txt"),
  ],
)
def test_bad_files_are_named(tmp_path, what, message):
  with pytest.raises(UserError, match=message) as error:
    list(source(broken(tmp_path, what)).examples())
  assert "'mine'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.smoke
def test_a_missing_folder_a_file_and_an_empty_folder(tmp_path):
  with pytest.raises(UserError, match=r"mine\.path=.*nowhere' does not exist"):
    source(tmp_path / "nowhere")
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="is a file; kind 'image_folder' needs"):
    source(tmp_path / "file")
  with pytest.raises(UserError, match="path is empty; kind 'image_folder'"):
    load_source("mine", SourceConfig(kind="image_folder"))
  with pytest.raises(UserError, match="has no pictures"):
    len(source(tmp_path))
