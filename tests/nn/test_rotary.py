"""Rotary frequencies against the papers' formulas, one feature at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import ConfigError
from fusionlab.models.config import RopeScaling, TransformerConfig
from fusionlab.nn.functional import rotary

HEAD, BASE, BEFORE, FACTOR = 16, 10000.0, 64, 8.0


def ours(**settings):
  scaling = RopeScaling(factor=FACTOR, original_max_position=BEFORE, **settings)
  return np.asarray(scaling.frequencies(HEAD, BASE), np.float64)


def plain():
  return [BASE ** (-2 * i / HEAD) for i in range(HEAD // 2)]


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_none_is_to_the_bit_what_it_was():
  before = BASE ** (-jnp.arange(0, HEAD, 2, dtype=jnp.float32) / HEAD)
  assert (RopeScaling().frequencies(HEAD, BASE) == before).all()
  assert RopeScaling(kind="none", factor=3.0).magnitude == 1.0
  position = jnp.arange(5)[None]
  angles = rotary.rotary_angles(position, before)
  assert (angles == position[..., None].astype(jnp.float32) * before).all()


def test_linear_divides_every_frequency():
  close(ours(kind="linear"), [f / FACTOR for f in plain()])


def test_llama3_keeps_the_fast_and_divides_the_slow():
  expected = []
  for f in plain():
    length = 2 * math.pi / f
    if length < BEFORE / 4:
      expected.append(f)
    elif length > BEFORE / 1:
      expected.append(f / FACTOR)
    else:
      smooth = (BEFORE / length - 1) / (4 - 1)
      expected.append((1 - smooth) * f / FACTOR + smooth * f)
  close(ours(kind="llama3"), expected)
  kinds = {round(e / f, 3) for e, f in zip(expected, plain(), strict=True)}
  assert len(kinds) > 2  # some kept, some divided, some between


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
  ("fast", "slow"), [(8.0, 0.5), (3.0, 3.0), (32.0, 1.0)]
)
def test_yarn_ramps_between_two_indices(truncate, fast, slow):
  def index(turns):
    return HEAD * math.log(BEFORE / (turns * 2 * math.pi)) / 2 / math.log(BASE)

  low, high = index(fast), index(slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, HEAD - 1)
  high += 0.001 * (low == high)
  expected = []
  for i, f in enumerate(plain()):
    shrunk = min(max((i - low) / (high - low), 0), 1)
    expected.append(f / FACTOR * shrunk + f * (1 - shrunk))
  found = ours(kind="yarn", beta_fast=fast, beta_slow=slow, truncate=truncate)
  close(found, expected)


def test_yarn_scales_cosine_and_sine():
  assert RopeScaling(kind="yarn", factor=1.0).magnitude == 1.0
  found = RopeScaling(kind="yarn", factor=FACTOR).magnitude
  assert found == pytest.approx(0.1 * math.log(FACTOR) + 1)
  given = RopeScaling(kind="yarn", factor=FACTOR, attention_factor=1.5)
  assert given.magnitude == 1.5


def test_no_frequencies_rotate_nothing():
  x = jnp.ones((1, 2, 3, 5))
  none = jnp.zeros((1, 2, 0))
  assert (rotary.rotate(x, none, none) == x).all()


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"kind": "llama3"}, "needs config.model.rope_scaling.original_max"),
    ({"kind": "yarn"}, "needs config.model.rope_scaling.original_max"),
    (
      {"kind": "llama3", "original_max_position": 8, "high_freq_factor": 1.0},
      "must be more than config.model.rope_scaling.low_freq_factor",
    ),
    (
      {"kind": "yarn", "original_max_position": 8, "beta_fast": 0.5},
      "must be at least config.model.rope_scaling.beta_slow",
    ),
    ({"kind": "dynamic"}, "is not a choice"),
  ],
)
def test_settings_that_do_not_agree_are_one_line(settings, said):
  from fusionlab.config import from_mapping

  with pytest.raises(ConfigError, match=said):
    from_mapping(TransformerConfig, {"rope_scaling": settings}, "config.model")
