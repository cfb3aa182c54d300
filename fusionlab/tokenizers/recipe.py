"""What a tokenizer is made from: the settings and the sources' train split."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich import progress

from fusionlab.config import option, to_mapping
from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, load_source
from fusionlab.data.sources.pictures import square
from fusionlab.errors import ConfigError, UserError
from fusionlab.tokenizers.autoencoder import ImageConfig, LatentConfig
from fusionlab.tokenizers.image_training import ImageTrainConfig
from fusionlab.tokenizers.latent_training import LatentTrainConfig
from fusionlab.tokenizers.training import AutoencoderTrainConfig

# Styles that keys end with, as in openmoji's "1F34E/line". Anything else behind
# a "/" is the name of a file in a folder, or a record's number.
_STYLES = ("color", "line")

_OPENMOJI = (
  "CC BY-SA 4.0. Learned from OpenMoji pictures: all emojis designed by"
  " OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA"
  " 4.0."
)
# Terms of the pictures of a kind of source; flags are drawn from OpenMoji too.
_LICENCES = {"openmoji": _OPENMOJI, "flags": _OPENMOJI}


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """`config.text`: the byte-pair encoding."""

  vocab_size: int = option(
    3584, "ids, of which 5 are special and 256 bytes", minimum=261
  )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What `configs/vq_openmoji.py` and `configs/kl_openmoji.py` describe."""

  sources: dict[str, SourceConfig] = option(
    dict, "what to learn from, by name; weights do not matter here"
  )
  text: TextConfig = option(TextConfig, "the text tokenizer")
  image: ImageConfig = option(ImageConfig, "sizes of the tokenizer of codes")
  image_train: ImageTrainConfig = option(
    ImageTrainConfig, "training of the tokenizer of codes"
  )
  latents: LatentConfig = option(
    LatentConfig, "sizes of the tokenizer of continuous latents"
  )
  latent_train: LatentTrainConfig = option(
    LatentTrainConfig, "training of the tokenizer of continuous latents"
  )
  licence: str = option(
    "",
    "terms and attribution of your own pictures; kept in the tokenizer's file,"
    " where those of openmoji and flags are added",
  )

  def check(self, path: str) -> None:
    """Raises ConfigError where there is nothing to learn from."""
    if not self.sources:
      raise ConfigError(
        f"{path}.sources is empty; set e.g."
        f" {path}.sources.openmoji.kind='openmoji'"
      )


def gather_texts(recipe: Recipe) -> dict[str, list[str]]:
  """Returns the distinct texts of all sources, "source/split" -> texts.

  All captions of a picture count, in all their languages.
  """
  groups: dict[str, dict[str, None]] = {}
  for name, example in _examples(recipe, "texts"):
    for part in example.parts:
      if part.modality == "text":
        group = groups.setdefault(f"{name}/{example.split}", {})
        group.update(dict.fromkeys(map(str, part.alternatives)))
  return {group: list(texts) for group, texts in groups.items()}


def gather_pictures(
  recipe: Recipe, size: int
) -> dict[str, UInt8[np.ndarray, "N S S 3"]]:
  """Returns the pictures of all sources, "source/split/style" -> array.

  Each is the middle square, as data preparation encodes it. The style is left out
  where a source has none.

  Args:
    recipe: names the sources.
    size: height and width of the pictures in pixels.

  Raises:
    UserError: a picture that is not uint8 [H, W, 3].
  """
  groups: dict[str, list[np.ndarray]] = {}
  for name, example in _examples(recipe, "pictures"):
    for part in example.parts:
      if part.modality == "image":
        image = np.asarray(part.alternatives[0])
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
          raise UserError(
            f"source {name!r}: picture {example.key!r} is"
            f" {image.dtype}{list(image.shape)}; a source gives uint8[H, W, 3]"
          )
        group = f"{name}/{example.split}"
        for style in _STYLES:
          if example.key.endswith(f"/{style}"):
            group += f"/{style}"
        groups.setdefault(group, []).append(square(image, size))
  return {group: np.stack(images) for group, images in groups.items()}


def is_train(group: str) -> bool:
  """Whether a group's name says that it may be learned from."""
  return group.split("/")[1] == "train"


def fingerprints(recipe: Recipe) -> dict[str, str]:
  """Returns the fingerprint of each source, by name."""
  return {
    name: load_source(name, source).fingerprint()
    for name, source in recipe.sources.items()
  }


def notes(recipe: Recipe, training: AutoencoderTrainConfig) -> dict[str, Any]:
  """Returns what a picture tokenizer's file says of how it was made."""
  return {
    "sources": fingerprints(recipe),
    "training": to_mapping(training),
    "licence": licence(recipe),
  }


def licence(recipe: Recipe) -> str:
  """Returns the terms of all pictures: the recipe's, then its sources' own.

  A tokenizer is under the terms of what it learned from, so those of OpenMoji
  stand in the file of every recipe with its pictures, and in no other.
  """
  kinds = [source.kind for source in recipe.sources.values()]
  known = [_LICENCES[kind] for kind in kinds if kind in _LICENCES]
  return " ".join(filter(None, dict.fromkeys([recipe.licence, *known])))


def _examples(recipe: Recipe, what: str) -> Iterator[tuple[str, Example]]:
  for name, config in recipe.sources.items():
    source = load_source(name, config)
    for example in progress.track(
      source.examples(), f"{what} of {name}", total=len(source)
    ):
      yield name, example
