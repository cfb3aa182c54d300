"""Mixture-of-Transformers: all non-embedding parameters by modality.

Source: Liang et al., "Mixture-of-Transformers: A Sparse and Scalable
Architecture for Multi-Modal Foundation Models" (arXiv 2411.04996, TMLR 2025),
Eq. 1-3, Algorithm 1; sizes from Tables 1, 3 and 4. For token i of modality m:

    q, k, v = x Wq^m, x Wk^m, x Wv^m        A = softmax(q kᵀ/√D + M) v over all
    h = x + norm_attn^m(A Wo^m)             y = h + norm_ffn^m(FFN^m(h))

A token costs what it costs in the dense model; only the parameters multiply.
"""

import dataclasses

from fusionlab.config import option
from fusionlab.models.config import TransformerConfig
from fusionlab.models.transformer import Transformer
from fusionlab.towers import UNTIE_NAMES


@dataclasses.dataclass(frozen=True)
class MixtureOfTransformersConfig(TransformerConfig):
  """`config.model` with everything untied; `untie=''` is the dense control."""

  kind: str = option(
    "mixture_of_transformers", "registered model or package.module:Class"
  )
  untie: str = option(
    " ".join(UNTIE_NAMES), "parameters that are per tower, by name; '' is dense"
  )


class MixtureOfTransformers(Transformer):
  """The decoder with one tower per modality."""

  Config = MixtureOfTransformersConfig


@dataclasses.dataclass(frozen=True)
class Size:
  """A row of the paper's size table (Chameleon setting, Tables 1, 3 and 4).

  Attributes:
    dim, num_layers, num_heads: d, L and H.
    batch_rows: rows of 4,096 tokens per step, over all GPUs.
    num_steps: optimizer steps.
  """

  dim: int
  num_layers: int
  num_heads: int
  batch_rows: int
  num_steps: int


# Batch per GPU times GPUs as in Table 3; widths of the FFN by the Llama rule,
# which reproduces the names to every printed digit at 65,536 untied ids.
SIZES = {
  "37m": Size(256, 4, 8, 12 * 32, 160_000),
  "94m": Size(512, 8, 8, 8 * 32, 160_000),
  "443m": Size(1024, 24, 16, 6 * 64, 160_000),
  "880m": Size(1536, 24, 24, 4 * 128, 120_000),
  "1.5b": Size(2048, 24, 16, 4 * 128, 120_000),
  "7b": Size(4096, 32, 32, 2 * 384, 120_000),
}
