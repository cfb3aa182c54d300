"""Patches in the contract's order, and what linear and U-Net patches share."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.analysis import hlo
from fusionlab.nn.functional import patches
from fusionlab.nn.patches import LinearPatches
from fusionlab.nn.unet import UNetPatches
from fusionlab.sharding import axes, rules

SIDE, CHANNELS, DIM = 8, 3, 24


def drawn(described):
  """Parameters of which none is zero, about as large as those of `init`.

  In numpy: compiling the drawing of so many shapes takes seconds.
  """
  random = np.random.default_rng(0)

  def draw(name, leaf):
    if name.endswith("scale"):
      return 1 + 0.1 * random.normal(size=leaf.shape)
    deviation = 0.1 if leaf.ndim == 1 else math.prod(leaf.shape[:-1]) ** -0.5
    return deviation * random.normal(size=leaf.shape)

  return {
    name: jnp.asarray(draw(name, leaf), jnp.float32)
    for name, leaf in described.items()
  }


class Case:
  """One kind of patches at one size, called alike whatever it is."""

  def __init__(self, kind, side):
    self.side = side
    self.shape = (2, (SIDE // side) ** 2, side * side * CHANNELS)
    self.unet = kind == "unet"
    self.module = (
      UNetPatches(DIM, SIDE, side, CHANNELS, 8, 1)
      if self.unet
      else LinearPatches(DIM, self.shape[-1])
    )
    self.time = jnp.array([0.25, 0.75])
    keys = jax.random.split(jax.random.key(1), 2)
    self.latents = jax.random.normal(keys[0], self.shape)
    self.hidden = jax.random.normal(keys[1], (*self.shape[:2], DIM))
    # One program for all that is asked of it: (gradients, (hidden, prediction)).
    self.run = jax.jit(jax.grad(self.loss, (0, 1), has_aux=True))

  def of_module(self, time):
    """A U-Net has one noise level per picture, linear patches one each."""
    return time if self.unet else time[:, None] + jnp.zeros(self.shape[:2])

  def init(self, key, method="enter"):
    args = [self.latents, self.of_module(self.time)]
    if method == "leave":
      args = [self.hidden]
      if self.unet:
        c = self.module.channels
        sizes = [(SIDE >> i, c << i) for i in range(self.side.bit_length())]
        skips = tuple(jnp.zeros((2, s, s, w)) for s, w in sizes)
        args += [skips, self.time]
    return self.module.init(key, *args, method=method)["params"]

  def described(self, method="enter"):
    """Shapes in boxes with the axes' names."""
    return jax.eval_shape(lambda key: self.init(key, method), jax.random.key(0))

  @functools.cached_property
  def params(self):
    return drawn(nn.unbox(self.described()))

  def enter(self, params, latents, time):
    """Hidden states, and what `leave` takes beside them."""
    found = self.module.apply(
      {"params": params}, latents, self.of_module(time), method="enter"
    )
    return (found[0], (found[1], time)) if self.unet else (found, ())

  def leave(self, params, hidden, beside):
    return self.module.apply(
      {"params": params}, hidden, *beside, method="leave"
    )

  def through(self, params, latents, time):
    hidden, beside = self.enter(params, latents, time)
    return hidden, self.leave(params, jnp.tanh(hidden), beside)

  def loss(self, params, latents, time):
    both = self.through(params, latents, time)
    return (both[1] * self.latents).sum(), both


make_case = functools.cache(Case)


