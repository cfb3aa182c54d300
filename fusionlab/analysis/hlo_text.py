"""The text of a compiled XLA module, read into computations and instructions.

It reads what `compiled.as_text()` prints on CPU, GPU and TPU; attributes stay text
until somebody asks for one. Grammar: https://openxla.org/xla/operation_semantics and
the printer in xla/hlo/ir/hlo_instruction.cc.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from fusionlab.errors import UserError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%?([^\s,()]+)$")


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array's type as a device holds it.

  Attributes:
    dtype: XLA's name, 'bf16'.
    dims: sizes, outermost first; a bounded dynamic size is its bound.
    layout: dimension numbers from the fastest varying one on; () where none is
      printed.
    tile: TPU: the tile that the layout's last dimensions are padded to.
    space: memory space; 0 is the device's main memory.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = 0

  @functools.cached_property
  def bytes(self) -> int:
    """Bytes of the values, without padding."""
    return -(-math.prod(self.dims) * dtype_bits(self.dtype) // 8)

  @functools.cached_property
  def stored_bytes(self) -> int:
    """Bytes in memory, tiles' padding included."""
    if not self.tile or len(self.layout) != len(self.dims):
      return self.bytes
    physical = [self.dims[d] for d in reversed(self.layout)]
    lead = len(self.tile) - len(physical)
    physical = [1] * lead + physical
    for i, tile in enumerate(reversed(self.tile), 1):
      physical[-i] = -(-physical[-i] // tile) * tile
    return -(-math.prod(physical) * dtype_bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without its '%'.
    opcode: 'fusion', 'all-gather-start', …
    shapes: of the result; a tuple's leaves in order.
    operands: names; of a constant or parameter, none.
    literal: what stands between the parentheses.
    attributes: the rest of the line.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  def attribute(self, key: str) -> str:
    """An attribute's value up to the next comma or brace; '' without it."""
    found = re.search(rf"(?:^|[ ,]){key}=%?([^\s,}}]+)", self.attributes)
    return found[1] if found else ""

  def braces(self, key: str) -> tuple[str, ...]:
    """The entries of an attribute that is printed in braces; () without it."""
    found = re.search(rf"(?:^|[ ,]){key}=\{{([^}}]*)\}}", self.attributes)
    return tuple(re.findall(r"[^\s,%]+", found[1])) if found else ()

  def numbers(self, key: str) -> tuple[int, ...]:
    """The numbers of an attribute in braces."""
    return tuple(int(n) for n in self.braces(key))

  @property
  def op_name(self) -> str:
    """Where the program says it comes from; '' where it says nothing."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def target(self) -> str:
    """What a custom-call calls; '' of any other instruction."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def callees(self) -> tuple[str, ...]:
    """Computations that run once when this instruction does."""
    kind = self.opcode.removesuffix("-start")
    if kind not in ("fusion", "call", "async", "custom-call"):
      return ()
    keys = ("calls", "to_apply", "called_computations")
    names = [self.attribute(key) for key in keys[:2]]
    return (*(n for n in names if n), *self.braces(keys[2]))


@dataclasses.dataclass(frozen=True)
class Computation:
  """A function of the module.

  Attributes:
    name: without its '%'.
    instructions: by name, in the order of the text.
    root: the name of its result.
    users: name -> the instructions that take it as an operand.
  """

  name: str
  instructions: Mapping[str, Instruction]
  root: str

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """Which instructions read each one."""
    users: dict[str, list[Instruction]] = {n: [] for n in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users.setdefault(operand, []).append(instruction)
    return {name: tuple(of) for name, of in users.items()}

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """Its parameters by number."""
    found = [i for i in self.instructions.values() if i.opcode == "parameter"]
    return tuple(sorted(found, key=lambda i: int(i.literal)))

  def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
    """Shapes of all operands; a tuple's leaves one after another."""
    return tuple(
      shape
      for name in instruction.operands
      for shape in self.instructions[name].shapes
    )


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    name: 'jit_train_step'.
    computations: by name.
    entry: name of the one that runs.
    num_partitions: devices the program is split over.
    tiled: whether layouts have tiles, as TPU's do.
  """

  name: str
  computations: Mapping[str, Computation]
  entry: str
  num_partitions: int
  tiled: bool


def dtype_bits(dtype: str) -> int:
  """Bits of an element: 's4' 4, 'bf16' 16, 'f8e4m3fn' 8, 'pred' 8."""
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.match(r"(?:bf|f|s|u)(\d+)", dtype)
  if not found:
    raise UserError(f"unknown element type {dtype!r} in the compiled program")
  return int(found[1])


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Every array in the text of a type, in order.

  Args:
    text: 'f32[8,4]{1,0:T(8,128)S(1)}' or a tuple of such.
  """
  return tuple(
    _shape(dtype, dims, layout) for dtype, dims, layout in _SHAPE.findall(text)
  )


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
  order, _, rest = layout.partition(":")
  tile, space = _TILE.search(rest), _SPACE.search(rest)
  return Shape(
    dtype,
    tuple(int(d.strip("<= ")) for d in dims.split(",") if d),
    tuple(int(d) for d in order.split(",") if d),
    tuple(int(d) for d in tile[1].split(",")) if tile else (),
    int(space[1]) if space else 0,
  )


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth, quoted = 0, False
  for i in range(start, len(text)):
    c = text[i]
    if c == '"' and text[i - 1] != "\\":
      quoted = not quoted
    elif quoted:
      continue
    elif c == "(":
      depth += 1
    elif c == ")":
      depth -= 1
      if not depth:
        return i
  raise UserError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def _operands(literal: str) -> tuple[str, ...]:
  """Names between the parentheses, printed with their types or without."""
  names, depth, start = [], 0, 0
  for i, c in enumerate(literal + ","):
    depth += (c in "([{") - (c in ")]}")
    if c == "," and not depth:
      found = _OPERAND.search(literal[start:i].strip())
      if found:
        names.append(found[1])
      start = i + 1
  return tuple(names)


def _computation(name: str, lines: list[str]) -> Computation:
  instructions: dict[str, Instruction] = {}
  root = ""
  for line in lines:
    found = _INSTRUCTION.match(line)
    if found:
      root = found[2] if found[1] or not root else root
      instructions[found[2]] = _instruction(line, found.end(), found[2])
  return Computation(name, instructions, root)


def _instruction(line: str, start: int, name: str) -> Instruction:
  if line[start] == "(":
    end = _closing(line, start) + 1
  else:
    end = line.index(" ", start)
  opcode = _OPCODE.match(line, end)
  if not opcode:
    raise UserError(f"unreadable HLO instruction: {line.strip()[:120]!r}")
  opened = opcode.end() - 1
  closed = _closing(line, opened)
  literal = _INDEX_COMMENT.sub("", line[opened + 1 : closed])
  leaf = opcode[1] in ("parameter", "constant", "iota")
  return Instruction(
    name,
    opcode[1],
    parse_shapes(line[start:end]),
    () if leaf else _operands(literal),
    literal,
    line[closed + 1 :].lstrip(", "),
  )


def parse(text: str) -> Module:
  """Reads a module.

  Args:
    text: `compiled.as_text()`.

  Raises:
    UserError: it is no HLO module, or a line of it cannot be read.
  """
  lines = text.splitlines()
  if not lines or not lines[0].startswith("HloModule "):
    raise UserError("not the text of an HLO module: no 'HloModule' line")
  computations: dict[str, Computation] = {}
  entry = ""
  current: tuple[str, list[str]] | None = None
  for line in lines[1:]:
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = (header[2], [])
        entry = header[2] if header[1] else entry
    elif line.rstrip() == "}":
      computations[current[0]] = _computation(*current)
      current = None
    elif _INSTRUCTION.match(line):
      current[1].append(line)
    elif current[1]:
      # Attributes may hold text of several lines (a Pallas kernel's metadata).
      current[1][-1] += " " + line
  if not entry:
    raise UserError("the HLO module has no ENTRY computation")
  partitions = re.search(r"num_partitions=(\d+)", lines[0])
  return Module(
    lines[0].split()[1].rstrip(","),
    computations,
    entry,
    int(partitions[1]) if partitions else 1,
    ":T(" in text,
  )
