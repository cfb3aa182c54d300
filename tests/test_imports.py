"""Imports go one way, files explain themselves, nothing leaks in.

Read from the syntax trees, so a forbidden import counts wherever it stands, in a
function too.
"""

import ast
import configparser
import functools
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("fusionlab", "kernels_pallas", "configs", "experiments")
FILES = sorted(
  path.relative_to(ROOT)
  for package in (*PACKAGES, "tests")
  for path in (ROOT / package).rglob("*.py")
)
SOURCES = [path for path in FILES if path.parts[0] != "tests"]

# Room -> what it must not import. A room is a prefix of a module's name.
FORBIDDEN = {
  "fusionlab.nn": [
    "fusionlab.models",
    "fusionlab.objectives",
    "fusionlab.data",
    "fusionlab.train",
    "fusionlab.evaluate",
    "fusionlab.tokenizers",
    "fusionlab.experiment",
  ],
  "fusionlab.models": [
    "fusionlab.data",
    "fusionlab.train",
    "fusionlab.evaluate",
    "fusionlab.tokenizers",
    "fusionlab.experiment",
  ],
  "fusionlab.objectives": [
    "fusionlab.data",
    "fusionlab.train",
    "fusionlab.evaluate",
    "fusionlab.tokenizers",
    "fusionlab.models.mixture_of_transformers",
  ],
  "fusionlab.data": [
    "fusionlab.nn",
    "fusionlab.objectives",
    "fusionlab.train",
    "fusionlab.evaluate",
    "fusionlab.models",
  ],
  "fusionlab.tokenizers": [
    "fusionlab.models",
    "fusionlab.objectives",
    "fusionlab.train",
    "fusionlab.evaluate",
  ],
  "fusionlab.train": [
    "fusionlab.models.mixture_of_transformers",
    "fusionlab.models.transformer",
    "kernels_pallas",
  ],
  "fusionlab.analysis": ["fusionlab.data", "fusionlab.train", "fusionlab.nn"],
  "fusionlab.evaluate": [
    "fusionlab.nn",
    "fusionlab.models.mixture_of_transformers",
    "fusionlab.train.loop",
    "kernels_pallas",
  ],
  "fusionlab.generation": [
    "fusionlab.objectives",
    "fusionlab.evaluate",
    "fusionlab.report",
    "fusionlab.models.mixture_of_transformers",
    "fusionlab.train.loop",
    "kernels_pallas",
  ],
  "fusionlab.report": [
    "jax",
    "flax",
    "fusionlab.nn",
    "fusionlab.models",
    "fusionlab.objectives",
    "fusionlab.data",
    "fusionlab.train",
    "fusionlab.evaluate",
    "fusionlab.tokenizers",
    "fusionlab.sharding",
    "fusionlab.routing",
    "fusionlab.batch",
    "kernels_pallas",
  ],
  "fusionlab.interop": [
    "fusionlab.data",
    "fusionlab.nn",
    "fusionlab.objectives",
    "fusionlab.train.loop",
    "fusionlab.train.setup",
    "fusionlab.train.step",
  ],
  "fusionlab.sharding": [
    "fusionlab.models",
    "fusionlab.data",
    "fusionlab.train",
    "fusionlab.objectives",
  ],
  "fusionlab": [
    "configs",
    "experiments",
    "tests",
    "ml_collections",
    "absl.app",
    "absl.flags",
  ],
  "kernels_pallas": ["fusionlab", "configs", "experiments", "tests", "flax"],
  "configs": [
    "experiments",
    "tests",
    "fusionlab.train.loop",
    "fusionlab.nn",
    "kernels_pallas",
  ],
  "": ["tensorflow", "torch", "clu"],
}


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
  return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_of(path: pathlib.Path) -> str:
  parts = path.with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: pathlib.Path) -> set[str]:
  """Every module that a file may import: of `from a import b`, a and a.b."""
  names = set()
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno} is a relative import"
      names.add(node.module)
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def within(name: str, room: str) -> bool:
  return not room or name == room or name.startswith(room + ".")


def violations(path: pathlib.Path) -> list[str]:
  module = module_of(path)
  return sorted(
    f"{path} ({room or 'every file'}) imports {name}"
    for room, forbidden in FORBIDDEN.items()
    if within(module, room)
    for name in imports_of(path)
    if any(within(name, other) for other in forbidden)
    # The house's whole configuration is one dataclass of every room's; a
    # room's own program (python -m) reads flags.
    and module != "fusionlab.experiment"
    and not (module.endswith(".__main__") and within(name, "absl"))
    and not (module.endswith(".__main__") and within(name, "ml_collections"))
  )


@pytest.mark.smoke
def test_imports_go_one_way():
  found = [line for path in SOURCES for line in violations(path)]
  assert not found, "\n".join(found)


