"""The library's layers give the published layers' numbers."""

import pathlib

import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.testing import conformance

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
CASE = "A_2mod"


def ffn_case() -> dict[str, np.ndarray]:
  with np.load(VECTORS / "mot_ffn.npz") as arrays:
    return {k: arrays[k] for k in arrays.files if k.startswith(f"{CASE}/")}


def write(folder, arrays, name="mot_ffn"):
  np.savez(folder / f"{name}.npz", **arrays)


@pytest.mark.parametrize("name", conformance.RUNNERS)
def test_every_published_vector_is_matched(name):
  results = conformance.run_file(VECTORS / f"{name}.npz")
  failed = [r for r in results if not r.passed]
  assert results
  assert not failed


def test_the_command_counts(tmp_path, capsys):
  write(tmp_path, ffn_case())
  write(tmp_path, {"a/x": np.zeros(2)}, "selective_scan")
  assert conformance.main([str(tmp_path)]) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == "10 passed, 0 failed, 1 not built"
  assert conformance.main([str(tmp_path), "--only", "mot_ffn/B*"]) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == "0 passed, 0 failed, 0 not built"


@pytest.mark.parametrize(
  "what", ["out_f64", "grad/x", "grad/local_experts.1.w2.weight"]
)
def test_a_wrong_number_fails(tmp_path, capsys, what):
  arrays = ffn_case()
  arrays[f"{CASE}/{what}"] = arrays[f"{CASE}/{what}"].copy()
  arrays[f"{CASE}/{what}"].flat[3] += 0.01
  write(tmp_path, arrays)
  assert conformance.main([str(tmp_path)]) == 1
  assert "9 passed, 1 failed" in capsys.readouterr().out


def test_tokens_in_no_mask_are_left_out():
  """Their outputs and gradients may be anything."""
  case = {k.removeprefix(f"{CASE}/"): v for k, v in ffn_case().items()}
  before = conformance.feed_forward_case(case)
  case["modality_masks"] = case["modality_masks"].copy()
  case["modality_masks"][:, 5] = False
  case["x"] = case["x"].copy()
  case["x"][5] = 1e3
  after = conformance.feed_forward_case(case)
  kept = np.arange(len(case["x"])) != 5
  for name in ("out", "grad/x"):
    ours = np.asarray(after[name][0])
    np.testing.assert_allclose(ours[kept], before[name][0][kept], atol=1e-5)
    assert not ours[5].any()


def _rename(arrays, old, new):
  return {k.replace(old, new): v for k, v in arrays.items()}


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (
      lambda a: _rename(a, "w/local_experts.0.w1", "w/local_expert.0.w1"),
      "did you mean 'local_experts.0.w1.weight'",
    ),
    (
      lambda a: {k: v for k, v in a.items() if "w/local_experts.1.w3" not in k},
      "missing, first 'local_experts.1.w3.weight'",
    ),
    (
      lambda a: {k: v[..., :-1] if "w/" in k else v for k, v in a.items()},
      r"it must be \[48, 32\]",
    ),
    (
      lambda a: {k: v for k, v in a.items() if not k.endswith("/cotangent")},
      "no array 'cotangent'",
    ),
  ],
)
def test_a_file_that_is_not_of_the_format_is_one_line(tmp_path, change, said):
  write(tmp_path, change(ffn_case()))
  with pytest.raises(UserError, match=said):
    conformance.run_file(tmp_path / "mot_ffn.npz")


def test_a_mask_that_is_no_interval_is_refused(tmp_path):
  with np.load(VECTORS / "mot_attention.npz") as arrays:
    case = {k: arrays[k] for k in arrays.files if k.startswith("A_2mod")}
  mask = case["A_2mod_causal/attn_mask"].copy()
  mask[9, 4] = -np.inf
  write(tmp_path, case | {"A_2mod_causal/attn_mask": mask}, "mot_attention")
  with pytest.raises(UserError, match="not one interval"):
    conformance.run_file(tmp_path / "mot_attention.npz")


@pytest.mark.parametrize("content", [None, b"not a zip"])
def test_nothing_to_run_is_one_line(tmp_path, capsys, content):
  if content:
    (tmp_path / "mot_ffn.npz").write_bytes(content)
  assert conformance.main([str(tmp_path)]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
