"""The library's layers give the published layers' numbers."""

import pathlib

import numpy as np
import pytest

from fusionlab.testing import conformance
from tests.testing import oracle

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
  assert {r.verdict for r in results} <= {"passed", "not compared"}
  assert any(r.passed for r in results)


def test_the_command_counts(tmp_path, capsys):
  write(tmp_path, ffn_case())
  write(tmp_path, {"a/x": np.zeros(2)}, "selective_scan")
  assert conformance.main([str(tmp_path)]) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last == "10 passed, 0 failed, 1 not built"
  # A glob that is misspelt must not look like success.
  assert conformance.main([str(tmp_path), "--only", "mot_ffn/B*"]) == 2
  said = capsys.readouterr().err
  assert "matches no case" in said and "mot_ffn, selective_scan" in said


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


@pytest.mark.parametrize(
  ("what", "quantities"),
  [
    ("mask_B/attn_mask", {"attn_mask"}),
    ("mask_B/modalities", {"attn_mask", "is_modality_mask", "ordered"}),
    ("loss_A/ce/logits_b_l_n", {"text_loss", "total_loss"}),
    ("loss_A/mse1/pred", {"flow_loss_1", "total_loss"}),
    (
      "loss_A/noise_call_1",
      {"mse1/target", "flow_loss_1", "total_loss"},
    ),
  ],
)
def test_a_wrong_number_of_transfusion_fails(tmp_path, what, quantities):
  """Each shows in what depends on it, and nowhere else."""
  with np.load(VECTORS / "transfusion.npz") as read:
    arrays = {k: read[k].copy() for k in read.files}
  if what.endswith("modalities"):
    arrays[what][0, 1] += 0, 0, 1  # one position more
  elif arrays[what].dtype == bool:
    arrays[what].flat[3] ^= True
  else:
    arrays[what].flat[3] += 5
  write(tmp_path, arrays, "transfusion")
  results = conformance.run_file(tmp_path / "transfusion.npz")
  failed = {(r.case, r.quantity) for r in results if r.verdict == "FAILED"}
  case = f"transfusion/{what.split('/')[0]}"
  assert failed == {(case, quantity) for quantity in quantities}


def test_other_conventions_are_said_and_not_counted(tmp_path, capsys):
  arrays = {"t/rand0": np.zeros(2), "t/times": np.zeros((2, 2))}
  write(tmp_path, arrays | {"u/x": np.zeros(1)}, "transfusion")
  assert conformance.main([str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert "not compared" in out and "x are not of masks" in out
  last = out.splitlines()[-1]
  assert last == "0 passed, 1 failed, 0 not built, 1 not compared"


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
      "it must be [48, 32]",
    ),
    (
      lambda a: {k: v for k, v in a.items() if not k.endswith("/cotangent")},
      "no array 'cotangent'",
    ),
    (
      lambda a: {k: v[:-1] if k.endswith("/x") else v for k, v in a.items()},
      "tokens of x per modality",
    ),
    (
      lambda a: {
        k: v[:, :-1] if k.endswith("/out") else v for k, v in a.items()
      },
      "out has shape [32, 31]; it must be [32, 32]",
    ),
  ],
)
def test_a_case_that_cannot_be_run_fails_alone(tmp_path, capsys, change, said):
  good = _rename(ffn_case(), f"{CASE}/", "Z_good/")
  write(tmp_path, change(ffn_case()) | good)
  failed, *passed = conformance.run_file(tmp_path / "mot_ffn.npz")
  assert said in failed.reason
  assert len(passed) == 10
  assert all(r.passed and r.case == "mot_ffn/Z_good" for r in passed)
  assert conformance.main([str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert "cannot be run" in out
  assert out.splitlines()[-1] == "10 passed, 1 failed, 0 not built"


@pytest.mark.parametrize("value", [-np.inf, -1e9, np.nan])
def test_a_mask_that_is_no_interval_fails(tmp_path, value):
  with np.load(VECTORS / "mot_attention.npz") as arrays:
    case = {k: arrays[k] for k in arrays.files if k.startswith("A_2mod")}
  mask = case["A_2mod_causal/attn_mask"].copy()
  mask[9, 4] = value
  write(tmp_path, case | {"A_2mod_causal/attn_mask": mask}, "mot_attention")
  (result,) = conformance.run_file(tmp_path / "mot_attention.npz")
  assert "not one interval" in result.reason or "0 and -inf" in result.reason
  assert not result.passed


def test_gradients_are_compared_where_a_file_has_them(tmp_path):
  arrays = {k: v for k, v in ffn_case().items() if "/grad/local" not in k}
  write(tmp_path, arrays)
  results = conformance.run_file(tmp_path / "mot_ffn.npz")
  assert [r.quantity for r in results] == ["out", "grad/x"]
  arrays = {k: v for k, v in arrays.items() if "/grad/" not in k}
  del arrays[f"{CASE}/cotangent"], arrays[f"{CASE}/out"]
  write(tmp_path, arrays)
  (result,) = conformance.run_file(tmp_path / "mot_ffn.npz")
  assert result.passed


def test_a_file_is_of_the_system_that_begins_its_name(tmp_path):
  assert conformance.system_of(pathlib.Path("mot_ffn_b.npz")) == "mot_ffn"
  assert conformance.system_of(pathlib.Path("mot_ffnb.npz")) is None


def test_random_cases_of_any_size_match_an_oracle(tmp_path):
  """Sizes, masks and counts that the published vectors do not have."""
  rng = np.random.default_rng(0)
  write(tmp_path, dict(oracle.attention_cases(rng)), "mot_attention")
  write(tmp_path, dict(oracle.feed_forward_cases(rng)), "mot_ffn")
  for name, number in (("mot_attention", 12), ("mot_ffn", 6)):
    results = conformance.run_file(tmp_path / f"{name}.npz")
    assert [r for r in results if not r.passed] == []
    assert len(results) == number


@pytest.mark.parametrize("content", [None, b"not a zip"])
def test_nothing_to_run_is_one_line(tmp_path, capsys, content):
  if content:
    (tmp_path / "mot_ffn.npz").write_bytes(content)
  assert conformance.main([str(tmp_path)]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
