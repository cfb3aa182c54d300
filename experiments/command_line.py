"""What the user typed becomes a validated `Experiment`, or one line of advice.

`ml_collections.config_flags` reads `--config=FILE[:ARGUMENT]` and overrides such
as `--config.model.dim=256`. Its own messages name neither the key's neighbours
nor its type, so keys are checked here before it sees them and its type errors
are said again in full.
"""

import dataclasses
import difflib
import glob
import inspect
import os
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_dict, config_flags

from experiments import generation_flags
from fusionlab.config import flatten, from_mapping, to_mapping
from fusionlab.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
  from fusionlab.experiment import Experiment
  from fusionlab.generation.config import Request

MODES = ("train", "evaluate", "generate", "summary", "compile")
# Modes that take a trained run; they need no --config.
_OF_A_RUN = ("evaluate", "generate")
_EXAMPLE = "--config=configs/mot_chameleon.py"
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_ILLEGAL = re.compile(r"flag --config\.([\w.]+)=(.*?): ", re.DOTALL)
_TYPES = {
  int: "an integer",
  float: "a number",
  bool: "true or false",
  tuple: "values with commas between them",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """A command line that was understood.

  Attributes:
    mode: one of `MODES`.
    workdir: folder of the run.
    experiment: the configuration; None where a mode of a run has no `--config`.
    request: of `--mode=generate`.
    json: of `--mode=compile`: print JSON instead of tables.
    target_config: of `--mode=compile` for GPUs: a file that describes the card;
      "" for the preset's own.
  """

  mode: str
  workdir: str
  experiment: "Experiment | None"
  request: "Request | None" = None
  json: bool = False
  target_config: str = ""


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
  """Declares the command line's flags in `values`.

  Args:
    values: where the flags live.
    argv: the whole command line; config_flags takes the overrides from it.
  """
  define_config(values, argv, _experiment)
  flags.DEFINE_string("mode", "train", " | ".join(MODES), flag_values=values)
  flags.DEFINE_bool(
    "json", False, "--mode=compile prints JSON", flag_values=values
  )
  flags.DEFINE_string(
    "target_config",
    None,
    "--mode=compile for GPUs: XLA's description of the card, as a file",
    flag_values=values,
  )
  generation_flags.define(values)


def define_config(
  values: flags.FlagValues, argv: Sequence[str], schema: Callable[[], type]
) -> None:
  """Declares `--config`, `--workdir` and `--debug`.

  Args:
    values: where the flags live.
    argv: the whole command line; config_flags takes the overrides from it.
    schema: returns the dataclass that the config file describes.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    "the experiment: a file of configs/, with ':SIZE' for another size",
    flag_values=values,
    sys_argv=list(argv),
  )
  values["config"].parser = _ConfigFile(argv, schema)
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run (default runs/<config>); the same one again resumes",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "debug", False, "show the traceback of an error", flag_values=values
  )


def _experiment() -> type:
  from fusionlab.experiment import Experiment

  return Experiment


def parse(values: flags.FlagValues, argv: Sequence[str]) -> Options:
  """Reads a command line.

  Args:
    values: the flags, as `define_flags` declared them.
    argv: the program's name and its arguments.

  Raises:
    UserError: anything misspelt, ill-typed, out of range or missing.
  """
  config, workdir = parse_config(values, argv)
  mode = str(values["mode"].value)
  if mode not in MODES:
    raise UserError(f"unknown mode --mode={mode}{nearest(mode, MODES)}")
  if config is None and mode not in _OF_A_RUN:
    raise UserError(f"--config is missing; try {_EXAMPLE}")
  if not workdir:
    raise UserError(f"--mode={mode} needs the --workdir of a run")
  request = None
  if mode == "generate":
    request = generation_flags.read(values)
  elif given := generation_flags.given(values):
    raise UserError(f"--{given[0]} is for --mode=generate, not --mode={mode}")
  if values["json"].value and mode != "compile":
    raise UserError(f"--json is for --mode=compile, not --mode={mode}")
  target = values["target_config"].value
  if target is not None and mode != "compile":
    raise UserError(f"--target_config is for --mode=compile, not --mode={mode}")
  if target == "":
    raise UserError("--target_config= is empty; give a file, or leave it out")
  return Options(
    mode, workdir, config, request, bool(values["json"].value), target or ""
  )


def parse_config(
  values: flags.FlagValues, argv: Sequence[str]
) -> tuple[Any, str]:
  """Reads the flags, and what `--config` and `--workdir` say.

  Args:
    values: the flags, `define_config`'s among them.
    argv: the program's name and its arguments.

  Returns:
    The schema's dataclass, or None without `--config`; and the workdir, by
    default runs/<config>, or "" where neither is given.

  Raises:
    UserError: anything misspelt, ill-typed or out of range.
  """
  try:
    rest = values(list(argv))[1:]
  except flags.UnrecognizedFlagError as error:
    if error.flagname.startswith("config."):
      raise UserError(
        f"--{error.flagname} changes a config, but none is given; add {_EXAMPLE}"
      ) from error
    raise UserError(str(error)) from error
  except flags.IllegalFlagValueError as error:
    raise UserError(_explain_type(str(error), values)) from error
  except (flags.Error, ValueError) as error:
    raise UserError(str(error)) from error
  except SyntaxError as error:
    # From config_flags' literal_eval of a tuple's text.
    raise UserError(
      f"a sequence cannot be read: {error.text!r}; write {_TYPES[tuple]}"
    ) from error
  if rest:
    raise UserError(
      f"{rest[0]!r} is not a flag; a config is given as {_EXAMPLE}"
    )
  workdir, parser = str(values["workdir"].value or ""), values["config"].parser
  if not isinstance(parser, _ConfigFile) or values["config"].value is None:
    return None, workdir
  config = from_mapping(parser.schema(), values["config"].value.to_dict())
  return config, workdir or os.path.join("runs", parser.run_name)


class _ConfigFile(flags.ArgumentParser):
  """Loads the file that `--config` names and checks the keys of overrides."""

  def __init__(self, argv: Sequence[str], schema: Callable[[], type]):
    super().__init__()
    self.schema = schema
    self.overrides = _overrides(argv)
    self.run_name = ""

  def parse(self, argument: str) -> config_dict.ConfigDict:
    file, _, size = argument.partition(":")
    mapping = load_config(file, size)
    self.run_name = os.path.splitext(os.path.basename(file))[0]
    # An argument may be a folder; its own name says enough.
    self.run_name += f"_{os.path.basename(size.rstrip('/'))}" if size else ""
    # A `kind` decides which keys its section has, and one under a new name adds
    # a source: both must stand before the other keys are looked at.
    for key, value in self.overrides.items():
      if value and re.fullmatch(
        r"(model|objective|data\.sources\.\w+)\.kind", key
      ):
        if key in ("model.kind", "objective.kind"):
          _forget_defaults(mapping, key.removesuffix(".kind"))
        *sections, last = key.split(".")
        node = mapping
        for section in sections:
          node = node.setdefault(section, {})
        node[last] = value
    full = to_mapping(from_mapping(self.schema(), mapping))
    for key in self.overrides:
      _check_key(full, key)
    return config_dict.ConfigDict(full).lock()


def _forget_defaults(mapping: dict[str, Any], section: str) -> None:
  """Drops what a section has from its kind's own defaults.

  The defaults of the kind that takes its place are then used instead.
  """
  from fusionlab.experiment import Experiment

  old = getattr(Experiment.from_mapping(mapping), section)
  defaults = to_mapping(type(old)())
  mapping[section] = {
    key: value
    for key, value in mapping[section].items()
    if value != defaults[key]
  }


def load_config(file: str, argument: str = "") -> dict[str, Any]:
  """Runs a config file's `get_config` and returns the plain mapping.

  Args:
    file: path of a Python file.
    argument: what stood behind the colon; '' calls `get_config()`.

  Raises:
    UserError: no such file (with the nearest), one that cannot be run or has no
      `get_config`, or an argument that it does not take.
  """
  if not os.path.isfile(file):
    folder = os.path.dirname(file) or "."
    found = {*glob.glob(f"{folder}/*.py"), *glob.glob("configs/*.py")}
    found = {f for f in found if not f.endswith("__init__.py")}
    raise UserError(f"no config file {file!r}{nearest(file, found)}")
  try:
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
      raise UserError(f"{file} has no function get_config(); see configs/")
    if argument and not inspect.signature(get_config).parameters:
      raise UserError(f"{file} takes no argument, got ':{argument}'")
    config = get_config(argument) if argument else get_config()
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    if isinstance(error, ModuleNotFoundError) and not _ours(error.name):
      raise  # a package to install
    reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{file} cannot be run: {reason}") from error
  if isinstance(config, config_dict.ConfigDict):
    config = config.to_dict()
  if not isinstance(config, Mapping):
    raise UserError(f"get_config() of {file} must return a ConfigDict")
  return dict(config)


def _ours(module: str | None) -> bool:
  return (module or "").partition(".")[0] in ("fusionlab", "kernels_pallas")


def _overrides(argv: Sequence[str]) -> dict[str, str | None]:
  """Keys after `--config.`, with their text (None where it cannot be told)."""
  found = {}
  for i, word in enumerate(argv):
    if word == "--":
      break
    if match := _OVERRIDE.fullmatch(word):
      key, value = match.groups()
      following = argv[i + 1] if i + 1 < len(argv) else None
      found[key] = following if value is None else value
  return found


def _check_key(config: Mapping[str, Any], key: str) -> None:
  """Raises ConfigError unless `key` names one value of `config`."""
  node, path = config, "config"
  for part in key.split("."):
    if not isinstance(node, Mapping):
      raise ConfigError(f"{path} is one value; it has no key {part!r}")
    if part not in node:
      raise ConfigError(
        f"unknown key {path}.{part}{_suggest(config, node, path, part)}"
      )
    node, path = node[part], f"{path}.{part}"
  if isinstance(node, Mapping):
    first = next(iter(flatten(node, f"{path}.")), f"{path}.NAME")
    raise ConfigError(f"{path} is a section; set a key of it, e.g. --{first}=…")


def _suggest(
  config: Mapping[str, Any], node: Mapping[str, Any], path: str, part: str
) -> str:
  """Nearest key of the same section, else of another one."""
  if path == "config.data.sources" and not part.isidentifier():
    return "; a source's name has letters, digits and _ only"
  if path == "config.data.sources":
    add = f"; --{path}.{part}.kind=image_folder would add a source of that name"
    return nearest(part, node).rstrip("?") + add
  if difflib.get_close_matches(part, node, cutoff=0.5):
    return nearest(part, node)
  names = flatten(config, "config.")
  leaves = {name.rsplit(".", 1)[-1] for name in names}
  close = difflib.get_close_matches(part, leaves, n=1, cutoff=0.8)
  elsewhere = [n for n in names if close and n.endswith(f".{close[0]}")]
  if elsewhere:
    return f", did you mean {elsewhere[0]!r}?"
  return nearest(part, node)


def _explain_type(message: str, values: flags.FlagValues) -> str:
  """Says absl's error about an ill-typed override with the key's type."""
  match = _ILLEGAL.match(message)
  if match is None:
    return message
  key, text = match.groups()
  flag = values[f"config.{key}"]
  # A tuple's flag may be given many times, so absl keeps its values in a list.
  expected = tuple if isinstance(flag.default, list) else type(flag.default)
  return f"config.{key}={text!r} must be {_TYPES[expected]}"
