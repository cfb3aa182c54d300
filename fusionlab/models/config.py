"""`config.model` of the decoder that every model here is made of."""

import dataclasses
import math

from jaxtyping import Array, Float

from fusionlab.config import option
from fusionlab.errors import ConfigError
from fusionlab.nn.feed_forward import swiglu_width
from fusionlab.nn.functional import rotary
from fusionlab.towers import Towers
from kernels_pallas.attention.api import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """`config.model.rope_scaling`: longer documents than the model first saw.

  The formulas are `fusionlab.nn.functional.rotary`'s; a kind reads its own keys.
  """

  kind: str = option(
    "none",
    "how the rotary frequencies are scaled",
    choices=("none", "linear", "llama3", "yarn"),
  )
  factor: float = option(1.0, "how much longer documents become", minimum=1e-3)
  original_max_position: int = option(
    0, "llama3, yarn: positions of the first training", minimum=0
  )
  low_freq_factor: float = option(
    1.0, "llama3: turns below which a frequency is divided", minimum=0.0
  )
  high_freq_factor: float = option(
    4.0, "llama3: turns above which a frequency stays", minimum=0.0
  )
  beta_fast: float = option(
    32.0, "yarn: turns above which a frequency stays", minimum=1e-6
  )
  beta_slow: float = option(
    1.0, "yarn: turns below which a frequency is divided", minimum=1e-6
  )
  attention_factor: float = option(
    0.0, "yarn: factor on cosine and sine; 0: 0.1 ln(factor) + 1", minimum=0.0
  )
  truncate: bool = option(True, "yarn: the ramp's ends are whole indices")

  @property
  def magnitude(self) -> float:
    """Factor on cosine and sine; 1 but for yarn."""
    if self.kind != "yarn":
      return 1.0
    return self.attention_factor or rotary.yarn_magnitude(self.factor)

  def frequencies(self, head_dim: int, base: float) -> Float[Array, " half"]:
    """The scaled frequencies, float32, in radians per position.

    Args:
      head_dim: D.
      base: `config.model.rope_base`.
    """
    frequency = rotary.rotary_frequencies(head_dim=head_dim, base=base)
    if self.kind == "linear":
      return rotary.linear_scaling(frequency, factor=self.factor)
    if self.kind == "llama3":
      return rotary.llama3_scaling(
        frequency,
        factor=self.factor,
        low_freq_factor=self.low_freq_factor,
        high_freq_factor=self.high_freq_factor,
        original_max_position=self.original_max_position,
      )
    if self.kind == "yarn":
      return rotary.yarn_scaling(
        frequency,
        base=base,
        factor=self.factor,
        beta_fast=self.beta_fast,
        beta_slow=self.beta_slow,
        original_max_position=self.original_max_position,
        truncate=self.truncate,
      )
    return frequency

  def check(self, path: str) -> None:
    """Raises ConfigError where a kind lacks what it needs."""
    if self.kind in ("llama3", "yarn") and not self.original_max_position:
      raise ConfigError(
        f"{path}.kind={self.kind!r} needs {path}.original_max_position, the"
        f" positions that the model was first trained on"
      )
    if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
      raise ConfigError(
        f"{path}.high_freq_factor={self.high_freq_factor} must be more than"
        f" {path}.low_freq_factor={self.low_freq_factor}"
      )
    if self.kind == "yarn" and self.beta_fast < self.beta_slow:
      raise ConfigError(
        f"{path}.beta_fast={self.beta_fast} must be at least"
        f" {path}.beta_slow={self.beta_slow}"
      )


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
  rope_scaling: RopeScaling = option(
    RopeScaling, "scaling of the rotary frequencies"
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
    scores_and_values = self.num_layers * 2 * 2 * seen * self.num_heads * dh
    head = 2 * d * (self.vocab_size or vocab_size)
    return math.fsum(self.matrix_flops.values()) + scores_and_values + head

  @property
  def matrix_flops(self) -> dict[str, float]:
    """FLOPs of a token's forward pass in all layers' matrices, by untie name."""
    head = 2 * self.num_layers * self.dim * self.width_of_head
    return {
      "q": head * self.num_heads,
      "k": head * self.kv_heads,
      "v": head * self.kv_heads,
      "o": head * self.num_heads,
      "ffn": 2 * 3 * self.num_layers * self.dim * self.width_of_ffn,
    }

  def longest(self, row_length: int) -> int:
    """Tokens of the longest document that the model has seen.

    Args:
      row_length: tokens of a row in training; 0 where it is not known.
    """
    return row_length

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
    if self.rope_scaling.kind == "yarn" and self.rope_base <= 1:
      raise ConfigError(
        f"config.model.rope_base={self.rope_base} must be more than 1 with"
        f" config.model.rope_scaling.kind='yarn'"
      )
    if self.num_heads % self.kv_heads:
      raise ConfigError(
        f"config.model.num_heads={self.num_heads} is not a multiple of"
        f" config.model.num_kv_heads={self.kv_heads}"
      )