def test_every_package_that_is_imported_is_required():
  """setup.cfg names what the wheel imports, in install_requires or an extra."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  lines = setup["options"]["install_requires"].split()
  for extra in setup["options.extras_require"].values():
    lines += extra.split()
  required = {canonical(re.split(r"[\[>=<]", line)[0]) for line in lines}
  distributions = importlib.metadata.packages_distributions()
  missing = {
    f"{path} imports {name}"
    for path in SOURCES
    for name in {n.partition(".")[0] for n in imports_of(path)}
    if name not in sys.stdlib_module_names and name not in PACKAGES
    if not required & {canonical(d) for d in distributions.get(name, [name])}
  }
  assert not missing, "\n".join(sorted(missing))


def canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def test_only_the_gate_of_an_operation_imports_its_implementations():
  found = []
  for path in FILES:
    module = module_of(path)
    for name in imports_of(path):
      parts = name.split(".")
      if not (ROOT / "/".join(parts[:3])).with_suffix(".py").is_file():
        continue
      if parts[0] != "kernels_pallas" or len(parts) < 3:
        continue
      inside = within(module, ".".join(parts[:2]))
      in_tests = path.parts[:2] == ("tests", "kernels_pallas")
      if parts[2] not in ("api", "reference") and not (inside or in_tests):
        found.append(f"{path} imports {name}")
  assert not found, "\n".join(found)


def test_only_sharding_names_a_mesh_axis():
  """A mesh axis as a string occurs nowhere else (design: rules are one place).

  But in the formulas of what those rules send along each axis.
  """
  found = []
  formulas = pathlib.Path("fusionlab", "analysis", "step_costs.py")
  for path in SOURCES:
    if path.parts[:2] == ("fusionlab", "sharding") or path == formulas:
      continue
    for node in ast.walk(tree(path)):
      if isinstance(node, ast.Constant) and node.value == "fsdp":
        found.append(f"{path}:{node.lineno}")
  assert not found, "\n".join(found)


def test_every_module_says_what_it_is():
  found = [
    str(path)
    for path in FILES
    if tree(path).body and not ast.get_docstring(tree(path))
  ]
  assert not found, "no module docstring: " + ", ".join(found)


def is_protocol(node: ast.ClassDef) -> bool:
  return any(getattr(base, "id", "") == "Protocol" for base in node.bases)


def public_definitions(node: ast.Module | ast.ClassDef):
  """Public functions, classes and methods, as (name, node).

  A method that implements a documented one of a base class or of a Protocol in
  the same file is documented there.
  """
  classes = {c.name: c for c in node.body if isinstance(c, ast.ClassDef)}
  for child in node.body:
    if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
      continue
    if child.name.startswith("_"):
      continue
    yield child.name, child
    if isinstance(child, ast.ClassDef):
      bases = [classes.get(getattr(b, "id", "")) for b in child.bases]
      bases += [c for c in classes.values() if is_protocol(c)]
      inherited = {
        method.name
        for base in bases
        if base is not None and base is not child
        for method in base.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
      }
      for name, method in public_definitions(child):
        if name not in inherited:
          yield f"{child.name}.{name}", method


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_has_a_docstring(package):
  found = [
    f"{path}:{node.lineno} {name}"
    for path in SOURCES
    if path.parts[0] == package
    for name, node in public_definitions(tree(path))
    if not ast.get_docstring(node)
  ]
  assert not found, "\n".join(found)


def test_every_file_can_be_read_in_one_sitting():
  long = {
    str(path): lines
    for path in FILES
    if (lines := len((ROOT / path).read_text().splitlines())) > 450
  }
  assert not long, f"over 450 lines: {long}"


# Spelled in pieces, so that this file passes its own test.
WORDS = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]
PATHS = re.compile(r"(?<![\w.~])/(?:work|root|home|Users|mnt)/\w")


def test_no_machine_path_and_no_unfinished_business():
  texts = [
    *FILES,
    *(p.relative_to(ROOT) for p in ROOT.glob("*.md")),
    *(p.relative_to(ROOT) for p in (ROOT / "docs").rglob("*.md")),
    pathlib.Path("setup.cfg"),
    pathlib.Path("pyproject.toml"),
    pathlib.Path("Makefile"),
    pathlib.Path(".ci/run"),
  ]
  found = []
  for path in texts:
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
      words = [w for w in WORDS if re.search(rf"\b{w}\b", line)]
      if words or PATHS.search(line):
        found.append(f"{path}:{number}: {line.strip()}")
  assert not found, "\n".join(found)


def test_no_file_is_called_utils():
  assert not [p for p in FILES if p.stem in ("utils", "util", "helpers")]


def test_user_input_is_not_asserted():
  """`assert` vanishes under -O; the library raises UserError instead."""
  found = [
    f"{path}:{node.lineno}"
    for path in SOURCES
    for node in ast.walk(tree(path))
    if isinstance(node, ast.Assert)
  ]
  assert not found, "\n".join(found)
