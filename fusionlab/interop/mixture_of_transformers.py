"""Names of the published Mixture-of-Transformers layers, and of a stack of them.

Names and shapes as in facebookresearch/Mixture-of-Transformers: a torch Linear
holds [out, in], heads are the slow part of the projected axis. What is published
are the two layers; a whole model of them is named here as Llama's and Chameleon's
code names what stands around:

    tok_embeddings.weight                              [V, d]
    layers.{l}.attention.<attention layer's names>
    layers.{l}.feed_forward.<feed-forward layer's names>
    norm.{k}.weight                                    [d], per modality
    output.weight                                      [V, d], where it is not tied
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusionlab.errors import UserError
from fusionlab.interop.llama import sizes_of
from fusionlab.interop.tables import (
  FROM_HEADS,
  SAME,
  TRANSPOSED,
  Entry,
  from_published,
  into_heads,
  to_published,
)
from fusionlab.models.config import TransformerConfig
from fusionlab.towers import UNTIE_NAMES

_QK_NORM = [
  Entry(
    f"local_experts_{x}_normalization.{{k}}.weight",
    f"attention/{{tower}}/{x}_norm_scale",
    ("D",),
    SAME,
  )
  for x in "qk"
]


def attention(qk_norm: bool) -> list[Entry]:
  """Table of the attention sub-layer and the norm on its output.

  Args:
    qk_norm: whether queries and keys have weights of their own norms.
  """
  entries = [
    Entry(
      f"local_experts_w{x}.{{k}}.weight",
      f"attention/{{tower}}/{x}",
      (f"{heads}D", "d"),
      into_heads(heads),
    )
    for x, heads in (("q", "H"), ("k", "G"), ("v", "G"))
  ]
  entries += [
    Entry(
      "local_experts_wo.{k}.weight",
      "attention/{tower}/o",
      ("d", "HD"),
      FROM_HEADS,
    ),
    Entry(
      "local_experts_attention_norm.{k}.weight",
      "mixer_norm/{tower}/scale",
      ("d",),
      SAME,
    ),
  ]
  return [*entries, *(_QK_NORM if qk_norm else ())]


FEED_FORWARD = [
  Entry(
    "local_experts.{k}.w1.weight", "ffn/{tower}/w_gate", ("F", "d"), TRANSPOSED
  ),
  Entry(
    "local_experts.{k}.w3.weight", "ffn/{tower}/w_in", ("F", "d"), TRANSPOSED
  ),
  Entry(
    "local_experts.{k}.w2.weight", "ffn/{tower}/w_out", ("d", "F"), TRANSPOSED
  ),
  Entry(
    "local_experts_ffn_norm.{k}.weight",
    "ffn_norm/{tower}/scale",
    ("d",),
    SAME,
  ),
]


def model(*, qk_norm: bool, tied: bool) -> list[Entry]:
  """Table of a whole model, see the module's docstring.

  Args:
    qk_norm: whether queries and keys have weights of their own norms.
    tied: whether the output table is the input table.
  """
  layer = "layers.{l}."
  entries = [
    Entry("tok_embeddings.weight", "embed", ("V", "d"), SAME),
    *(
      entry.below(f"{layer}attention.", "layers/")
      for entry in attention(qk_norm)
    ),
    *(
      entry.below(f"{layer}feed_forward.", "layers/") for entry in FEED_FORWARD
    ),
    Entry("norm.{k}.weight", "final_norm/{tower}/scale", ("d",), SAME),
  ]
  if not tied:
    entries.append(Entry("output.weight", "unembed", ("V", "d"), TRANSPOSED))
  return entries


def from_state_dict(
  arrays: Mapping[str, np.ndarray],
  config: TransformerConfig,
  vocab_size: int,
) -> dict[str, Any]:
  """Parameters of a whole published model.

  Args:
    arrays: tensors by the names of `model`, one modality per tower.
    config: the model that they are for.
    vocab_size: ids V.

  Raises:
    UserError: a config that the published layers cannot be, or see
      `from_published`.
  """
  _check(config)
  return from_published(
    model(qk_norm=config.qk_norm == "rms", tied=config.tie_embeddings),
    arrays,
    sizes_of(config, vocab_size),
    config.routed_towers.names,
    layers=config.num_layers,
  )


def to_state_dict(
  params: Mapping[str, Any], config: TransformerConfig
) -> dict[str, np.ndarray]:
  """Tensors by published names; `from_state_dict` gives the parameters back.

  Args:
    params: the model's parameters.
    config: the model's.

  Raises:
    UserError: a config that the published layers cannot be.
  """
  _check(config)
  return dict(
    to_published(
      model(qk_norm=config.qk_norm == "rms", tied=config.tie_embeddings),
      params,
      sizes_of(config, params["embed"].shape[0]),
      config.routed_towers.names,
      layers=config.num_layers,
    )
  )


def _check(config: TransformerConfig) -> None:
  towers = config.routed_towers
  without = {"qk_norm"} if config.qk_norm == "none" else set()
  tied = set(UNTIE_NAMES) - towers.untied - without
  faults = {
    f"norm_placement={config.norm_placement!r}; they have 'swin'": (
      config.norm_placement != "swin"
    ),
    f"qk_norm={config.qk_norm!r}; they have 'rms' or 'none'": (
      config.qk_norm not in ("rms", "none")
    ),
    f"untie={config.untie!r}; with several towers they untie everything": (
      towers.count > 1 and bool(tied)
    ),
  }
  for fault, found in faults.items():
    if found:
      raise UserError(
        f"the published Mixture-of-Transformers layers cannot hold"
        f" config.model.{fault}"
      )
