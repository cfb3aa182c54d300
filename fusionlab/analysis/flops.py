"""Model FLOPs by the config's own formula.

A multiply-add is two FLOPs. Causal attention counts half of the scores; remat,
padding and the moves of routing count nothing; training is three times the
forward pass. A token's cost does not depend on `towers` or `untie`.
"""

from fusionlab.models.transformer import TransformerConfig


def forward_flops_per_token(
  config: TransformerConfig, vocab_size: int, row_length: int
) -> float:
  """FLOPs of one token's forward pass.

  Args:
    config: the model's.
    vocab_size: ids V; `config.vocab_size` overrides it.
    row_length: tokens L over which causal attention looks.
  """
  c = config
  d, dh = c.dim, c.width_of_head
  projections = 2 * d * dh * (2 * c.num_heads + 2 * c.kv_heads)
  scores_and_values = 2 * 2 * (row_length / 2) * c.num_heads * dh
  ffn = 2 * 3 * d * c.width_of_ffn
  head = 2 * d * (c.vocab_size or vocab_size)
  return c.num_layers * (projections + scores_and_values + ffn) + head


def train_flops_per_token(
  config: TransformerConfig, vocab_size: int, row_length: int
) -> float:
  """FLOPs of one token's training step: three forward passes."""
  return 3 * forward_flops_per_token(config, vocab_size, row_length)
