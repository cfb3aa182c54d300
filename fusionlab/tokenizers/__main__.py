"""Makes and measures tokenizer files.

  python -m fusionlab.tokenizers train-text    --config=FILE --output=FOLDER
  python -m fusionlab.tokenizers train-image   --config=FILE --output=FOLDER
  python -m fusionlab.tokenizers train-latents --config=FILE --output=FOLDER
  python -m fusionlab.tokenizers report --config=FILE [--text=F] [--image=F]
                                                      [--latents=F]

`--config` defaults to configs/vq_openmoji.py; single settings are changed as in
`--config.image_train.num_steps=100`. The first three write text.json,
image.safetensors (picture codes) or latents.safetensors (continuous pictures),
and beside it text.report.json, image.report.json or latents.report.json.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from fusionlab.config import from_mapping
from fusionlab.errors import UserError, nearest
from fusionlab.tokenizers import image_training, latent_training, storage
from fusionlab.tokenizers import recipe as recipes
from fusionlab.tokenizers.image import ImageTokenizer
from fusionlab.tokenizers.latents import LatentTokenizer
from fusionlab.tokenizers.recipe import Recipe
from fusionlab.tokenizers.text import TextTokenizer

_CONFIG = "configs/vq_openmoji.py"
Report = dict[str, dict[str, float]]


def main(argv: Sequence[str]) -> int:
  """Runs one command line.

  Args:
    argv: the program's name, a verb and flags.

  Returns:
    The exit code: 0, or 2 after one line about what the user can change.
  """
  try:
    values, debug = _parse(argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  try:
    verb = VERBS[values["verb"]]
    verb(from_mapping(Recipe, values["config"].to_dict()), values)
  except UserError as error:
    if debug:
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped; nothing was written", file=sys.stderr)
    return 130
  return 0


def train_text(recipe: Recipe, values: dict) -> None:
  """Learns the byte-pair encoding and writes it with its report."""
  output = storage.prepare_folder(values["output"])
  groups = recipes.gather_texts(recipe)
  texts = [t for g, ts in groups.items() if recipes.is_train(g) for t in ts]
  tokenizer = TextTokenizer.train(
    texts, recipe.text.vocab_size, progress=sys.stderr.isatty()
  )
  report = _measure_text(tokenizer, groups)
  tokenizer.save(output / storage.TEXT_FILE)
  _publish(report, output / "text.report.json", tokenizer.hash)


def train_image(recipe: Recipe, values: dict) -> None:
  """Trains the tokenizer of picture codes and writes it with its report."""
  output = storage.prepare_folder(values["output"])
  sizes, training = recipe.image, recipe.image_train
  groups = recipes.gather_pictures(recipe, sizes.image_size)
  notes = recipes.notes(recipe, training)
  tokenizer = image_training.train(_train_of(groups), sizes, training, notes)
  report = {g: image_training.measure(tokenizer, p) for g, p in groups.items()}
  tokenizer.save(output / storage.IMAGE_FILE)
  _publish(report, output / "image.report.json", tokenizer.hash)


def train_latents(recipe: Recipe, values: dict) -> None:
  """Trains the tokenizer of continuous latents; writes it with its report."""
  output = storage.prepare_folder(values["output"])
  sizes, training = recipe.latents, recipe.latent_train
  groups = recipes.gather_pictures(recipe, sizes.image_size)
  notes = recipes.notes(recipe, training)
  tokenizer = latent_training.train(_train_of(groups), sizes, training, notes)
  report = {g: latent_training.measure(tokenizer, p) for g, p in groups.items()}
  tokenizer.save(output / storage.LATENT_FILE)
  _publish(report, output / "latents.report.json", tokenizer.hash)


def report(recipe: Recipe, values: dict) -> None:
  """Measures tokenizer files on the sources; '' is the packaged one."""
  text = TextTokenizer.load(values["text"])
  image = ImageTokenizer.load(values["image"])
  latents = LatentTokenizer.load(values["latents"])
  _publish(_measure_text(text, recipes.gather_texts(recipe)), None, text.hash)
  groups = recipes.gather_pictures(recipe, image.image_size)
  if not groups:  # sources of text alone have no pictures to measure
    return
  codes = {g: image_training.measure(image, p) for g, p in groups.items()}
  _publish(codes, None, image.hash)
  if latents.image_size != image.image_size:
    groups = recipes.gather_pictures(recipe, latents.image_size)
  means = {g: latent_training.measure(latents, p) for g, p in groups.items()}
  _publish(means, None, latents.hash)


VERBS = {
  "train-text": train_text,
  "train-image": train_image,
  "train-latents": train_latents,
  "report": report,
}


def _parse(argv: Sequence[str]) -> tuple[dict, bool]:
  values = flags.FlagValues()
  # config_flags wants the file before what changes it.
  chosen = [a for a in argv if a.startswith("--config=")] or [
    f"--config={_CONFIG}"
  ]
  argv = [argv[0], *chosen, *(a for a in argv[1:] if a not in chosen)]
  config_flags.DEFINE_config_file(
    "config", None, "file with get_config()", flag_values=values, sys_argv=argv
  )
  for name, text in (
    ("output", "folder for the tokenizer file (all but report)"),
    ("text", "text tokenizer to report on; '' is the packaged one"),
    ("image", "tokenizer of picture codes to report on; '' as above"),
    ("latents", "tokenizer of latents to report on; '' as above"),
  ):
    flags.DEFINE_string(name, "", text, flag_values=values)
  flags.DEFINE_bool("debug", False, "show tracebacks", flag_values=values)
  flags.DEFINE_bool("help", False, "show this help", flag_values=values)
  file = Path(chosen[-1].partition("=")[2])
  if not file.is_file():
    known = [str(f) for f in sorted(file.parent.glob("*.py"))]
    raise UserError(f"no config file {str(file)!r}{nearest(str(file), known)}")
  try:
    rest = values(argv)[1:]
  except (AttributeError, KeyError) as error:
    # A wrong key, twice quoted by the libraries in between.
    text = str(error).replace("\\n", ". ").replace("\\'", "").strip("'")
    raise UserError(f"unknown key of --config: {text}") from None
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(
      f"{' '.join(str(error).split())}; see python -m fusionlab.tokenizers"
      f" --help"
    ) from None
  if values["help"].value:
    print(__doc__)
    sys.exit(0)
  if len(rest) != 1 or rest[0] not in VERBS:
    given = " ".join(rest) or "none"
    raise UserError(
      f"give one verb, not {given!r}{nearest(given, VERBS)} e.g. python -m"
      f" fusionlab.tokenizers train-text --output=FOLDER"
    )
  if rest[0] != "report" and not values["output"].value:
    raise UserError(
      f"{rest[0]} needs --output=FOLDER, where the file shall be written"
    )
  parsed = {name: values[name].value for name in values}
  return parsed | {"verb": rest[0]}, bool(values["debug"].value)


def _train_of(groups: dict[str, np.ndarray]) -> np.ndarray:
  """The pictures that may be learned from."""
  pictures = [p for g, p in groups.items() if recipes.is_train(g)]
  if not pictures:
    raise UserError(
      "config.sources has no pictures to train on; add a source with pictures,"
      " e.g. --config.sources.openmoji.kind=openmoji"
    )
  return np.concatenate(pictures)


def _measure_text(
  tokenizer: TextTokenizer, groups: dict[str, list[str]]
) -> Report:
  measured = {}
  for group, texts in groups.items():
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    size = sum(len(text.encode()) for text in texts)
    measured[group] = {
      "texts": len(texts),
      "bytes": size,
      "tokens": tokens,
      "bytes_per_token": size / tokens,
      "tokens_per_text": tokens / len(texts),
    }
  return measured


def _publish(measured: Report, path: Path | None, digest: str) -> None:
  """Prints a report as a table and, with a path, writes it as JSON."""
  columns = list(next(iter(measured.values())))
  table = Table("group", *columns, title=f"sha256 {digest[:16]}…")
  for group, row in measured.items():
    cells = (str(v) if isinstance(v, int) else f"{v:.4f}" for v in row.values())
    table.add_row(group, *cells)
  Console(width=None if sys.stdout.isatty() else 120).print(table)
  if path is not None:
    content = json.dumps({"hash": digest, "groups": measured}, indent=2)
    storage.write(path, content.encode() + b"\n")
    print(f"wrote {path.parent}")


if __name__ == "__main__":
  sys.exit(main(sys.argv))
