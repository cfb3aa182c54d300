"""Runs reference vectors of published code through the library's own modules.

  python -m fusionlab.testing.conformance DIR [--only GLOB]

DIR holds `.npz` files of cases, keys `<case>/<what>`: inputs, `cfg/…`, published
weights `w/<name>`, `out` (and `out_f64`), and gradients `grad/<name>` of
sum(out · cotangent). A file's name says which system it is of; `transfusion` has
keys of its own. What a system does by another convention is said, not compared.
"""

import argparse
import dataclasses
import fnmatch
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusionlab.errors import UserError
from fusionlab.interop import mixture_of_transformers as published
from fusionlab.interop.tables import Entry, from_published
from fusionlab.nn.attention import Attention, Visibility
from fusionlab.nn.feed_forward import FeedForward
from fusionlab.nn.norms import RMSNorm
from fusionlab.routing import Router, make_layout, make_router
from fusionlab.testing.transfusion import transfusion_case
from fusionlab.towers import UNTIE_NAMES, Towers

Case = Mapping[str, np.ndarray]
_BROKEN = (zipfile.BadZipFile, zlib.error)
# Of the norm on a sub-layer's output, whatever `cfg` says of the others.
_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """|a − b| ≤ absolute + relative · |b|."""

  absolute: float
  relative: float

  def __str__(self) -> str:
    return f"{self.absolute:.0e} + {self.relative:.0e} |b|"


OUTPUT = Tolerance(1e-5, 1e-4)
GRADIENT = Tolerance(1e-4, 1e-3)


@dataclasses.dataclass(frozen=True)
class Result:
  """One quantity of one case.

  Attributes:
    case, quantity: names.
    error: largest |ours − theirs|.
    tolerance: what it was held to.
    passed: whether every element is within it.
    reason: why the case could not be run, or the quantity is not compared; ''
      where it was.
    other: whether it is of another convention, neither passed nor failed.
  """

  case: str
  quantity: str
  error: float
  tolerance: Tolerance
  passed: bool
  reason: str = ""
  other: bool = False

  @property
  def verdict(self) -> str:
    """'passed', 'FAILED' or 'not compared'."""
    if self.other:
      return "not compared"
    return "passed" if self.passed else "FAILED"


class AttentionWithNorm(nn.Module):
  """The published attention layer: mixing, then the norm on its output."""

  attention: Callable[..., Attention]
  norm: Callable[..., RMSNorm]

  @nn.compact
  def __call__(self, x, router: Router, visibility: Visibility):
    mixed = self.attention(name="attention")(x, router, visibility)
    return self.norm(name="mixer_norm")(mixed, router)


class FeedForwardWithNorm(nn.Module):
  """The published feed-forward layer: SwiGLU, then the norm on its output."""

  ffn: Callable[..., FeedForward]
  norm: Callable[..., RMSNorm]

  @nn.compact
  def __call__(self, x, router: Router):
    return self.norm(name="ffn_norm")(self.ffn(name="ffn")(x, router), router)


def _towers(case: Case) -> tuple[Towers, list[str], np.ndarray, np.ndarray]:
  """Towers, the tower of each modality, modality ids [N], who is in a mask."""
  masks = case["modality_masks"].astype(bool)
  if masks.ndim != 2 or masks.shape[1] != len(case["x"]):
    raise UserError(
      f"modality_masks is {list(masks.shape)}; it must be a mask for each of the"
      f" {len(case['x'])} tokens of x per modality"
    )
  names = [f"modality_{k}" for k in range(len(masks))]
  untie = " ".join(UNTIE_NAMES)
  towers = Towers.parse(names, range(len(masks)), untie)
  # On tokens of several masks the lowest modality wins.
  modality = masks.argmax(0).astype(np.int32)
  of_modality = [towers.names[t] for t in towers.of_modality]
  return towers, of_modality, modality, np.asarray(masks.any(0))


def _router(towers: Towers, modality: np.ndarray, real: np.ndarray) -> Router:
  """A router for tokens [B, L]."""
  if towers.count == 1:
    return make_router(towers, None, modality, "layout")
  counts = [int(((modality == k) & real).sum()) for k in range(towers.count)]
  counts[0] += modality.size - sum(counts)
  layout = make_layout(
    modality,
    real,
    towers=towers.of_modality,
    counts=counts,
    group_rows=len(modality),
  )
  return make_router(towers, layout, modality, "layout")


def _intervals(case: Case, rows: int, length: int):
  """Keys [start, end) that each query sees, of an additive mask [S, S].

  Returns:
    int32 [rows, length] twice, and whether they are causal from the first key.

  Raises:
    UserError: a mask of another kind, or a query whose visible keys are no
      interval.
  """
  seen = np.ones((length, length), bool)
  if "attn_mask" in case:
    mask = case["attn_mask"]
    seen = mask == 0
    if mask.shape != seen.shape or not (seen | (mask == -np.inf)).all():
      raise UserError(
        f"attn_mask {mask.dtype}{list(mask.shape)} is not [{length}, {length}]"
        f" of 0 and -inf"
      )
  start, number = seen.argmax(1), seen.sum(1)
  column = np.arange(length)
  interval = (column >= start[:, None]) & (column < (start + number)[:, None])
  if (interval != seen).any():
    raise UserError("its mask is not one interval of keys per query")
  causal = bool((start == 0).all() and (number == column + 1).all())
  both = (start, start + number)
  return *(jnp.tile(jnp.asarray(a, jnp.int32), (rows, 1)) for a in both), causal


