"""Safetensors: every broken file is one line that names it."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fusionlab.errors import UserError
from fusionlab.interop import tensors

ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.array([1.5, np.nan], np.float32),
}


@pytest.mark.parametrize(
  "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str
)
def test_reads_as_float32(tmp_path, dtype):
  given = {k: v.astype(dtype) for k, v in ARRAYS.items()}
  save_file(given, tmp_path / "model.safetensors")
  found = tensors.open_folder(tmp_path)
  for name, array in given.items():
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], array.astype(np.float32))


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (lambda c: c[:-1], "no whole safetensors file"),
    (lambda c: c[:5], "no whole safetensors file"),
    (lambda c: b"", "no whole safetensors file"),
    (lambda c: c + b"x", "no whole safetensors file"),
    (lambda c: b"\x80\x04pickle" * 9, "no whole safetensors file"),
    (lambda c: c.replace(b'"F32"', b'"I32"', 1), "tensor 'a' is I32; weights"),
  ],
)
def test_a_broken_file_is_one_line(tmp_path, content, said):
  path = tmp_path / "model.safetensors"
  save_file(ARRAYS, path)
  path.write_bytes(content(path.read_bytes()))
  with pytest.raises(UserError, match=said) as error:
    tensors.open_folder(tmp_path)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_written_and_read(tmp_path, dtype):
  total = tensors.write(tmp_path, ARRAYS.items(), dtype=dtype, shard_bytes=8)
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
  ]
  assert total == sum(a.nbytes for a in ARRAYS.values()) // (
    1 if dtype == "float32" else 2
  )
  found = tensors.open_folder(tmp_path)
  assert set(found) == set(ARRAYS)
  assert found.file_of("b").endswith(names[1])
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(found[name], array)


def _index(change):
  def damage(folder):
    path = folder / tensors.INDEX
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

  return damage


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (lambda d: (d / SECOND).unlink(), f"{SECOND} is missing"),
    (lambda d: (d / tensors.INDEX).write_text("{"), "is no JSON"),
    (lambda d: (d / tensors.INDEX).write_text("[]"), "holds no JSON object"),
    (_index(lambda c: c.pop("weight_map")), "weight_map must name a file"),
    (_index(lambda c: c["weight_map"].update(b="../x")), "must name a file"),
    (_index(lambda c: c["weight_map"].update(c=SECOND)), "'c' of model.safe"),
    (_index(lambda c: c["weight_map"].update(a=SECOND)), "'a' of model.safe"),
    (
      lambda d: save_file(ARRAYS, d / SECOND),
      "tensor 'a' is also in",
    ),
    (
      lambda d: save_file({"b": ARRAYS["b"], "z": ARRAYS["b"]}, d / SECOND),
      "'z' is not here by model.safetensors.index.json",
    ),
  ],
)
def test_broken_shards_are_one_line(tmp_path, damage, said):
  tensors.write(tmp_path, ARRAYS.items(), dtype="float32", shard_bytes=8)
  damage(tmp_path)
  with pytest.raises(UserError) as error:
    tensors.open_folder(tmp_path)
  assert said in str(error.value)
  assert "\n" not in str(error.value)


def test_a_pickle_is_never_read(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
  with pytest.raises(UserError, match=r"pytorch_model\.bin may run code"):
    tensors.open_folder(tmp_path)
