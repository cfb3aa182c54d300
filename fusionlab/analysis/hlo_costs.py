"""FLOPs and memory traffic of one instruction of a compiled program.

FLOPs are those of matrix products and convolutions, a multiply-add being two;
elementwise work is not counted. The rules are HloCostAnalysis' (xla/service/
hlo_cost_analysis.cc). Traffic is what top-level instructions read and write in the
device's main memory; caches may save some of it, so it is an upper bound.
"""

import functools
import json
import math
import re
from collections.abc import Iterable

import numpy as np

from fusionlab.analysis.hlo_text import Computation, Instruction, Module, Shape

# Move nothing: names for what is already there, or the end of what was started.
_FREE = frozenset({
  "after-all", "add-dependency", "bitcast", "call", "conditional", "constant",
  "domain", "get-tuple-element", "opt-barrier", "parameter", "partition-id",
  "replica-id", "tuple", "while",
})  # fmt: skip
# Custom calls of the compiler's own bookkeeping.
BOOKKEEPING = frozenset({
  "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone",
  "AsyncCollectiveStart", "ConcatBitcast", "GatherScatterIndicesBitpacked",
  "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "ZeroCrop",
})  # fmt: skip
_VIEWS = ("bitcast", "copy", "convert", "reshape", "transpose")
_SLICES = ("dynamic-slice", "gather", "slice")


def dot_flops(output: int, left: Shape, contracting: Iterable[int]) -> int:
  """2·M·N·K of a dot whose result has `output` elements."""
  return 2 * output * math.prod(left.dims[d] for d in contracting)


def _window(text: str, key: str, rank: int, default: int) -> tuple[int, ...]:
  found = re.search(rf"(?:^|[ {{]){key}=([\dx\-]+)", text)
  if not found:
    return (default,) * rank
  return tuple(int(n) for n in found[1].split("x"))


@functools.lru_cache(maxsize=4096)
def _positions(
  size: int,
  kernel: int,
  out: int,
  stride: int,
  low: int,
  base: int,
  dilate: int,
) -> int:
  """Pairs of (output, kernel) positions that meet an element of the input."""
  at = np.arange(out)[:, None] * stride - low + np.arange(kernel) * dilate
  inside = (at >= 0) & (at <= (size - 1) * base) & (at % base == 0)
  return int(inside.sum())


