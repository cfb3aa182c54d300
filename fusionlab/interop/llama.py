"""A Llama as other programs keep it, and the names of its tensors.

The names are Hugging Face's of a `LlamaForCausalLM`: a pre-norm decoder with
grouped queries, SwiGLU, RMSNorm and rotary positions in the half-split order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusionlab.interop.tables import (
  FROM_HEADS,
  SAME,
  TRANSPOSED,
  Entry,
  from_published,
  into_heads,
)
from fusionlab.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Specials:
  """Ids of documents; None where the model has none."""

  bos: int | None
  eos: int | None
  pad: int | None


@dataclasses.dataclass(frozen=True)
class Llama:
  """A Llama as another program keeps it.

  Attributes:
    origin: its file or folder.
    config: the dense model that it is.
    vocab_size: ids V.
    max_position: tokens of the longest document that it is for.
    specials: ids of documents.
    tensors: by published name, float32.
    table: what those names are here.
    file_of: the file of a tensor, for messages.
    tokenizer: content of a `tokenizer.json`; None where it has none.
  """

  origin: str
  config: TransformerConfig
  vocab_size: int
  max_position: int
  specials: Specials
  tensors: Mapping[str, np.ndarray]
  table: Sequence[Entry]
  file_of: Any
  tokenizer: bytes | None

  def params(self) -> dict[str, Any]:
    """Reads the parameters, float32 numpy.

    Raises:
      UserError: see `from_published`.
    """
    return from_published(
      self.table,
      self.tensors,
      sizes_of(self.config, self.vocab_size),
      self.config.routed_towers.names,
      layers=self.config.num_layers,
      file_of=self.file_of,
    )


def sizes_of(config: TransformerConfig, vocab_size: int) -> dict[str, int]:
  """The dimensions that tables name.

  Args:
    config: a model's.
    vocab_size: ids V.
  """
  heads, groups, width = config.num_heads, config.kv_heads, config.width_of_head
  return {
    "d": config.dim,
    "H": heads,
    "G": groups,
    "D": width,
    "HD": heads * width,
    "GD": groups * width,
    "F": config.width_of_ffn,
    "V": vocab_size,
  }


def table(*, tied: bool) -> list[Entry]:
  """Names of the tensors of a `LlamaForCausalLM`.

  Args:
    tied: whether the output table is the input table.
  """
  layer = [
    Entry("input_layernorm.weight", "mixer_norm/{tower}/scale", ("d",), SAME),
    *(
      Entry(
        f"self_attn.{x}_proj.weight",
        f"attention/{{tower}}/{x}",
        (f"{heads}D", "d"),
        into_heads(heads),
      )
      for x, heads in (("q", "H"), ("k", "G"), ("v", "G"))
    ),
    Entry(
      "self_attn.o_proj.weight",
      "attention/{tower}/o",
      ("d", "HD"),
      FROM_HEADS,
    ),
    Entry(
      "post_attention_layernorm.weight",
      "ffn_norm/{tower}/scale",
      ("d",),
      SAME,
    ),
    *(
      Entry(
        f"mlp.{theirs}_proj.weight", f"ffn/{{tower}}/{ours}", shape, TRANSPOSED
      )
      for theirs, ours, shape in (
        ("gate", "w_gate", ("F", "d")),
        ("up", "w_in", ("F", "d")),
        ("down", "w_out", ("d", "F")),
      )
    ),
  ]
  entries = [
    Entry("model.embed_tokens.weight", "embed", ("V", "d"), SAME),
    *(entry.below("model.layers.{l}.", "layers/") for entry in layer),
    Entry("model.norm.weight", "final_norm/{tower}/scale", ("d",), SAME),
  ]
  if not tied:
    entries.append(Entry("lm_head.weight", "unembed", ("V", "d"), TRANSPOSED))
  return entries
