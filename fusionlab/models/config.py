"""`config.model` of the decoder that every model here is made of."""

import dataclasses

from fusionlab.config import option
from fusionlab.errors import ConfigError
from fusionlab.nn.feed_forward import swiglu_width
from fusionlab.towers import Towers
from kernels_pallas.attention.api import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """`config.model`: a Llama-style decoder with towers.

  Defaults are the dense control: `untie=''`.
  """

  kind: str = option("transformer", "registered model or package.module:Class")
  modalities: tuple[str, ...] = option(
    ("text", "image"), "names; the index is the modality id"
  )
  towers: tuple[int, ...] = option(
    (0, 1),
    "tower of each modality: (0, 1) MoT, (0, 1, 1) leave-one-out, …",
    minimum=0,
  )
  untie: str = option("", "parameters that are per tower, by name; '' is dense")
  dim: int = option(192, "model width d", minimum=2)
  num_layers: int = option(4, "layers", minimum=1)
  num_heads: int = option(6, "query heads", minimum=1)
  num_kv_heads: int = option(0, "key-value heads; 0: num_heads", minimum=0)
  head_dim: int = option(0, "width of a head; 0: dim / num_heads", minimum=0)
  ffn_dim: int = option(
    0, "SwiGLU width F; 0: 256·ceil(⌊8d/3⌋/256), the Llama rule", minimum=0
  )
  vocab_size: int = option(
    0, "ids in all; 0: what the tokenizers have", minimum=0
  )
  norm_placement: str = option(
    "swin",
    "norm before the sub-layer, or on its output",
    choices=("pre", "swin"),
  )
  norm_eps: float = option(1e-5, "added to the mean square", minimum=1e-12)
  qk_norm: str = option(
    "rms",
    "norm of queries and keys over a head",
    choices=("none", "rms", "layer"),
  )
  rope_base: float = option(
    10000.0, "base of the rotary frequencies", minimum=1.0
  )
  dropout: float = option(
    0.0,
    "dropout after attention and FFN (Chameleon-7B: 0.1)",
    minimum=0.0,
    maximum=0.99,
  )
  tie_embeddings: bool = option(False, "one table for input and output")
  causal: bool = option(
    True,
    "promise that a token sees its own document up to itself, which attention"
    " may use; False where the batch has other intervals (spans that see"
    " themselves whole, windows)",
  )
  dispatch: str = option(
    "layout",
    "how a token meets its tower",
    choices=("layout", "ragged", "select"),
  )
  attention: str = option(
    "auto",
    "implementation of attention, by name",
    choices=("auto", *IMPLEMENTATIONS),
  )
  remat: str = option(
    "none",
    "what the backward pass recomputes: none, full (everything), dots"
    " (all but matmuls), dots_no_batch",
    choices=("none", "full", "dots", "dots_no_batch"),
  )
  scan_unroll: int = option(1, "layers unrolled per scan step", minimum=1)
  compute_dtype: str = option(
    "auto",
    "auto: bfloat16 on accelerators, float32 on CPU",
    choices=("auto", "float32", "bfloat16"),
  )

  @property
  def kv_heads(self) -> int:
    """Number of key-value heads G."""
    return self.num_kv_heads or self.num_heads

  @property
  def width_of_head(self) -> int:
    """Width of a head D."""
    return self.head_dim or self.dim // self.num_heads

  @property
  def width_of_ffn(self) -> int:
    """SwiGLU hidden width F."""
    return self.ffn_dim or swiglu_width(self.dim)

  def forward_flops_per_token(self, vocab_size: int, row_length: int) -> float:
    """Model FLOPs of one token's forward pass; a multiply-add is two.

    Causal attention counts half of the scores; remat, padding and the moves of
    routing count nothing. The cost does not depend on `towers` or `untie`.

    Args:
      vocab_size: ids V; `vocab_size` of the config overrides it.
      row_length: tokens L over which attention looks.
    """
    d, dh = self.dim, self.width_of_head
    seen = row_length / 2 if self.causal else row_length
    projections = 2 * d * dh * (2 * self.num_heads + 2 * self.kv_heads)
    scores_and_values = 2 * 2 * seen * self.num_heads * dh
    ffn = 2 * 3 * d * self.width_of_ffn
    head = 2 * d * (self.vocab_size or vocab_size)
    return self.num_layers * (projections + scores_and_values + ffn) + head

  @property
  def routed_towers(self) -> Towers:
    """The towers as the model runs them (one where nothing is untied)."""
    return Towers.parse(self.modalities, self.towers, self.untie)

  def check(self, path: str) -> None:
    """Raises ConfigError or UserError where sizes or names do not agree."""
    del path
    _ = self.routed_towers
    if not self.head_dim and self.dim % self.num_heads:
      raise ConfigError(
        f"config.model.dim={self.dim} is not a multiple of"
        f" config.model.num_heads={self.num_heads}; set config.model.head_dim"
      )
    if self.width_of_head % 2:
      raise ConfigError(
        f"the width of a head is {self.width_of_head}; rotary positions need an"
        f" even one (config.model.head_dim)"
      )
    if self.num_heads % self.kv_heads:
      raise ConfigError(
        f"config.model.num_heads={self.num_heads} is not a multiple of"
        f" config.model.num_kv_heads={self.kv_heads}"
      )