def convolution_flops(
  instruction: Instruction, left: Shape, right: Shape
) -> int:
  """FLOPs of a convolution; padding and dilation count nothing.

  Args:
    instruction: with `dim_labels=`, and `window=` where there are spatial
      dimensions. TPU's matrix products are convolutions, batched ones with the
      batch as a dilated spatial dimension.
    left: the input.
    right: the kernel.
  """
  labels = instruction.attribute("dim_labels")
  left_labels, right_labels, out_labels = re.split(r"_|->", labels)
  rank = len(left_labels) - 2
  window = re.search(r"window=(\{[^}]*\})", instruction.attributes)
  text = window[1] if window else ""
  pads = re.search(r"pad=([\d_x\-]+)", text)
  low = (
    [int(p.split("_")[0]) for p in pads[1].split("x")] if pads else [0] * rank
  )
  strides = _window(text, "stride", rank, 1)
  bases = _window(text, "lhs_dilate", rank, 1)
  dilates = _window(text, "rhs_dilate", rank, 1)
  out = instruction.shapes[0]
  pairs = 1
  for i in range(rank):
    pairs *= _positions(
      left.dims[left_labels.index(str(i))],
      right.dims[right_labels.index(str(i))],
      out.dims[out_labels.index(str(i))],
      strides[i],
      low[i],
      bases[i],
      dilates[i],
    )
  features = int(instruction.attribute("feature_group_count") or 1)
  batches = int(instruction.attribute("batch_group_count") or 1)
  return (
    2
    * (left.dims[left_labels.index("f")] // features)
    * out.dims[out_labels.index("f")]
    * (left.dims[left_labels.index("b")] // batches)
    * pairs
  )


def custom_call_cost(
  instruction: Instruction, operands: tuple[Shape, ...]
) -> tuple[int | None, int | None]:
  """FLOPs and bytes that a custom call states; None where it states none.

  Read are a Pallas kernel's `cost_estimate` (TPU), `flops` of other configs, the
  dimension numbers of cuBLAS, and the scores' shape of cuDNN's attention: two
  products forward and five backward, a causal mask sparing half.
  """
  target = instruction.target
  # Some print their config as a string with escaped quotes, some (what jax wrote
  # in Python) with a space after a colon.
  config = instruction.attributes.replace('\\"', '"')
  gemm = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', config)
  if "cublas" in target and gemm:
    dims = [int(d) for d in re.findall(r"\d+", gemm[1])]
    output = math.prod(instruction.shapes[0].dims)
    return dot_flops(output, operands[0], dims), None
  scores = re.search(r'"dimensions":\s*\[([^\]]*)\]', config)
  if target.startswith("__cudnn$fmha") and scores:
    size = math.prod(int(d) for d in re.findall(r"\d+", scores[1]))
    products = 5 if "Backward" in target else 2
    flops = products * 2 * size * operands[0].dims[-1]
    return flops // (2 if 'CAUSAL"' in config else 1), None
  estimate = re.search(r'"cost_estimate":\s*(\{[^}]*\})', config)
  if estimate:
    stated = json.loads(estimate[1])
    return int(stated.get("flops", 0)), int(stated.get("bytes_accessed", 0))
  flops = re.search(r'"flops":\s*"?([\d.e+]+)', config)
  return (int(float(flops[1])) if flops else None), None


def skipped_step(computation: Computation, instruction: Instruction) -> bool:
  """Whether a collective is the middle or the end of one counted elsewhere.

  TPU runs a collective beside other work as fusions that each hold a copy of it:
  one starts it, some carry it on, one waits for it. The start counts.
  """
  if "async_collective_fusion_config" not in instruction.attributes:
    return False
  users = computation.users[instruction.name]
  return not any(user.target == "AsyncCollectiveStart" for user in users)


class Traffic:
  """Bytes of main memory that instructions of a module read and write.

  Args:
    module: where TPU's layouts name a memory space that is not the main one (on
      the chip, scalars, the host's), arrays there cost nothing. Elsewhere all
      spaces but the host's (5) are main memory.
  """

  def __init__(self, module: Module):
    self.module = module

  def _of(self, shapes: Iterable[Shape]) -> float:
    other = (
      (lambda s: s.space != 0)
      if self.module.tiled
      else (lambda s: s.space == 5)
    )
    return float(sum(s.stored_bytes for s in shapes if not other(s)))

  def of(self, computation: Computation, instruction: Instruction) -> float:
    """Bytes of one execution; nothing for what only runs other computations."""
    opcode = instruction.opcode
    operands = computation.operand_shapes(instruction)
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return 0.0
    if opcode == "fusion":
      return self._fusion(computation, instruction)
    if instruction.callees or instruction.target in BOOKKEEPING:
      return 0.0
    first = operands[:1]
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
      # The result holds the destination beside the source and a flag.
      place = 0 if opcode == "copy-start" else len(operands)
      moved = instruction.shapes[place]
      return self._of([moved, self._like(moved, first[0])])
    if opcode == "all-reduce-start":
      return self._of(operands) + self._of(instruction.shapes)
    if opcode.endswith("-start"):
      return self._of(instruction.shapes)  # operands and results in one tuple
    if opcode in _SLICES:
      taken = instruction.shapes[0]
      read = self._of([self._like(taken, first[0])])
      return read + self._of(instruction.shapes) + self._of(operands[1:2])
    if opcode == "dynamic-update-slice":
      return self._of(operands[1:2]) + self._of(
        [self._like(operands[1], first[0])]
      )
    if opcode == "scatter":
      # Updates and indices are read, the rows they meet read and written.
      arrays = (len(operands) - 1) // 2
      updates = operands[arrays + 1 :]
      return self._of(operands[arrays:]) + 2 * self._of(updates)
    if opcode == "custom-call":
      _, stated = custom_call_cost(instruction, operands)
      if stated:
        return float(stated)
      if instruction.shapes[1:] and instruction.shapes[-1].dtype in (
        "s8",
        "u8",
      ):
        # cuBLAS and cuDNN return their scratch space last.
        return self._of(operands) + self._of(instruction.shapes[:-1])
    return self._of(operands) + self._of(instruction.shapes)

  def _like(self, part: Shape, whole: Shape) -> Shape:
    """A part of an array, lying where the array lies."""
    return Shape(part.dtype, part.dims, part.layout, part.tile, whole.space)

  def _fusion(self, outer: Computation, instruction: Instruction) -> float:
    inner = self.module.computations[instruction.callees[0]]
    total = 0.0
    for parameter, name in zip(
      inner.parameters, instruction.operands, strict=True
    ):
      shapes = outer.instructions[name].shapes
      total += self._read(inner, parameter, shapes)
    root = inner.instructions[inner.root]
    leaves = (
      [inner.instructions[name] for name in root.operands]
      if root.opcode == "tuple"
      else [root]
    )
    return total + sum(self._written(inner, leaf) for leaf in leaves)

  def _read(
    self, inner: Computation, value: Instruction, whole: tuple[Shape, ...]
  ) -> float:
    """Bytes that a fusion reads of one operand: slices where it only slices."""
    total = 0.0
    for user in inner.users[value.name]:
      first = user.operands[0] == value.name
      if user.opcode in _SLICES and first:
        total += self._of([self._like(user.shapes[0], whole[0])])
      elif self._reads_nothing(inner, user, value):
        continue
      elif user.opcode in _VIEWS and user.name != inner.root:
        total += self._read(inner, user, whole)
      elif user.opcode == "fusion":
        nested = self.module.computations[user.callees[0]]
        total += sum(
          self._read(nested, nested.parameters[i], whole)
          for i, name in enumerate(user.operands)
          if name == value.name
        )
      else:
        return self._of(whole)
    return min(total, self._of(whole))

  def _reads_nothing(
    self, inner: Computation, user: Instruction, value: Instruction
  ) -> bool:
    """Whether an operand is updated in place, or only passed on."""
    if user.opcode == "dynamic-update-slice":
      return user.operands[0] == value.name
    return value.opcode == "parameter" and (
      user.opcode in ("tuple", "get-tuple-element")
      or user.target in BOOKKEEPING
      or skipped_step(inner, user)
    )

  def _written(self, inner: Computation, leaf: Instruction) -> float:
    """Bytes that a fusion writes of one result: the slice where it updates."""
    value = leaf
    while value.opcode in _VIEWS:
      value = inner.instructions[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
      part = inner.instructions[value.operands[1]].shapes[0]
      return self._of([self._like(part, leaf.shapes[0])])
    if leaf.opcode == "parameter" or skipped_step(inner, leaf):
      return 0.0
    if leaf.target == "AsyncCollectiveDone":
      return 0.0
    if leaf.target == "AsyncCollectiveStart":
      return self._of(leaf.shapes[1:2])
    return self._of(leaf.shapes)