def attention_case(case: Case) -> dict[str, tuple[Any, Any]]:
  """Attention of `mot_attention`: ours and theirs by quantity.

  Args:
    case: arrays by name, without the case's prefix.

  Raises:
    UserError: a mask or a weight that does not fit the format.
  """
  towers, of_modality, modality, covered = _towers(case)
  rows, length = int(case["cfg/batch"]), int(case["cfg/seq"])
  heads, width = int(case["cfg/n_heads"]), int(case["cfg/head_dim"])
  dim, qk_norm = int(case["cfg/dim"]), bool(case["cfg/qk_normalization"])
  start, end, causal = _intervals(case, rows, length)
  # Without rotary positions.
  no_angles = jnp.zeros((rows, length, 0))
  visibility = Visibility(start, end, no_angles, no_angles)
  router = _router(
    towers, modality.reshape(rows, length), covered.reshape(rows, length)
  )

  def attention(name: str) -> Attention:
    return Attention(
      towers,
      dim,
      heads,
      heads,
      width,
      "rms" if qk_norm else "none",
      float(case["cfg/qk_norm_eps"]) if qk_norm else _NORM_EPS,
      causal=causal,
      name=name,
    )

  def norm(name: str) -> RMSNorm:
    return RMSNorm(towers, dim, "mixer_norm", _NORM_EPS, name=name)

  layer = AttentionWithNorm(attention, norm)

  def run(params, x):
    x = x.reshape(rows, length, dim)
    stream = router.enter((x,))
    out: Any = layer.apply({"params": params}, stream, router, visibility)
    return router.leave(out)[0].reshape(-1, dim)

  hd = heads * width
  sizes = {"d": dim, "H": heads, "G": heads, "D": width, "HD": hd, "GD": hd}
  table = published.attention(qk_norm)
  return _compare(run, case, table, sizes, of_modality, covered)


def feed_forward_case(case: Case) -> dict[str, tuple[Any, Any]]:
  """SwiGLU of `mot_ffn`: ours and theirs by quantity.

  Args:
    case: arrays by name, without the case's prefix.

  Raises:
    UserError: a weight that does not fit the format.
  """
  towers, of_modality, modality, covered = _towers(case)
  dim, width = int(case["cfg/dim"]), int(case["cfg/hidden_dim_actual"])
  router = _router(towers, modality[None], covered[None])

  def ffn(name: str) -> FeedForward:
    return FeedForward(towers, dim, width, name=name)

  def norm(name: str) -> RMSNorm:
    return RMSNorm(towers, dim, "ffn_norm", _NORM_EPS, name=name)

  layer = FeedForwardWithNorm(ffn, norm)

  def run(params, x):
    out: Any = layer.apply({"params": params}, router.enter((x[None],)), router)
    return router.leave(out)[0][0]

  sizes = {"d": dim, "F": width}
  table = published.FEED_FORWARD
  return _compare(run, case, table, sizes, of_modality, covered)


def _compare(
  run: Callable[[Any, Any], Any],
  case: Case,
  table: Sequence[Entry],
  sizes: Mapping[str, int],
  towers: Sequence[str],
  covered: np.ndarray,
) -> dict[str, tuple[Any, Any]]:
  """Output and every gradient, in our layout; tokens in no mask left out."""

  def tree(prefix: str) -> Any:
    arrays = {
      name.removeprefix(prefix): array
      for name, array in case.items()
      if name.startswith(prefix) and name != "grad/x"
    }
    partial = prefix == "grad/"  # a file may keep some of them
    return from_published(table, arrays, sizes, towers, partial=partial)

  # The published code leaves such tokens zero; zeros in are zeros all through.
  inside = covered[:, None]
  for name in ("x", "out", "out_f64", "cotangent", "grad/x"):
    shape = (len(covered), sizes["d"])
    if name in case and case[name].shape != shape:
      raise UserError(
        f"{name} has shape {list(case[name].shape)}; it must be {list(shape)}"
      )
  x = np.where(inside, case["x"], 0).astype(np.float32)
  params = jax.tree.map(jnp.asarray, tree("w/"))

  @jax.jit
  def output_and_gradients(params, x, cotangent):
    out, pull = jax.vjp(run, params, x)
    return out, *pull(cotangent)

  gradients = [name for name in case if name.startswith("grad/")]
  cotangent = case["cotangent"] if gradients else np.zeros_like(x)
  out, d_params, d_x = output_and_gradients(
    params, x, np.where(inside, cotangent, 0).astype(np.float32)
  )
  truth = case["out_f64" if "out_f64" in case else "out"]
  # Where no mask covers a token the file may hold anything, NaN too.
  pairs = {"out": (out * inside, np.where(inside, truth, 0))}
  if "grad/x" in case:
    pairs["grad/x"] = (d_x * inside, np.where(inside, case["grad/x"], 0))
  theirs = jax.tree_util.tree_leaves_with_path(tree("grad/"))
  ours = dict(jax.tree_util.tree_leaves_with_path(d_params))
  for path, gradient in theirs:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    pairs[f"grad/{name}"] = (ours[path], gradient)
  return pairs


