"""`config.data`: sources by name, documents, rows and groups."""

import dataclasses

from fusionlab.config import option
from fusionlab.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """`config.data.sources.<name>`: where examples come from.

  `kind` is a registered name of `fusionlab.data.sources` or
  `package.module:Class`; the other keys are passed to it.
  """

  kind: str = option("openmoji", "registered source or package.module:Class")
  path: str = option("", "folder, file or TFDS name, as the kind reads it")
  weight: float = option(
    1.0, "passes over the source in one epoch of the mixture", minimum=0.0
  )
  heldout: float = option(
    0.05,
    "fraction held out, where the kind makes the split",
    maximum=0.9,
    minimum=0.0,
  )
  image_field: str = option("image", "TFDS: feature that holds the picture")
  text_field: str = option("caption", "TFDS, JSONL: feature with the text")
  split: str = option("train", "TFDS: split to train on")
  heldout_split: str = option(
    "", "TFDS: split to hold out; '' takes a fraction"
  )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """`config.data`: what the batch is made of (design: "Packing is a plan")."""

  sources: dict[str, SourceConfig] = option(
    dict, "where examples come from, by name"
  )
  cache_dir: str = option(
    "", "prepared datasets; '' is $FUSIONLAB_CACHE or ~/.cache/fusionlab"
  )
  text_tokenizer: str = option(
    "",
    "BPE file, or a Hugging Face tokenizer.json or its folder; '' is the BPE in"
    " the package",
  )
  image_tokenizer: str = option(
    "",
    "file of picture codes (VQ) or latents (KL); '' is the packaged VQ, 'kl' the"
    " packaged KL autoencoder, 'none' trains on text only",
  )
  latent_patch: int = option(
    0,
    "latent pixels along a side of a KL autoencoder's patch, k; 0: as its file"
    " says",
    minimum=0,
  )
  row_length: int = option(512, "tokens in a row", minimum=8)
  group_rows: int = option(
    0,
    "rows that share one count per tower; 0: the batch of one device",
    minimum=0,
  )
  layout: str = option(
    "auto",
    "places per modality as fractions ('text=0.4 image=0.6'); 'auto' takes the"
    " mixture's own",
  )
  align: int = option(1, "tower counts are multiples of this", minimum=1)
  lookahead: int = option(
    512, "documents among which the plan chooses the next one", minimum=1
  )
  image_first: float = option(
    0.5,
    "probability that a picture precedes its caption",
    minimum=0.0,
    maximum=1.0,
  )
  caption_drop: float = option(
    0.1,
    "probability that a picture loses its caption (for guidance)",
    minimum=0.0,
    maximum=1.0,
  )
  first_caption: float = option(
    0.5,
    "probability of a picture's first caption (English); the others share the"
    " rest",
    minimum=0.0,
    maximum=1.0,
  )
  prefetch: int = option(4, "batches made ahead of the step", minimum=0)

  def check(self, path: str) -> None:
    """Raises ConfigError where no source is left to read."""
    if not any(s.weight > 0 for s in self.sources.values()):
      raise ConfigError(
        f"{path}.sources has no source with weight > 0; set e.g."
        f" {path}.sources.openmoji.weight=1"
      )
