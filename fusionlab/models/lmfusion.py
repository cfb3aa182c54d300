"""LMFusion: a pretrained text model that learns pictures, its text untouched.

Source: Shi et al., "LMFusion: Adapting Pretrained Language Models for Multimodal
Generation" (arXiv 2412.15188), Eq. 5 to 14. It is Transfusion with towers around a
Llama: every text parameter is the Llama's and stays frozen, the image tower starts as
a copy of it, a U-Net's halves take patches in and out, and one attention joins both.
With `untie` of all names the separation is the paper's deep one, 'ffn ffn_norm' is
its shallow one, and '' separates nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionlab.config import option
from fusionlab.models.transfusion import Transfusion, TransfusionConfig


@dataclasses.dataclass(frozen=True)
class LMFusionConfig(TransfusionConfig):
  """`config.model`; the sizes are those of the text model that is grown."""

  kind: str = option("lmfusion", "registered model or package.module:Class")
  patches: str = option(
    "unet",
    "how patches enter and leave: by a matrix, or by a U-Net's halves",
    choices=("linear", "unet"),
  )
  text_length: int = option(
    0,
    "tokens of the longest document that the text model was trained on; 0:"
    " config.data.row_length",
    minimum=0,
  )

  def longest(self, row_length: int) -> int:
    """The text model's, where rows with pictures are shorter."""
    return max(self.text_length, row_length)


class LMFusion(Transfusion):
  """The decoder around a text model, whose scores of text it gives bit for bit."""

  Config = LMFusionConfig

  @property
  def text_ids(self) -> int:
    """Ids of the text model: those of text without borders appended to them."""
    v = self.vocabulary
    borders = {*v.begin[1:], *v.end[1:]}
    number = v.sizes[0]
    while number - 1 in borders:
      number -= 1
    return number

  def logits(
    self, params: dict, hidden: Float[Array, "*s d"]
  ) -> Float[Array, "*s V"]:
    """Scores of every id, float32.

    Those of the text model's ids are a product of their own: how a product is
    summed depends on its width, and this one is as wide as the text model's.

    Args:
      params: the model's parameters.
      hidden: what `apply` returned, or some positions of it.
    """
    tied = self.config.tie_embeddings
    table = params["embed" if tied else "unembed"].astype(hidden.dtype)
    parts = jnp.split(table, [self.text_ids], axis=0 if tied else 1)
    # Else the cut becomes a part of the product, which is then another one.
    parts = jax.lax.optimization_barrier(parts)
    scores = [
      jnp.matmul(
        hidden,
        part.T if tied else part,
        preferred_element_type=jnp.float32,
      )
      for part in parts
    ]
    return jnp.concatenate(scores, axis=-1)
