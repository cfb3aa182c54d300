"""Schedules are functions of the step alone; decay goes by path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import ConfigError
from fusionlab.sharding import rules
from fusionlab.sharding.mesh import MeshConfig, make_mesh
from fusionlab.train.config import OptimizerConfig
from fusionlab.train.optimizer import (
  decay_mask,
  make_optimizer,
  make_schedule,
  named_leaves,
)
from fusionlab.train.state import abstract_state, state_shardings

BASE = OptimizerConfig(
  learning_rate=1.0, warmup_steps=10, final_fraction=0.1, schedule="cosine"
)


def rates(steps, schedule_steps=110, **changes):
  schedule = make_schedule(dataclasses.replace(BASE, **changes), schedule_steps)
  return [float(schedule(step)) for step in steps]


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("name", "middle"),
  [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0), ("wsd", 1.0)],
)
def test_schedule_rises_peaks_and_falls(name, middle):
  """Warm-up ends at the peak, the middle is the shape's, the end is final."""
  first, warm, half, last, after = rates([0, 9, 60, 110, 500], schedule=name)
  assert first == pytest.approx(0.1)
  assert warm == pytest.approx(1.0)
  assert half == pytest.approx(middle)
  assert last == after == pytest.approx(1.0 if name == "constant" else 0.1)


def test_cosine_is_the_cosine():
  """A quarter of the way down is (1 + cos(pi/4)) / 2 above the final rate."""
  (rate,) = rates([35])
  assert rate == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_stable_fraction_holds_the_peak(name):
  """Half of the steps after warm-up stay at the peak, then it falls."""
  held, falling = rates([59, 75], schedule=name, stable_fraction=0.5)
  assert held == pytest.approx(1.0)
  assert falling < 0.95


@pytest.mark.parametrize("warmup", [0, 200])
def test_extreme_warmups_stay_finite(warmup):
  """No warm-up starts at the peak; one longer than the schedule only rises."""
  values = rates([0, 50, 110], warmup_steps=warmup)
  assert np.all(np.isfinite(values))
  assert values[0] == pytest.approx(1.0 if warmup == 0 else 1 / 200)


def params():
  return {
    "embed": jnp.ones((4, 2)),
    "layers": {
      "ffn": {"image": {"w_in": jnp.ones((2, 2))}},
      "ffn_norm": {"image": {"scale": jnp.ones(2)}},
    },
  }


@pytest.mark.smoke
def test_decay_mask_by_path():
  """Norms and embeddings are left out, matrices are not."""
  assert decay_mask(BASE, params()) == {
    "embed": False,
    "layers/ffn/image/w_in": True,
    "layers/ffn_norm/image/scale": False,
  }


def test_decay_acts_where_the_mask_says():
  """With zero gradients, exactly the masked-in leaves shrink by rate·decay."""
  config = dataclasses.replace(BASE, weight_decay=0.5, warmup_steps=0)
  optimizer = make_optimizer(config, make_schedule(config, 100))
  zeros = jax.tree.map(jnp.zeros_like, params())
  updates, _ = optimizer.update(
    zeros, optimizer.init(params()), params(), step=jnp.int32(0)
  )
  moved = {k: float(v.max()) for k, v in named_leaves(updates).items()}
  assert moved["layers/ffn/image/w_in"] == pytest.approx(-0.5)
  assert moved["embed"] == 0
  assert moved["layers/ffn_norm/image/scale"] == 0


def test_first_adam_step_is_the_clipped_sign():
  """Adam's first update is rate·g/|g| whatever the clip scaled g to."""
  config = dataclasses.replace(BASE, weight_decay=0.0, warmup_steps=0)
  optimizer = make_optimizer(config, make_schedule(config, 100))
  grads = jax.tree.map(lambda p: -100.0 * jnp.ones_like(p), params())
  updates, state = optimizer.update(
    grads, optimizer.init(params()), params(), step=jnp.int32(0)
  )
  for update in jax.tree.leaves(updates):
    np.testing.assert_allclose(update, 1.0, rtol=1e-5)
  count = sum(p.size for p in jax.tree.leaves(params()))
  mu = [m for s in state if hasattr(s, "mu") for m in jax.tree.leaves(s.mu)]
  for m in mu:  # (1 - b1)·g of a gradient of global norm 1
    np.testing.assert_allclose(m, -0.1 / np.sqrt(count), rtol=1e-4)


