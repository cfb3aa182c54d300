"""What the halves of a U-Net see, skip, cost and refuse."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.analysis import hlo
from fusionlab.errors import UserError
from fusionlab.nn.unet import UNetPatches

DIM, CHANNELS = 16, 2


def build(side, patch, blocks, channels=8):
  """A module with parameters of which none is zero, and its two ways."""
  module = UNetPatches(DIM, side, patch, CHANNELS, channels, blocks)
  random = np.random.default_rng(0)
  shape = (1, (side // patch) ** 2, patch * patch * CHANNELS)
  latents = jnp.asarray(random.normal(size=shape), jnp.float32)
  time = jnp.array([0.4])

  def init(key):
    return nn.unbox(module.init(key, latents, time, method="enter")["params"])

  # Drawing them by `init` takes seconds to compile.
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), leaf.dtype),
    jax.eval_shape(init, jax.random.key(0)),
  )

  def enter(latents, time=time):
    return module.apply({"params": params}, latents, time, method="enter")

  def leave(hidden, skips, time=time):
    return module.apply({"params": params}, hidden, skips, time, method="leave")

  return module, latents, jax.jit(enter), jax.jit(leave)


# Patches along a side, and how far one is seen: two blocks of two convolutions
# on whole and on half pictures, and those around them.
ALONG, REACH = 12, 4


@pytest.fixture(scope="module")
def wide():
  return build(2 * ALONG, 2, 1)


def grid(x):
  return np.asarray(x).reshape(ALONG, ALONG, -1)


def test_a_patch_is_seen_near_it_and_nowhere_else(wide):
  """In raster order, on the way in and on the way out."""
  _, latents, enter, leave = wide
  row, column = 7, 2
  near = np.zeros((ALONG, ALONG), bool)
  near[row - REACH : row + REACH + 1, : column + REACH + 1] = True
  beside = near.copy()
  beside[row - 1 : row + 2, column - 1 : column + 2] = False

  hidden, skips = enter(latents)
  at = (0, ALONG * row + column)
  changes = {
    "enter": grid(enter(latents.at[at].add(1.0))[0] - hidden),
    "leave": grid(leave(hidden.at[at].add(1.0), skips) - leave(hidden, skips)),
  }
  for name, change in changes.items():
    changed = (change != 0).any(-1)
    assert not changed[~near].any(), name
    assert changed[near & ~beside].all(), name


def test_a_picture_that_is_moved_by_a_patch_moves_its_hidden_states(wide):
  """Away from the borders, downwards and to the right alike."""
  _, latents, enter, leave = wide
  inner = slice(REACH, ALONG - REACH - 1)
  shifted = slice(inner.start + 1, inner.stop + 1)
  hidden, skips = enter(latents)
  out = leave(hidden, skips)
  for axis, place in ((0, (shifted, inner)), (1, (inner, shifted))):

    def move(x, axis=axis):
      return jnp.roll(x.reshape(ALONG, ALONG, -1), 1, axis).reshape(x.shape)

    other, _ = enter(move(latents))
    np.testing.assert_allclose(
      grid(other)[place], grid(hidden)[inner, inner], atol=1e-5
    )
    moved_skips = tuple(
      jnp.roll(s, s.shape[1] // ALONG, axis + 1) for s in skips
    )
    np.testing.assert_allclose(
      grid(leave(move(hidden), moved_skips))[place],
      grid(out)[inner, inner],
      atol=1e-4,
    )


def test_skips_and_the_noise_level_reach_the_way_out():
  """One skip of every block, each used, the finest first."""
  _, latents, enter, leave = build(4, 2, 2)
  hidden, skips = enter(latents)
  shapes = [(4, 8), (4, 8), (2, 16), (2, 16)]
  assert [s.shape for s in skips] == [(1, a, a, w) for a, w in shapes]
  out = leave(hidden, skips)
  for i in range(len(skips)):
    without = (*skips[:i], jnp.zeros_like(skips[i]), *skips[i + 1 :])
    assert float(abs(leave(hidden, without) - out).max()) > 1e-3, i
  assert float(abs(leave(hidden, skips, jnp.array([0.9])) - out).max()) > 1e-3


@pytest.mark.parametrize(
  ("side", "patch", "blocks"), [(6, 1, 1), (8, 2, 2), (4, 4, 1)]
)
def test_flops_are_the_compiled_programs(side, patch, blocks):
  """Norms' sums, which compile to products, are all that is left out."""
  module, latents, enter, leave = build(side, patch, blocks)
  text = jax.jit(lambda x: leave(*enter(x))).lower(latents).compile().as_text()
  program = hlo.analyse(text)
  assert not program.uncounted
  assert program.flops == pytest.approx(module.flops_per_picture, rel=0.02)


@pytest.mark.parametrize("patch", [0, 3, 8, 12])
def test_patches_that_halving_does_not_reach_are_refused(patch):
  with pytest.raises(
    UserError, match=rf"{patch} x {patch} .*12 x 12.*allowed: 1, 2, 4$"
  ):
    UNetPatches(DIM, 12, patch, CHANNELS, 8, 1)


def test_no_blocks_are_refused():
  with pytest.raises(UserError, match=r"0 blocks.*from 1"):
    UNetPatches(DIM, 8, 2, CHANNELS, 8, 0)
