"""Folders of Hugging Face's library give its logits; others are told apart."""

import numpy as np
import pytest

from fusionlab.interop.__main__ import main
from fusionlab.interop.check import compare
from tests.interop import folders

REFERENCES = [
  "hf_llama_tiny",
  "hf_llama_scaled/linear",  # float16
  "hf_llama_scaled/llama3",  # bfloat16, tied, five files
  "hf_llama_scaled/yarn",  # keys of older versions
]


def run(folder, reference):
  return main(["check", str(folder), "--reference", str(reference)])


@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_is_matched(name, capsys):
  folder = folders.VECTORS / name
  assert run(folder, folder / "reference.npz") == 0
  first, second, last = capsys.readouterr().out.splitlines()
  assert float(first.rpartition(" ")[2]) < 1e-5
  assert second.startswith("KL per position, nats: mean ")
  assert last.startswith("within 0.0001")


TINY = folders.VECTORS / "hf_llama_tiny"


def arrays():
  with np.load(TINY / "reference.npz") as found:
    return {k: found[k] for k in found.files}


@pytest.mark.parametrize("value", [0.01, np.nan])
def test_another_number_exits_with_1(tmp_path, capsys, value):
  changed = arrays()
  changed["logits"][1, 7, 3] += value
  np.savez_compressed(tmp_path / "r.npz", **changed)
  assert run(TINY, tmp_path / "r.npz") == 1
  assert "BEYOND 0.0001" in capsys.readouterr().out


def _write(path, **changed):
  kept = {k: v for k, v in (arrays() | changed).items() if v is not None}
  np.savez(path, **kept)


@pytest.mark.parametrize(
  ("changed", "said"),
  [
    ({"logits": None}, "has no array 'logits'"),
    ({"input_ids": None}, "has no array 'input_ids'"),
    ({"input_ids": np.zeros(3, int)}, "must be integers [B, L]"),
    ({"input_ids": np.zeros((2, 40))}, "must be integers [B, L]"),
    ({"input_ids": np.full((2, 40), 300)}, "the model has 0 to 299"),
    ({"input_ids": np.zeros((2, 39), int)}, "it must be floats [2, 39, 300]"),
    ({"logits": np.zeros((2, 40, 300), int)}, "it must be floats [2, 40, 300]"),
    ({"attention_mask": np.zeros((2, 40), int)}, "only whole rows"),
    ({"logits": np.array([{}])}, "it must be floats"),
    ({"input_ids": np.array([{}])}, "no readable .npz"),
  ],
)
def test_other_arrays_are_one_line(tmp_path, capsys, changed, said):
  _write(tmp_path / "r.npz", **changed)
  assert run(TINY, tmp_path / "r.npz") == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line


@pytest.mark.parametrize("content", [None, b"not a zip", b""])
def test_no_file_of_arrays_is_one_line(tmp_path, capsys, content):
  if content is not None:
    (tmp_path / "r.npz").write_bytes(content)
  assert run(TINY, tmp_path / "r.npz") == 2
  assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_ends_early_is_one_line(tmp_path, capsys):
  _write(tmp_path / "r.npz")
  whole = (tmp_path / "r.npz").read_bytes()
  for end in (len(whole) // 2, len(whole) - 30):
    (tmp_path / "r.npz").write_bytes(whole[:end])
    assert run(TINY, tmp_path / "r.npz") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_divergence_is_of_the_next_ids_distribution():
  p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
  difference, kl = compare(np.log(q)[None] + 3, np.log(p)[None])
  assert kl == pytest.approx(0.25 * np.log(2))
  assert difference == pytest.approx(3 + np.log(2))
