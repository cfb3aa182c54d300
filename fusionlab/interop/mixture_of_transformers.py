"""Names of the published Mixture-of-Transformers layers.

Names and shapes as in facebookresearch/Mixture-of-Transformers: a torch Linear
holds [out, in], heads are the slow part of the projected axis.
"""

import numpy as np

from fusionlab.interop.tables import Entry, Sizes, same, transposed


def _into_heads(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  """[H·D, d] to [d, H, D]."""
  return array.T.reshape(sizes["d"], sizes["H"], sizes["D"])


def _out_of_heads(array: np.ndarray, sizes: Sizes) -> np.ndarray:
  """[d, H·D] to [H, D, d]."""
  return array.T.reshape(sizes["H"], sizes["D"], sizes["d"])


_QK_NORM = [
  Entry(
    f"local_experts_{x}_normalization.{{k}}.weight",
    f"attention/{{tower}}/{x}_norm_scale",
    ("D",),
    same,
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
      ("HD", "d"),
      _into_heads,
    )
    for x in "qkv"
  ]
  entries += [
    Entry(
      "local_experts_wo.{k}.weight",
      "attention/{tower}/o",
      ("d", "HD"),
      _out_of_heads,
    ),
    Entry(
      "local_experts_attention_norm.{k}.weight",
      "mixer_norm/{tower}/scale",
      ("d",),
      same,
    ),
  ]
  return [*entries, *(_QK_NORM if qk_norm else ())]


FEED_FORWARD = [
  Entry(
    "local_experts.{k}.w1.weight", "ffn/{tower}/w_gate", ("F", "d"), transposed
  ),
  Entry(
    "local_experts.{k}.w3.weight", "ffn/{tower}/w_in", ("F", "d"), transposed
  ),
  Entry(
    "local_experts.{k}.w2.weight", "ffn/{tower}/w_out", ("d", "F"), transposed
  ),
  Entry(
    "local_experts_ffn_norm.{k}.weight",
    "ffn_norm/{tower}/scale",
    ("d",),
    same,
  ),
]