def test_clip_norm_zero_never_clips():
  """Moments hold the gradient itself."""
  config = dataclasses.replace(BASE, clip_norm=0.0)
  optimizer = make_optimizer(config, make_schedule(config, 100))
  grads = jax.tree.map(lambda p: 7.0 * jnp.ones_like(p), params())
  _, state = optimizer.update(
    grads, optimizer.init(params()), params(), step=jnp.int32(0)
  )
  mu = [m for s in state if hasattr(s, "mu") for m in jax.tree.leaves(s.mu)]
  assert len(mu) == 3
  for m in mu:
    np.testing.assert_allclose(m, 0.7, rtol=1e-5)


def test_bad_pattern_is_the_users_error():
  """An unbalanced bracket is named with an example of a good one."""
  config = dataclasses.replace(BASE, no_decay="(norm")
  with pytest.raises(ConfigError, match=r"no_decay='\(norm'.*\(norm\|bias\)"):
    make_optimizer(config, make_schedule(config, 10))


MUON = dataclasses.replace(
  BASE, kind="muon", weight_decay=0.0, warmup_steps=0, clip_norm=0.0
)
# A projection of two layers, one to the width, a table and a norm.
AXES = {
  "layers": {
    "q": ("layers", "embed", "heads", "head_dim"),
    "o": ("layers", "heads", "head_dim", "embed"),
    "scale": ("layers", "norm"),
  },
  "embed": ("vocab", "embed"),
}
SHAPES = {
  "layers": {"q": (2, 12, 2, 4), "o": (2, 2, 4, 12), "scale": (2, 12)},
  "embed": (7, 12),
}


def drawn(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def muon_update():
  optimizer = make_optimizer(MUON, make_schedule(MUON, 100), axes=AXES)
  parameters = drawn(0)
  updates, state = optimizer.update(
    drawn(1), optimizer.init(parameters), parameters, step=jnp.int32(0)
  )
  return updates, state, optimizer


def test_muon_makes_each_layers_matrices_orthogonal():
  """Singular values near 0.2 sqrt(12), as AdamW's root mean square of 0.2."""
  updates, _, _ = muon_update()
  q = np.asarray(updates["layers"]["q"]).reshape(2, 12, 8)
  o = np.asarray(updates["layers"]["o"]).reshape(2, 8, 12)
  for matrix in (*q, *o):
    values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * 12**0.5)
    assert (values > 0.6).all() and (values < 1.3).all()


def test_muon_leaves_tables_and_norms_to_adam():
  updates, _, _ = muon_update()
  grads = drawn(1)
  for update, g in (
    (updates["embed"], grads["embed"]),
    (updates["layers"]["scale"], grads["layers"]["scale"]),
  ):
    # With Nesterov's momentum the first step is longer than 1.
    first = (0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9)) / 1.0
    np.testing.assert_allclose(update, -first * np.sign(g), rtol=1e-4)


@pytest.mark.parametrize("config", [BASE, MUON], ids=["adamw", "muon"])
def test_moments_lie_where_their_parameters_do(config):
  """Every array of a parameter's shape has its sharding, counters are whole."""
  optimizer = make_optimizer(config, make_schedule(config, 100), axes=AXES)
  abstract = abstract_state(drawn(0), optimizer)
  mesh = make_mesh(MeshConfig(data=1, fsdp=8))
  one = rules.replicated(mesh)
  theirs = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
  params = jax.tree.map(lambda leaf: theirs, abstract.params)
  found = state_shardings(abstract, params, one).opt_state
  for leaf, sharding in zip(
    jax.tree.leaves(abstract.opt_state), jax.tree.leaves(found), strict=True
  ):
    belongs = leaf.shape in {p.shape for p in jax.tree.leaves(drawn(0))}
    assert (sharding.spec != one.spec) == belongs
