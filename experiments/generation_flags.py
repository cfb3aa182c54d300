"""The flags of `--mode=generate`."""

import dataclasses
from typing import Any

from absl import flags

from fusionlab.errors import UserError
from fusionlab.generation.config import MAX_NEW_TOKENS, Request, Sampling

_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
_SETTINGS = (
  "make",
  "num_samples",
  "max_new_tokens",
  "seed",
  "stop",
  "snapshots",
  *_SAMPLING,
)
_FLAG_OF_TYPE = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}
NAMES = ("prompt", "image", "prompt_file", "out", *_SETTINGS)


def define(values: flags.FlagValues) -> None:
  """Declares the flags in `values`."""
  to: Any = {"flag_values": values}
  flags.DEFINE_multi_string(
    "prompt", [], "generate: text to go on from; may be given again", **to
  )
  flags.DEFINE_multi_string(
    "image",
    [],
    "generate: picture file that stands before its prompt; may be given again",
    **to,
  )
  flags.DEFINE_string(
    "prompt_file", None, "generate: file with one prompt a line", **to
  )
  flags.DEFINE_string("out", None, "generate: new folder for the results", **to)
  flags.DEFINE_string(
    "make",
    "auto",
    "generate: auto (the model chooses), text or image",
    **to,
  )
  flags.DEFINE_alias("modality", "make", **to)
  flags.DEFINE_integer(
    "num_samples", 1, "generate: continuations of each prompt", **to
  )
  flags.DEFINE_integer(
    "max_new_tokens", MAX_NEW_TOKENS, "generate: ids of a continuation", **to
  )
  flags.DEFINE_integer("seed", 0, "generate: root of the random streams", **to)
  flags.DEFINE_multi_string(
    "stop", [], "generate: string that ends a continuation", **to
  )
  flags.DEFINE_integer(
    "snapshots",
    0,
    "generate: pictures from on the way to each continuous picture",
    **to,
  )
  for field in dataclasses.fields(Sampling):
    define: Any = _FLAG_OF_TYPE[field.type]
    help_text = f"generate: {field.metadata['help']}"
    define(field.name, field.default, help_text, **to)


def given(values: flags.FlagValues) -> list[str]:
  """Names of those flags that the command line sets."""
  return [name for name in NAMES if values[name].present]


def read(values: flags.FlagValues) -> Request:
  """What the flags ask for.

  Raises:
    UserError: a prompt file that cannot be read or has no line.
  """
  prompts = list(values["prompt"].value or ())
  if file := values["prompt_file"].value:
    try:
      with open(file, encoding="utf-8") as lines:
        found = [line.rstrip("\n") for line in lines if line.strip()]
    except OSError as error:
      raise UserError(
        f"cannot read --prompt_file={file}: {error.strerror or error}"
      ) from error
    except UnicodeDecodeError as error:
      raise UserError(
        f"--prompt_file={file} is not UTF-8 text ({error.reason} at byte"
        f" {error.start})"
      ) from error
    if not found:
      raise UserError(f"--prompt_file={file} has no prompt; write one a line")
    prompts += found
  return Request(
    prompts=tuple(prompts),
    images=tuple(values["image"].value or ()),
    out=values["out"].value or "",
    settings={name: values[name].value for name in _SETTINGS},
  )
