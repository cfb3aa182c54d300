"""Every axis is named, every mesh computes what one device computes."""

import jax
import numpy as np
import pytest

from fusionlab.batch import Vocabulary
from fusionlab.errors import UserError
from fusionlab.models import MODELS, build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.objectives import build_objective
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.sharding import axes, rules
from fusionlab.sharding.mesh import MeshConfig, make_mesh, mesh_shape
from fusionlab.testing.batches import random_batch

VOCABULARY = Vocabulary(("text", "image"), (48, 16))


def _model():
  return build_model(
    MixtureOfTransformersConfig(
      dim=32, num_layers=2, num_heads=4, ffn_dim=32, compute_dtype="float32"
    ),
    VOCABULARY,
  )


@pytest.mark.parametrize("kind", sorted(MODELS.entries))
def test_every_parameter_axis_is_named(kind):
  """No unnamed axis, no unknown name, no mesh axis twice in one array."""
  cls = MODELS.load(kind)
  model = cls(cls.Config(), VOCABULARY)
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))

  def check(names, leaf):
    assert len(names) == leaf.ndim
    assert set(names) <= set(axes.PARAMETER_AXES)
    rules.spec(names)

  jax.tree.map(
    check, model.param_axes(), shapes, is_leaf=lambda x: isinstance(x, tuple)
  )


def test_every_axis_name_has_a_rule():
  """axes.py and the rules agree."""
  assert set(rules.RULES) == set(axes.PARAMETER_AXES + axes.ACTIVATION_AXES)


@pytest.mark.parametrize(
  ("data", "fsdp", "group_rows"), [(8, 1, 2), (1, 8, 2), (2, 4, 2), (2, 4, 8)]
)
def test_eight_devices_equal_one(data, fsdp, group_rows):
  """Loss and gradients on 8 fake devices, to float32 rounding.

  Groups of 8 rows span four devices each.
  """
  model = _model()
  objective = build_objective(
    NextTokenConfig(chunk=8), VOCABULARY, np.ones(48, np.int32)
  )
  batch = random_batch(
    np.random.default_rng(0), VOCABULARY, rows=16, length=16, towers=(0, 1),
    group_rows=group_rows, padding=2, documents=2,
  )  # fmt: skip
  params = jax.jit(model.init_params)(jax.random.key(0))

  def step(params, batch):
    def f(p):
      mean = objective(model, p, batch, train=True)["loss"]
      return mean.total / mean.count

    return jax.value_and_grad(f)(params)

  expected = jax.jit(step)(params, batch)
  mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
  shardings = rules.param_shardings(model.param_axes(), params, mesh)

  def sharded_step(params, batch):
    with rules.in_mesh(mesh):
      return step(params, batch)

  got = jax.jit(
    sharded_step,
    in_shardings=(shardings, rules.batch_shardings(batch, mesh)),
    out_shardings=(rules.replicated(mesh), shardings),
  )(params, batch)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    got,
    expected,
  )
  if fsdp > 1:
    w = got[1]["layers"]["ffn"]["text"]["w_in"]
    assert w.addressable_shards[0].data.shape == (2, 32 // fsdp, 32)


def test_routing_needs_no_collective_beyond_the_dense_models():
  """MoT's activation collectives on 8 data shards are the dense model's."""
  counts = {}
  mesh = make_mesh(MeshConfig(data=8))
  for name, towers in (("dense", (0, 0)), ("mot", (0, 1))):
    config = MixtureOfTransformersConfig(
      dim=32, num_layers=2, num_heads=4, ffn_dim=32, towers=towers,
      compute_dtype="float32",
    )  # fmt: skip
    model = build_model(config, VOCABULARY)
    objective = build_objective(
      NextTokenConfig(chunk=8), VOCABULARY, np.ones(48, np.int32)
    )
    batch = random_batch(
      np.random.default_rng(0), VOCABULARY, rows=16, length=16, towers=towers,
      group_rows=2,
    )  # fmt: skip
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    shardings = rules.param_shardings(model.param_axes(), params, mesh)

    def step(p, b, model=model, objective=objective):
      with rules.in_mesh(mesh):
        return objective(model, p, b, train=False)["loss"].total

    text = (
      jax.jit(
        step, in_shardings=(shardings, rules.batch_shardings(batch, mesh))
      )
      .lower(params, batch)
      .compile()
      .as_text()
    )
    kinds = ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute(")
    counts[name] = [text.count(kind) for kind in kinds]
  assert counts["mot"] == counts["dense"]
  assert counts["mot"][1:] == [0, 0, 0]


@pytest.mark.parametrize(
  ("config", "devices", "message"),
  [
    (MeshConfig(data=4, fsdp=4), 8, "needs 16 devices.*there are 8"),
    (MeshConfig("gpu", data=3), 8, "uses 6 of 8"),
  ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_arithmetic(
  config, devices, message
):
  """One line with the product and the devices."""
  with pytest.raises(UserError, match=message):
    mesh_shape(config, devices)


def test_a_preset_for_absent_hardware_is_refused():
  """tpu on a CPU host says what jax sees."""
  with pytest.raises(UserError, match="jax sees 8 cpu device"):
    make_mesh(MeshConfig("tpu"))


def test_rows_that_do_not_split_are_refused(monkeypatch):
  """The message says which key to change; hosts read whole groups."""
  mesh = make_mesh(MeshConfig(data=8))
  batch = random_batch(
    np.random.default_rng(0), VOCABULARY, rows=8, length=16, towers=(0, 1)
  )
  whole = rules.batch_shardings(batch, mesh).layout.place
  assert whole.is_fully_replicated
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"config\.data\.group_rows"):
    rules.batch_shardings(batch, mesh)
  with pytest.raises(UserError, match="multiple of 8"):
    rules.batch_shardings(batch.replace(tokens=batch.tokens[:6]), mesh)


def test_unknown_and_colliding_axes_are_refused():
  """A misspelt axis name is met with the nearest one."""
  with pytest.raises(UserError, match="did you mean 'embed'"):
    rules.spec(("embd",))
  with pytest.raises(UserError, match="twice"):
    rules.spec((axes.EMBED, axes.EMBED))


def test_the_gradients_only_collective_under_data_parallelism_is_a_sum():
  """Attention's loop over heads and rows stays on each device."""
  model = _model()
  objective = build_objective(
    NextTokenConfig(chunk=8), VOCABULARY, np.ones(48, np.int32)
  )
  batch = random_batch(
    np.random.default_rng(0), VOCABULARY, rows=16, length=256, towers=(0, 1),
    group_rows=2,
  )  # fmt: skip
  params = jax.eval_shape(model.init_params, jax.random.key(0))
  mesh = make_mesh(MeshConfig(data=8))
  shardings = rules.param_shardings(model.param_axes(), params, mesh)

  def step(p, b):
    with rules.in_mesh(mesh):
      return objective(model, p, b, train=True)["loss"].total

  text = (
    jax.jit(
      jax.grad(step),
      in_shardings=(shardings, rules.batch_shardings(batch, mesh)),
    )
    .lower(params, batch)
    .compile()
    .as_text()
  )
  kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
  found = {kind for kind in kinds if f" {kind}(" in text}
  assert found == {"all-reduce"}
