"""Noising and sampling against the papers' own formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.nn.functional.diffusion import Process, cosine_abar

DDPM, FLOW = Process("ddpm"), Process("flow")
SAMPLERS = [
  (DDPM, "ddpm", 0.0),
  (DDPM, "ddim", 0.0),
  (DDPM, "ddim", 0.5),
  (FLOW, "euler", 0.0),
]


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def prediction_of(process, x, x0, time):
  """What a model that knows x0 predicts from x."""
  alpha, sigma = process.coefficients(time)
  eps = (x - alpha * x0) / sigma
  return process.target(x0, eps)


@pytest.mark.smoke
def test_abar_goes_from_all_data_to_all_noise():
  """Falls strictly, as cos² in the middle, and no beta is above 0.999."""
  abar = cosine_abar(1000)
  assert abar.shape == (1001,)
  assert abar[0] == 1
  assert 0 < abar[-1] < 1e-8
  beta = 1 - abar[1:] / abar[:-1]
  assert beta.min() > 0
  np.testing.assert_allclose(beta.max(), 0.999)
  t = np.array([0.1, 0.5, 0.9])
  expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  expected /= np.cos(0.008 / 1.008 * np.pi / 2) ** 2
  np.testing.assert_allclose(abar[[100, 500, 900]], expected)


@pytest.mark.parametrize("process", [DDPM, FLOW], ids=str)
@pytest.mark.parametrize("time", [0.0, 0.3, 1.0])
def test_moments_of_noisy_values(process, time):
  """Mean alpha·x0, variance sigma²; times have leading axes alone."""
  x0 = jnp.broadcast_to(jnp.asarray([2.0, -1.0]), (2, 50_000, 2))
  level = jnp.asarray([time, 0.5])[:, None]
  x = np.asarray(process.noisy(x0, normal(0, *x0.shape), level))
  if process is FLOW:
    alpha, sigma = 1 - time, time
  else:
    abar = cosine_abar(1000)[round(1000 * time)]
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
  tolerance = 5 / 50_000**0.5
  np.testing.assert_allclose(
    x[0].mean(0), alpha * np.array([2, -1]), atol=tolerance
  )
  np.testing.assert_allclose(x[0].std(0), [sigma] * 2, atol=tolerance)
  # The second row is at its own time.
  half = np.asarray(process.coefficients(0.5)[0])
  np.testing.assert_allclose(x[1].mean(0)[0], 2 * half, atol=tolerance)


def test_targets_are_noise_and_velocity():
  """The velocity is the derivative of what is noisy by time."""
  x0, eps = normal(0, 4, 3), normal(1, 4, 3)
  np.testing.assert_array_equal(DDPM.target(x0, eps), eps)
  slope = jax.jvp(
    lambda t: FLOW.noisy(x0, eps, t), (jnp.float32(0.4),), (jnp.float32(1),)
  )[1]
  np.testing.assert_allclose(FLOW.target(x0, eps), slope, rtol=1e-6)


@pytest.mark.parametrize("process", [DDPM, FLOW], ids=str)
def test_the_true_target_gives_the_data(process):
  x0, eps = normal(0, 5, 8), normal(1, 5, 8)
  time = jnp.asarray([0.001, 0.25, 0.5, 0.75, 0.98])
  x = process.noisy(x0, eps, time)
  found = process.denoised(x, process.target(x0, eps), time)
  np.testing.assert_allclose(found, x0, atol=3e-5)


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize(("process", "sampler", "eta"), SAMPLERS)
def test_sampling_with_the_true_prediction_returns_the_data(
  process, sampler, eta, steps
):
  """At any number of steps, whatever noise is drawn."""
  x0, start = normal(0, 3, 5), normal(1, 3, 5)
  times = jnp.asarray(process.times(steps))

  @jax.jit
  def sample(x):
    def step(x, each):
      time, after, key = each
      return process.step(
        x,
        prediction_of(process, x, x0, time),
        time,
        after,
        jax.random.normal(key, x.shape),
        sampler=sampler,
        eta=eta,
      ), None

    keys = jax.random.split(jax.random.key(2), steps)
    return jax.lax.scan(step, x, (times[:-1], times[1:], keys))[0]

  # With one step all is read off the first prediction, where x holds 5e-5 of x0.
  tolerance = 5e-3 if steps == 1 and process is DDPM else 1e-5
  np.testing.assert_allclose(sample(start), x0, atol=tolerance)


@pytest.mark.parametrize(
  ("process", "sampler"), [(DDPM, "ddim"), (FLOW, "euler")]
)
def test_deterministic_samplers_stay_on_the_path(process, sampler):
  """With the noise that made x, every step lands on `noisy` of its time."""
  x0, eps = normal(0, 3, 5), normal(1, 3, 5)
  times = process.times(6)[1:]
  x = process.noisy(x0, eps, times[0])
  for time, after in itertools.pairwise(times):
    x = process.step(x, process.target(x0, eps), time, after, sampler=sampler)
    np.testing.assert_allclose(x, process.noisy(x0, eps, after), atol=1e-5)


@pytest.mark.parametrize(
  ("t", "s"), [(1000, 999), (1000, 600), (430, 429), (90, 3)]
)
def test_ddpm_is_the_posterior_of_the_paper(t, s):
  """DDPM Eq. 6 and 7, in float64, between any two times."""
  x0, x, noise = (np.asarray(normal(i, 6), np.float64) for i in range(3))
  abar = cosine_abar(1000)
  ratio = abar[t] / abar[s]
  beta = 1 - ratio
  # Between neighbours beta and ratio are the paper's beta_t and alpha_t.
  mean = (np.sqrt(abar[s]) * beta * x0 + np.sqrt(ratio) * (1 - abar[s]) * x) / (
    1 - abar[t]
  )
  variance = (1 - abar[s]) / (1 - abar[t]) * beta
  expected = mean + np.sqrt(variance) * noise
  eps = (x - np.sqrt(abar[t]) * x0) / np.sqrt(1 - abar[t])
  arguments = (
    *(jnp.asarray(a, jnp.float32) for a in (x, eps)),
    t / 1000,
    s / 1000,
    jnp.asarray(noise, jnp.float32),
  )
  tolerance = 5e-3 if t == 1000 else 2e-5  # alpha is 5e-5 there
  for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0)):
    found = DDPM.step(*arguments, sampler=sampler, eta=eta)
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_ddim_between_is_the_paper_s():
  """DDIM Eq. 12 with the sigma of Eq. 16, in float64."""
  x, eps, noise = (np.asarray(normal(i, 6), np.float64) for i in range(3))
  abar, eta = cosine_abar(1000), 0.4
  now, after = abar[700], abar[620]
  sigma = eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
  x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
  expected = (
    np.sqrt(after) * x0 + np.sqrt(1 - after - sigma**2) * eps + sigma * noise
  )
  found = DDPM.step(
    *(jnp.asarray(a, jnp.float32) for a in (x, eps)),
    0.7,
    0.62,
    jnp.asarray(noise, jnp.float32),
    sampler="ddim",
    eta=eta,
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_euler_follows_the_velocity():
  x, v = normal(0, 4), normal(1, 4)
  found = FLOW.step(x, v, 0.7, 0.45, sampler="euler")
  np.testing.assert_allclose(found, x - 0.25 * v, atol=1e-6)


def test_clipping_bounds_the_data_and_nothing_else():
  """Far from the bound the step is the same; a wild prediction stays within."""
  x0, eps = normal(0, 50), normal(1, 50)
  x = DDPM.noisy(x0, eps, 0.5)
  options = {"sampler": "ddim"}
  plain, clipped = (
    DDPM.step(x, eps, 0.5, 0.4, clip=clip, **options) for clip in (None, 10.0)
  )
  np.testing.assert_allclose(plain, clipped, atol=1e-6)
  wrong = DDPM.step(eps, eps + 0.1, 1.0, 0.0, clip=3.0, **options)
  assert np.abs(wrong).max() == 3.0


@pytest.mark.parametrize(("process", "sampler", "eta"), SAMPLERS)
def test_what_is_clean_stays_as_it_is(process, sampler, eta):
  """A row that is done beside others that are not."""
  x = normal(0, 2, 3)
  time, after = jnp.asarray([0.0, 0.5]), jnp.asarray([0.0, 0.4])
  new = process.step(
    x, normal(1, 2, 3), time, after, normal(2, 2, 3), sampler=sampler, eta=eta
  )
  np.testing.assert_array_equal(new[0], x[0])
  assert np.isfinite(new).all() and (new[1] != x[1]).all()


@pytest.mark.parametrize("steps", [1, 3, 7, 250, 999, 1000])
def test_times_are_timesteps_from_all_noise_to_none(steps):
  """Each once: DDPM's are whole timesteps, which its tables have."""
  for process in (DDPM, FLOW):
    times = process.times(steps)
    assert (times[0], times[-1], len(times)) == (1, 0, steps + 1)
    assert (np.diff(times) < 0).all()
  t = DDPM.times(steps) * 1000
  np.testing.assert_allclose(t, np.round(t), atol=1e-3)


@pytest.mark.parametrize(
  ("call", "said"),
  [
    (lambda: Process("dpm"), "did you mean 'ddpm'"),
    (lambda: Process(num_timesteps=0), "0 timesteps"),
    (lambda: DDPM.check_sampler("dim"), "did you mean 'ddim'"),
    (lambda: DDPM.check_sampler("euler"), "(allowed: ddim, ddpm)"),
    (lambda: FLOW.check_sampler("ddim"), "(allowed: euler)"),
    (lambda: DDPM.check_sampler("ddpm", 0.5), "'ddpm' takes none"),
    (lambda: DDPM.check_sampler("ddim", 1.5), "must be 0 to 1"),
    (lambda: DDPM.times(1001), "1 to 1000"),
    (lambda: FLOW.times(0), "1 or more"),
    (
      lambda: DDPM.step(jnp.ones(2), jnp.ones(2), 1.0, 0.5, sampler="ddpm"),
      "give noise",
    ),
  ],
)
def test_what_is_not_allowed_is_said(call, said):
  with pytest.raises(UserError) as error:
    call()
  assert said in str(error.value)
  assert "\n" not in str(error.value)
