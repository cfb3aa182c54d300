"""`export`: a checkpoint of ours, or one tower of it, as a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionlab.errors import UserError, nearest
from fusionlab.interop import hugging_face, llama, llama_config
from fusionlab.interop.importing import refuse_full
from fusionlab.interop.llama import Specials
from fusionlab.interop.tables import to_published
from fusionlab.models.config import TransformerConfig


def export_model(
  workdir: Path, out: Path, *, tower: str = "", dtype: str = "float32"
) -> str:
  """Writes a checkpoint as a Hugging Face Llama.

  Of the vocabulary only the rows of text are written, without specials that were
  appended for other modalities.

  Args:
    workdir: a run's folder, or a checkpoint's.
    out: new or empty; whole or not there.
    tower: the tower to take; '' where there is one.
    dtype: "float32" or "bfloat16".

  Returns:
    One line about what was written.

  Raises:
    UserError: no checkpoint, an unknown tower, or a model that a Llama cannot be.
  """
  from fusionlab.train.checkpoint import load
  from fusionlab.train.writers import whole_folder

  refuse_full(out)
  loaded = load(workdir)
  config = loaded.experiment.model
  name = tower_of(config, tower)
  text = loaded.tokenizers.text
  special = text.specials
  # Padding by <eos> is how a model without a padding id is kept here.
  pad = None if special.pad == special.eos else special.pad
  keys = llama_config.write_config(
    config,
    vocab_size=text.base_size,
    max_position=config.longest(loaded.experiment.data.row_length),
    specials=Specials(special.bos, special.eos, pad),
    dtype=dtype,
  )
  params = loaded.params if loaded.ema is None else loaded.ema
  weights = to_published(
    llama.table(tied=config.tie_embeddings),
    text_rows(params, text.base_size),
    llama.sizes_of(config, text.base_size),
    (name,),
    layers=config.num_layers,
  )
  with whole_folder(out) as partial:
    total = hugging_face.write(
      partial, keys, weights, tokenizer=text.tokenizer_json()
    )
  which = "the dense model" if name == "shared" else f"the tower {name!r}"
  return (
    f"{which} of step {loaded.step}: {text.base_size} ids,"
    f" {total / 2**20:.1f} MiB of {dtype}"
  )


def tower_of(config: TransformerConfig, tower: str) -> str:
  """The name of the tower to take.

  Args:
    config: a model's.
    tower: what was asked for; '' where there is one.

  Raises:
    UserError: one that the model does not have, or several to choose from.
  """
  names = config.routed_towers.names
  if not tower and len(names) > 1:
    raise UserError(
      f"the model has the towers {', '.join(names)} and a Llama has one; choose"
      f" by --tower, e.g. --tower {names[0]}"
    )
  if tower and tower not in names:
    # A dense model is the tower of each of its modalities.
    if names == ("shared",) and tower in config.modalities:
      return "shared"
    raise UserError(f"unknown --tower {tower!r}{nearest(tower, names)}")
  return tower or next(iter(names))


def text_rows(params: Mapping[str, Any], number: int) -> dict[str, Any]:
  """The parameters with the first ids alone in the vocabulary's tables.

  Args:
    params: a model's.
    number: of ids.
  """
  rows = {**params, "embed": params["embed"][:number]}
  if "unembed" in params:
    rows["unembed"] = params["unembed"][:, :number]
  return rows