@pytest.fixture(
  params=[("linear", 2), ("unet", 1), ("unet", 2), ("unet", 4)],
  ids=lambda p: f"{p[0]}_{p[1]}",
)
def case(request):
  return make_case(*request.param)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_patches_stand_in_raster_order_row_column_channel(side):
  pictures = np.arange(2 * 6 * 6 * 5, dtype=np.float32).reshape(2, 6, 6, 5)
  found = patches.patchify(jnp.asarray(pictures), side)
  for i in range((6 // side) ** 2):
    row, column = (side * at for at in divmod(i, 6 // side))
    patch = pictures[:, row : row + side, column : column + side]
    assert (np.asarray(found[:, i]) == patch.reshape(2, -1)).all()
  assert (np.asarray(patches.unpatchify(found, side)) == pictures).all()


def test_time_features_are_waves_of_the_timestep():
  found = np.asarray(patches.time_features(jnp.array([0.0, 0.123, 1.0]), 6))
  for row, timestep in zip(found, (0, 123, 1000), strict=True):
    angles = [timestep / 10_000 ** (i / 3) for i in range(3)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    np.testing.assert_allclose(row, expected, atol=1e-3)


def test_linear_patches_are_their_formula():
  case = make_case("linear", 2)
  w = {k: np.asarray(v, np.float64) for k, v in case.params.items()}
  features = np.asarray(patches.time_features(case.time, 128), np.float64)
  inner = features @ w["time_w1"]
  embedding = inner / (1 + np.exp(-inner)) @ w["time_w2"]
  hidden = (np.asarray(case.latents) + embedding[:, None]) @ w["w_in"]
  _, found = case.run(case.params, case.latents, case.time)
  np.testing.assert_allclose(found[0], hidden, atol=1e-4)
  np.testing.assert_allclose(found[1], np.tanh(hidden) @ w["w_out"], atol=1e-4)


def test_linear_flops_are_the_compiled_programs():
  module = LinearPatches(DIM, 12)
  p = drawn(nn.unbox(make_case("linear", 2).described()))

  def through(latents, time):
    hidden = module.apply({"params": p}, latents, time, method="enter")
    return module.apply({"params": p}, hidden, method="leave")

  program = jax.jit(through).lower(jnp.zeros((5, 12)), jnp.zeros(5)).compile()
  assert hlo.analyse(program.as_text()).flops == 5 * module.flops_per_position


def test_either_way_declares_the_same_parameters(case):
  """So that a tree of one is read by the other."""
  assert case.described() == case.described("leave")


def test_every_axis_is_named(case):
  for name, box in case.described().items():
    assert len(box.names) == box.value.ndim, name
    assert set(box.names) <= set(axes.PARAMETER_AXES), name
    assert box.value.dtype == jnp.float32, name
    rules.spec(box.names)


@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_the_first_prediction_is_zero(kind):
  """And the hidden states are of the size that the patches have."""
  case = make_case(kind, 2)
  params = nn.unbox(jax.jit(case.init)(jax.random.key(0)))
  run = jax.jit(case.through)
  hidden, prediction = run(params, case.latents, case.time)
  assert hidden.shape == (*case.shape[:2], DIM)
  assert 0.5 < float(hidden.std()) < 2
  assert prediction.shape == case.shape and not prediction.any()


def test_the_noise_level_is_seen(case):
  """That of the one picture by the one picture."""
  _, one = case.run(case.params, case.latents, case.time)
  _, other = case.run(case.params, case.latents, jnp.array([0.3, 0.75]))
  for a, b in zip(one, other, strict=True):
    assert float(abs(a - b)[0].max()) > 1e-2
    assert (a[1] == b[1]).all()


def test_gradients_reach_every_entry_of_every_parameter(case):
  (gradients, _), _ = case.run(case.params, case.latents, case.time)
  assert gradients.keys() == case.params.keys()
  for name, g in gradients.items():
    assert np.isfinite(g).all() and np.mean(g != 0) > 0.99, name


@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_bfloat16_computes_in_it_and_predicts_in_float32(kind):
  """Beside what float32 gives, and with gradients of each input's dtype."""
  case = make_case(kind, 2)
  _, both = case.run(case.params, case.latents, case.time)
  (of_params, of_latents), low = case.run(
    case.params, case.latents.astype(jnp.bfloat16), case.time
  )
  assert of_latents.dtype == low[0].dtype == jnp.bfloat16
  assert low[1].dtype == jnp.float32
  assert {g.dtype for g in of_params.values()} == {jnp.dtype("float32")}
  for found, expected in zip(low, both, strict=True):
    error = abs(found.astype(jnp.float32) - expected).max()
    assert 0 < float(error) < 0.05 * float(abs(expected).max())
