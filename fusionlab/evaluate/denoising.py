"""How well a model denoises a picture, which stands for its likelihood.

A diffusion model has no log p(x | c) that is quick to have. But for the weights of
its terms, −log p(x | c) is bounded, up to a constant, by the squared error of the
predicted noise in expectation over noise levels and noise ("diffusion classifier",
Li et al., arXiv 2303.16203, Eq. 4 and 5). As there, the same levels and noise serve
all that is compared: theirs are drawn once, here they are those of the objective's
held-out loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionlab.batch import Batch
from fusionlab.objectives.noise import normal_of_values


def patch_errors(
  objective: Any,
  model: Any,
  params: Any,
  batch: Batch,
  start: Int[Array, " B"],
) -> Float[Array, "B L"]:
  """Mean square error of what is predicted of each patch of a picture a row.

  Args:
    objective: `fusionlab.objectives.diffusion.NextTokenDiffusion`, or another
      with its `denoise`, `config.heldout_times` and `config.heldout_seed`.
    model: predicts noise, see `fusionlab.models.transfusion`.
    params: its parameters.
    batch: rows with clean latents; one document a row.
    start: position of a patch of the picture; others of its row stay clean.

  Returns:
    float32, the mean over a patch's values and over `heldout_times`; 0 at all
    other positions.
  """
  batch = jax.tree.map(jnp.asarray, batch)
  span: Any = batch.span
  number = jnp.take_along_axis(span, start[:, None], axis=1)
  inside = (span == number) & (number > 0)
  noise = normal_of_values(objective.config.heldout_seed, batch)

  def at_level(level: jax.Array) -> jax.Array:
    time = jnp.where(inside, level, 0.0)
    return objective.denoise(model, params, batch, time, noise)[1]

  # One pass through the model a level, in one program.
  levels = jnp.asarray(objective.config.heldout_times, jnp.float32)
  errors = jax.lax.map(at_level, levels).mean(axis=0)
  return jnp.where(inside, errors, 0.0)
