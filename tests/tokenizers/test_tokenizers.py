"""Both tokenizers together: one vocabulary, one hash, one folder."""

import numpy as np
import pytest
import safetensors.numpy

from fusionlab.batch import LatentGrid
from fusionlab.errors import UserError
from fusionlab.tokenizers import (
  ImageTokenizer,
  LatentTokenizer,
  Tokenizers,
  load_tokenizers,
  storage,
)
from fusionlab.tokenizers.text import SPECIALS


@pytest.mark.smoke
def test_the_packaged_pair_shares_one_vocabulary():
  both = load_tokenizers()
  vocabulary = both.vocabulary
  assert vocabulary.modalities == ("text", "image")
  assert vocabulary.sizes == (3584, 512) and vocabulary.size == 4096
  special = {
    "<pad>": vocabulary.pad,
    "<bos>": vocabulary.bos,
    "<eos>": vocabulary.eos,
    "<boi>": vocabulary.begin[1],
    "<eoi>": vocabulary.end[1],
  }
  assert list(special.values()) == [SPECIALS.index(s) for s in special]


def test_a_folder_holds_all_that_is_needed(tmp_path):
  both = load_tokenizers()
  both.save(tmp_path / "new" / "folder")
  again = Tokenizers.from_folder(tmp_path / "new" / "folder")
  assert again.hash == both.hash and len(both.hash) == 64
  assert again.vocabulary == both.vocabulary
  names = {p.name for p in (tmp_path / "new" / "folder").iterdir()}
  assert names == {"text.json", "image.safetensors"}


def test_the_hash_depends_on_both_files(tmp_path):
  both = load_tokenizers()
  both.save(tmp_path)
  text = tmp_path / "text.json"
  text.write_bytes(text.read_bytes() + b"\n")
  assert Tokenizers.from_folder(tmp_path).hash != both.hash


@pytest.mark.parametrize("name", ["text.json", "image.safetensors"])
def test_a_folder_without_a_file_is_refused(name, tmp_path):
  load_tokenizers().save(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(UserError, match=f"{name}'; leave the path empty"):
    Tokenizers.from_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="cannot write"):
    load_tokenizers().save(tmp_path / "file")


@pytest.mark.smoke
def test_continuous_pictures_have_one_id_and_a_grid():
  """The range after the text's holds the one placeholder."""
  codes, both = load_tokenizers(), load_tokenizers(image_path="kl")
  vocabulary = both.vocabulary
  assert vocabulary.modalities == ("text", "image")
  assert vocabulary.sizes == (3584, 1)
  grid = LatentGrid(side=16, patch=2, channels=4)
  assert vocabulary.grids == (None, grid) and vocabulary.continuous == (1,)
  assert both.block_lengths == (0, 64) == codes.block_lengths
  assert vocabulary.begin == codes.vocabulary.begin
  assert isinstance(both.pictures("a test"), LatentTokenizer)
  assert codes.vocabulary.grids == () and both.hash != codes.hash


@pytest.mark.parametrize("patch", [0, 1, 4])
def test_a_folder_keeps_the_patch_that_was_chosen(patch, tmp_path):
  """The hash changes with k, and a folder gives it back."""
  both = load_tokenizers(image_path="kl", latent_patch=patch)
  packaged = load_tokenizers(image_path="kl")
  assert (both.hash == packaged.hash) == (patch == 0)
  assert both.block_lengths == (0, (16 // (patch or 2)) ** 2)
  both.save(tmp_path)
  again = Tokenizers.from_folder(tmp_path)
  assert again.hash == both.hash and again.vocabulary == both.vocabulary
  names = {p.name for p in tmp_path.iterdir()}
  assert names == {"text.json", "image.safetensors"}


@pytest.mark.parametrize("cls", [ImageTokenizer, LatentTokenizer])
def test_a_file_says_itself_which_kind_it_is(cls, tmp_path):
  """Whatever its name."""
  path = tmp_path / "pictures"
  cls.load().save(path)
  image = load_tokenizers(image_path=str(path)).pictures("a test")
  assert type(image) is cls and image.hash == cls.load().hash


@pytest.mark.parametrize(
  ("path", "patch", "message"),
  [
    ("kl", 3, "16 x 16 latents; allowed: 1, 2, 4, 8, 16$"),
    ("", 2, "latent_patch=2 is for continuous latents, not for picture codes"),
    ("none", 2, "not for text alone; .* set image_tokenizer='kl'"),
    ("lk", 0, "picture tokenizer: there is no file 'lk'"),
  ],
)
def test_a_patch_or_a_path_that_does_not_fit_is_refused(path, patch, message):
  """In one line with what is allowed."""
  with pytest.raises(UserError, match=message):
    load_tokenizers(image_path=path, latent_patch=patch)


def test_a_file_of_neither_kind_is_refused_by_both_names(tmp_path):
  """A newer format, weights of something else, or half a file."""
  path = tmp_path / "other.safetensors"
  tensors = {"a": np.zeros(3)}
  entry = {"fusionlab": '{"format": "other.2", "config": {}}'}
  both = "'fusionlab.image_tokenizer.1' and 'fusionlab.latent_tokenizer.1'"
  makers = "train-image or train-latents"
  for content, messages in (
    (safetensors.numpy.save(tensors, entry), ("format 'other.2'", both)),
    (safetensors.numpy.save(tensors), ("without the metadata", makers)),
    (
      storage.packaged(storage.LATENT_FILE).read_bytes()[:-1],
      ("not a whole safetensors file", makers),
    ),
  ):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
      load_tokenizers(image_path=str(path))
    assert all(m in str(caught.value) for m in ("other.safetensors", *messages))
