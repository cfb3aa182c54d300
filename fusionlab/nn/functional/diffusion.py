"""Noise into values and out of them again: DDPM and rectified flow.

Both mix data x0 and noise eps as x = alpha·x0 + sigma·eps at a time from 0 (data)
to 1 (noise), and a model predicts from x what tells the two apart.

  ddpm   time t / T of T discrete steps, alpha² = abar(t), sigma² = 1 − abar(t) with
         the cosine schedule; the model predicts eps (Ho et al., arXiv 2006.11239).
  flow   alpha = 1 − time, sigma = time; the model predicts the velocity eps − x0
         (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206, whose time
         runs this way too).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusionlab.errors import UserError, nearest

Time = Float[Array | np.ndarray, "..."] | np.floating | float

# Kind of process -> its samplers.
SAMPLERS: Mapping[str, tuple[str, ...]] = {
  "ddpm": ("ddpm", "ddim"),
  "flow": ("euler",),
}


@functools.cache
def cosine_abar(num_timesteps: int) -> Float[np.ndarray, " {num_timesteps}+1"]:
  """Share of the data's variance that is left at t = 0..T.

  Source: Nichol & Dhariwal (arXiv 2102.09672), Eq. 17: f(t) / f(0) with
  f(t) = cos²((t/T + s) / (1 + s) · π/2) and s = 0.008, and no step's beta above
  0.999.

  Args:
    num_timesteps: T.

  Returns:
    float64 abar, from 1 at t = 0 to about 2e-9 at t = T = 1000.
  """
  time = np.arange(num_timesteps + 1) / num_timesteps
  f = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
  beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
  return np.concatenate([[1.0], np.cumprod(1 - beta)])


@dataclasses.dataclass(frozen=True)
class Process:
  """A way from data to noise and back; times have the leading axes of values.

  Attributes:
    kind: 'ddpm' or 'flow'.
    num_timesteps: T, steps of 'ddpm'; times of it are rounded to t / T.
  """

  kind: str = "ddpm"
  num_timesteps: int = 1000

  def __post_init__(self):
    if self.kind not in SAMPLERS:
      raise UserError(
        f"unknown diffusion process {self.kind!r}{nearest(self.kind, SAMPLERS)}"
      )
    if self.num_timesteps < 1:
      raise UserError(
        f"a diffusion process of {self.num_timesteps} timesteps; it needs 1 or"
        f" more"
      )

  @property
  def samplers(self) -> tuple[str, ...]:
    """Names of samplers that `step` takes."""
    return SAMPLERS[self.kind]

  def check_sampler(self, name: str, eta: float = 0.0) -> None:
    """Refuses a sampler that does not go with this process.

    Args:
      name: of the sampler.
      eta: see `step`.

    Raises:
      UserError: an unknown name, one of the other kind, or an eta that is out
        of range or does nothing.
    """
    if name not in self.samplers:
      raise UserError(
        f"sampler {name!r} does not go with the process {self.kind!r}"
        f"{nearest(name, self.samplers)}"
      )
    if not 0 <= eta <= 1:
      raise UserError(f"eta={eta} is out of range: it must be 0 to 1")
    if eta and name != "ddim":
      raise UserError(
        f"eta={eta} is of the sampler 'ddim'; {name!r} takes none"
      )

  def times(self, num_steps: int) -> Float[np.ndarray, " {num_steps}+1"]:
    """Evenly spaced times of a sampler, float32 from 1 down to 0.

    Args:
      num_steps: steps of the sampler.

    Raises:
      UserError: less than one, or more than a discrete process has.
    """
    most = self.num_timesteps if self.kind == "ddpm" else num_steps
    if not 1 <= num_steps <= most:
      raise UserError(
        f"{num_steps} sampling steps; the process {self.kind!r} takes 1"
        f"{f' to {most}' if num_steps >= 1 else ' or more'}"
      )
    times = np.linspace(1, 0, num_steps + 1)
    if self.kind == "ddpm":
      times = np.floor(times * most + 0.5) / most
    return times.astype(np.float32)

  def coefficients(
    self, time: Time
  ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Weights alpha of the data and sigma of the noise, float32.

    Args:
      time: from 0 to 1.
    """
    time = jnp.asarray(time, jnp.float32)
    if self.kind == "flow":
      return 1 - time, time
    # Of tables in float64: near its ends a cosine in float32 has no digits left.
    abar = cosine_abar(self.num_timesteps)
    index = jnp.round(time * self.num_timesteps).astype(jnp.int32)
    alpha = jnp.asarray(np.sqrt(abar), jnp.float32)
    sigma = jnp.asarray(np.sqrt(1 - abar), jnp.float32)
    return alpha[index], sigma[index]

  def noisy(
    self,
    x0: Float[Array, "..."],
    eps: Float[Array, "..."],
    time: Time,
  ) -> Float[Array, "..."]:
    """Data at a time: alpha·x0 + sigma·eps (DDPM Eq. 4), float32.

    Args:
      x0: data.
      eps: standard normal noise of its shape.
      time: noise level.
    """
    alpha, sigma = self._coefficients_of(x0, time)
    return alpha * x0 + sigma * eps

  def target(
    self, x0: Float[Array, "..."], eps: Float[Array, "..."]
  ) -> Float[Array, "..."]:
    """What the model is to predict: eps, or the velocity eps − x0.

    Args:
      x0: data.
      eps: its noise.
    """
    return eps - x0 if self.kind == "flow" else eps

  def denoised(
    self,
    x: Float[Array, "..."],
    prediction: Float[Array, "..."],
    time: Time,
  ) -> Float[Array, "..."]:
    """The data x0 that a prediction stands for, float32.

    Args:
      x: values at `time`.
      prediction: the model's, of `target`.
      time: noise level. At time 1 of 'ddpm' x holds next to no data, and the
        error of a prediction comes out some 20,000 times as large.
    """
    alpha, sigma = self._coefficients_of(x, time)
    if self.kind == "flow":
      return x - sigma * prediction
    return (x - sigma * prediction) / alpha

  def step(
    self,
    x: Float[Array, "..."],
    prediction: Float[Array, "..."],
    time: Time,
    next_time: Time,
    noise: Float[Array, "..."] | None = None,
    *,
    sampler: str,
    eta: float = 0.0,
    clip: float | None = None,
  ) -> Float[Array, "..."]:
    """One step of a sampler, between any two times, float32.

    All are DDIM (Song et al., arXiv 2010.02502, Eq. 12 and 16),

      x' = alpha'·x0 + sqrt(sigma'² − v)·eps + sqrt(v)·noise,

    of the predicted x0 and the eps that belongs to it, with the variance
    v = eta²·sigma'²·(1 − (alpha·sigma' / (alpha'·sigma))²). With eta = 1 that is
    DDPM's ancestral step (Eq. 6 and 7 there), and where alpha = 1 − sigma with
    eta = 0 it is Euler's along the velocity.

    Args:
      x: values at `time`.
      prediction: the model's, of `target`.
      time: noise level now; where it is 0, nothing changes.
      next_time: noise level after the step, at most `time`.
      noise: standard normal; needed where eta is not 0.
      sampler: a name of `samplers`.
      eta: of 'ddim', from 0 (deterministic) to 1 (as 'ddpm').
      clip: largest |x0|: a predicted x0 beyond it is cut off. None: no bound.

    Raises:
      UserError: see `check_sampler`; or noise that is missing.
    """
    self.check_sampler(sampler, eta)
    eta = 1.0 if sampler == "ddpm" else eta
    if not eta:
      noise = None
    elif noise is None:
      raise UserError(
        f"the sampler {sampler!r} with eta={eta} draws noise in each step: give"
        f" noise of the shape of x"
      )
    alpha, sigma = self._coefficients_of(x, time)
    next_alpha, next_sigma = self._coefficients_of(x, next_time)
    x0 = self.denoised(x, prediction, time)
    if clip is not None:
      x0 = jnp.clip(x0, -clip, clip)
    divisor = jnp.where(sigma > 0, sigma, 1.0)
    eps = (x - alpha * x0) / divisor
    if noise is None:
      return next_alpha * x0 + next_sigma * eps
    kept = jnp.square(alpha * next_sigma / (next_alpha * divisor))
    variance = eta**2 * next_sigma**2 * jnp.clip(1 - kept, 0.0, 1.0)
    mean = next_alpha * x0 + jnp.sqrt(next_sigma**2 - variance) * eps
    return mean + jnp.sqrt(variance) * noise

  def _coefficients_of(
    self, x: jax.Array, time: Time
  ) -> tuple[jax.Array, jax.Array]:
    """Coefficients, with the trailing axes that `x` has more than `time`."""
    missing = tuple(range(jnp.ndim(time), jnp.ndim(x)))
    alpha, sigma = self.coefficients(time)
    return jnp.expand_dims(alpha, missing), jnp.expand_dims(sigma, missing)
