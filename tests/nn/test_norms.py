"""The norms' own backward pass equals autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.nn.functional.norms import rms_norm


@pytest.mark.parametrize("shape", [(7,), (5, 12), (2, 3, 4, 6)])
def test_rms_norm_equals_its_formula(shape):
  """Values and gradients of x and scale, in any number of axes."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (jax.random.normal(key, shape) for key in keys[:2])
  scale = jax.random.uniform(keys[2], shape[-1:]) + 0.5

  def formula(x, scale):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

  def loss(f):
    return jax.jit(jax.value_and_grad(lambda x, s: (f(x, s) * g).sum(), (0, 1)))

  got = loss(lambda x, s: rms_norm(x, s, eps=1e-5))(x, scale)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    got,
    loss(formula)(x, scale),
  )


def test_rms_norm_of_zeros_has_a_finite_gradient():
  """Padding may be all zeros."""
  x, scale = jnp.zeros((3, 8)), jnp.ones(8)
  grads = jax.jit(jax.grad(lambda x: rms_norm(x, scale, eps=1e-5).sum()))(x)
  assert np.isfinite(grads).all()


def test_rms_norm_sums_in_float32():
  """In bfloat16 the gradient of scale over many rows would lose its sum."""
  x = jnp.ones((4096, 4), jnp.bfloat16)
  grad = jax.jit(
    jax.grad(lambda s: rms_norm(x, s, eps=0.0).astype(jnp.float32).sum())
  )(jnp.ones(4))
  np.testing.assert_allclose(grad, 4096, rtol=1e-3)
  assert rms_norm(x, jnp.ones(4), eps=0.0).dtype == jnp.bfloat16