# A quantity has a pair, or a reason why it is not compared.
RUNNERS: Mapping[str, Callable[[Case], Mapping[str, tuple[Any, Any] | str]]] = {
  "mot_attention": attention_case,
  "mot_ffn": feed_forward_case,
  "transfusion": transfusion_case,
}


def system_of(path: Path) -> str | None:
  """The name of `RUNNERS` that a file is of: its stem, or what begins it.

  Args:
    path: `mot_ffn.npz`, or another file of the same system as `mot_ffn_b.npz`.
  """
  names = (n for n in RUNNERS if f"{path.stem}_".startswith(f"{n}_"))
  return max(names, key=len, default=None)


def run_file(path: Path, only: str = "*") -> list[Result]:
  """Runs every case of one file.

  A case that cannot be run is a failed result with the reason.

  Args:
    path: an `.npz` of a system of `RUNNERS`, see `system_of`.
    only: glob of `<file>/<case>`.

  Raises:
    UserError: a file that is no `.npz`, or of no such system.
  """
  system = system_of(path)
  if system is None:
    raise UserError(f"{path} is of no system in {', '.join(RUNNERS)}")
  cases: dict[str, dict[str, np.ndarray]] = {}
  try:
    with np.load(path, allow_pickle=False) as arrays:
      for key in arrays.files:
        name, _, what = key.partition("/")
        cases.setdefault(name, {})[what] = arrays[key]
  except (OSError, ValueError, EOFError, *_BROKEN) as error:
    raise UserError(f"{path} is no readable .npz ({error})") from error
  results = []
  for name, case in cases.items():
    full = f"{path.stem}/{name}"
    if fnmatch.fnmatch(full, only):
      results += _run_case(system, full, case)
  return results


def _run_case(system: str, full: str, case: Case) -> list[Result]:
  try:
    pairs = RUNNERS[system](case)
  except Exception as error:  # one case's fault is not the others'
    if isinstance(error, KeyError):
      reason = f"no array {error}"
    elif isinstance(error, UserError):
      reason = str(error)
    else:
      reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:300]
    return [Result(full, "", float("nan"), OUTPUT, False, reason)]
  results = []
  for quantity, pair in pairs.items():
    if isinstance(pair, str):
      nan = float("nan")
      results.append(Result(full, quantity, nan, OUTPUT, False, pair, True))
      continue
    tolerance = GRADIENT if quantity.startswith("grad/") else OUTPUT
    ours, theirs = (np.asarray(a, np.float64) for a in pair)
    error = np.abs(ours - theirs)
    allowed = tolerance.absolute + tolerance.relative * np.abs(theirs)
    passed = bool((error <= allowed).all())
    largest = float(error.max(initial=0.0))
    results.append(Result(full, quantity, largest, tolerance, passed))
  return results


def main(argv: Sequence[str] | None = None) -> int:
  """Prints a row per case and quantity; returns 1 where one failed, else 0."""
  parser = argparse.ArgumentParser(
    prog="python -m fusionlab.testing.conformance", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("folder", metavar="DIR", type=Path)
  parser.add_argument("--only", metavar="GLOB", default="*")
  options = parser.parse_args(argv)
  try:
    files = sorted(options.folder.glob("*.npz"))
    if not files:
      raise UserError(f"{options.folder} has no .npz files; give their folder")
    built = [path for path in files if system_of(path)]
    missing = [
      path.stem
      for path in files
      if path not in built
      and fnmatch.fnmatch(path.stem, options.only.partition("/")[0])
    ]
    results = [r for path in built for r in run_file(path, options.only)]
    if not (results or missing):
      stems = ", ".join(path.stem for path in files)
      raise UserError(
        f"--only {options.only!r} matches no case; cases are <file>/<case>, and"
        f" the files {stems}"
      )
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  table = Table()
  for column in ("case", "quantity", "largest error", "tolerance", "verdict"):
    table.add_column(column, no_wrap=column != "quantity", overflow="fold")
  for r in results:
    if r.reason:
      said = escape(f"{r.quantity or 'cannot be run'}: {r.reason}")
      table.add_row(r.case, said, "", "", r.verdict)
      continue
    error = f"{r.error:.1e}"
    table.add_row(r.case, r.quantity, error, str(r.tolerance), r.verdict)
  for stem in missing:
    table.add_row(stem, "", "", "", "not built")
  Console(width=132).print(table)
  passed = sum(r.passed for r in results)
  others = sum(r.other for r in results)
  failed = len(results) - passed - others
  said = f"{passed} passed, {failed} failed, {len(missing)} not built"
  print(f"{said}, {others} not compared" if others else said)
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(main())
