"""Both tokenizers together: one vocabulary, one hash, one folder."""

import pytest

from fusionlab.errors import UserError
from fusionlab.tokenizers import Tokenizers, load_tokenizers
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
