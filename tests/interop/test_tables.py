"""Tables move elements both ways, and name what does not fit."""

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.interop.tables import (
  FROM_HEADS,
  SAME,
  TRANSPOSED,
  Entry,
  from_published,
  into_heads,
  to_published,
)

TABLE = [
  Entry("embed.weight", "embed", ("V", "d"), SAME),
  Entry("block.{l}.{k}.q", "layers/q/{tower}/w", ("HD", "d"), into_heads("H")),
  Entry("block.{l}.{k}.o", "layers/o/{tower}/w", ("d", "HD"), FROM_HEADS),
  Entry("block.{l}.ffn", "layers/ffn/w", ("F", "d"), TRANSPOSED),
]
SIZES = {"V": 7, "d": 3, "H": 2, "D": 4, "HD": 8, "F": 5}
TOWERS = ("text", "image")


def arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  found = {"embed.weight": rng.normal(size=(7, 3))}
  for layer in range(3):
    found[f"block.{layer}.ffn"] = rng.normal(size=(5, 3))
    for k in range(2):
      found[f"block.{layer}.{k}.q"] = rng.normal(size=(8, 3))
      found[f"block.{layer}.{k}.o"] = rng.normal(size=(3, 8))
  return {k: v.astype(np.float32) for k, v in found.items()}


def read(given, **options):
  return from_published(TABLE, given, SIZES, TOWERS, layers=3, **options)


def test_layers_are_stacked_and_heads_split():
  given = arrays()
  tree = read(given)
  q = tree["layers"]["q"]["image"]["w"]
  assert q.shape == (3, 3, 2, 4)
  x = np.random.default_rng(1).normal(size=3)
  ours = np.einsum("d,dhk->hk", x, q[2]).ravel()
  np.testing.assert_allclose(ours, given["block.2.1.q"] @ x, rtol=1e-6)
  o = tree["layers"]["o"]["text"]["w"][1]
  heads = np.random.default_rng(2).normal(size=(2, 4))
  ours = np.einsum("hk,hkd->d", heads, o)
  np.testing.assert_allclose(ours, given["block.1.0.o"] @ heads.ravel(), 1e-6)


def test_there_and_back_changes_no_bit():
  given = arrays()
  given["embed.weight"][0, 0] = np.nan
  back = dict(to_published(TABLE, read(given), SIZES, TOWERS, layers=3))
  assert back.keys() == given.keys()
  for name, array in given.items():
    assert array.tobytes() == back[name].tobytes()


def test_a_tower_without_a_leaf_of_its_own_takes_the_shared_one():
  tree = {"layers": {"q": {"shared": {"w": np.zeros((3, 3, 2, 4))}}}}
  out = to_published(TABLE[1:2], tree, SIZES, ("text",), layers=3)
  assert len(list(out)) == 3
  with pytest.raises(UserError, match="no 'layers/o/text/w'"):
    list(to_published(TABLE[2:3], tree, SIZES, ("text",), layers=3))


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (
      lambda a: a | {"block.1.0.qq": a["embed.weight"]},
      "f.bin: unknown tensor 'block.1.0.qq', did you mean 'block.1.0.q'",
    ),
    (
      lambda a: a | {"block.3.ffn": a["block.0.ffn"]},
      "f.bin: unknown tensor 'block.3.ffn'",
    ),
    (
      lambda a: {k: v for k, v in a.items() if ".2." not in k},
      "f.bin: 5 tensor(s) missing, first 'block.2.0.q'",
    ),
    (
      lambda a: a | {"block.0.1.o": np.zeros((8, 3))},
      "tensor 'block.0.1.o' has shape [8, 3]; it must be [3, 8] (d x HD)",
    ),
  ],
)
def test_what_does_not_fit_is_named(change, said):
  with pytest.raises(UserError) as error:
    read(change(arrays()), file_of=lambda name: "f.bin")
  assert said in str(error.value)


def test_partial_leaves_out_what_is_not_there():
  given = {k: v for k, v in arrays().items() if "embed" in k}
  assert list(read(given, partial=True)) == ["embed"]
