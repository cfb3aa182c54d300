"""A picture out of noise: by what is known of it, and by what is refused."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.generation.config import Sampling
from fusionlab.generation.denoising import Denoiser, make_denoiser
from fusionlab.nn.functional.diffusion import Process
from tests.generation import tiny
from tests.models import pictures
from tests.models.pictures import GRID, VOCABULARY

N = GRID.positions
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


class Oracle:
  """Knows the picture: its prediction is the noise that is there."""

  vocabulary, image = VOCABULARY, 1

  def __init__(self, process, clean):
    self.process, self.clean = process, clean

  def step(self, params, tokens, cache, *, latents, time, fresh, **options):
    """Predicts from what the step says of values and levels."""
    del params, options
    alpha, sigma = self.process.coefficients(time[..., None])
    eps = (latents - alpha * self.clean) / jnp.where(sigma > 0, sigma, 1)
    prediction = self.process.target(self.clean, eps)
    assert tokens.shape == time.shape == (2, N)
    return SimpleNamespace(prediction=prediction, cache=cache + fresh.sum())


@pytest.mark.parametrize(
  ("kind", "name", "eta"),
  [
    ("ddpm", "ddpm", 0.0),
    ("ddpm", "ddim", 0.0),
    ("ddpm", "ddim", 0.7),
    ("flow", "euler", 0.0),
  ],
)
def test_the_true_noise_leads_to_the_picture(kind, name, eta):
  """C3 through the whole loop; the cache is run at each level and clean."""
  clean = jax.random.normal(jax.random.key(3), (2, N, GRID.dim))
  oracle = Oracle(Process(kind), clean)
  denoiser = Denoiser(oracle, 20, name, eta, None, False, snapshots=3)
  drawn = jax.jit(denoiser)(
    None,
    jnp.int32(0),
    first=jnp.array([3, 5]),
    due=jnp.array([True, False]),
    keys=tiny.keys_of(2),
    guidance=jnp.float32(1),
  )
  close(drawn.latents, clean)
  assert drawn.cache == 21 * N
  for k in range(3):
    close(drawn.snapshots[:, k], clean, atol=1e-3)


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"sampler": "euler"}, "'euler' does not go with the process 'ddpm'"),
    ({"sampler": "ddpn"}, "'ddpn'.*did you mean 'ddpm'"),
    ({"eta": 0.5}, "eta=0.5 is of the sampler 'ddim'"),
    ({"diffusion_steps": 1001}, "1001 sampling steps.*1 to 1000"),
    ({"snapshots": 50}, "snapshots=50.*diffusion_steps=50; allowed: 0 to 49"),
  ],
)
def test_settings_that_do_not_fit_the_process_are_refused(options, said):
  model, _ = pictures.make()
  snapshots = options.pop("snapshots", 0)
  with pytest.raises(UserError, match=said):
    make_denoiser(model, Sampling(**options), snapshots)


def test_codes_are_not_denoised():
  """What is of continuous pictures is refused, and else nothing is made."""
  codes, _ = tiny.make()
  assert make_denoiser(codes, Sampling(guidance=3.0)) is None
  with pytest.raises(
    UserError, match="sampler='ddim', snapshots=2: for contin"
  ):
    make_denoiser(codes, Sampling(sampler="ddim"), 2)
  with pytest.raises(UserError, match="denoise_hook"):
    make_denoiser(codes, Sampling(), hook=lambda x, moment: x)
