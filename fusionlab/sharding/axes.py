"""Names of every parameter and activation axis (about twenty, all here)."""

# Parameters.
LAYERS = "layers"
VOCAB = "vocab"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
FFN = "ffn"
NORM = "norm"
EXPERT = "expert"
MEMORY_SLOT = "memory_slot"
KERNEL = "kernel"
CHANNELS = "channels"

# Activations.
ACT_BATCH = "act_batch"
ACT_GROUP = "act_group"
ACT_LENGTH = "act_length"
ACT_EMBED = "act_embed"

PARAMETER_AXES = (
  LAYERS, VOCAB, EMBED, HEADS, KV_HEADS, HEAD_DIM, FFN, NORM, EXPERT,
  MEMORY_SLOT, KERNEL, CHANNELS,
)  # fmt: skip
ACTIVATION_AXES = (ACT_BATCH, ACT_GROUP, ACT_LENGTH, ACT_EMBED)
