"""Every mesh of eight devices computes what one device computes.

And communicates what it must: parameters and their gradients, which grow with the
towers; activations, which do not; nothing else.
"""

import collections
import functools
import itertools

import jax
import numpy as np
import pytest

from fusionlab.analysis import hlo
from fusionlab.analysis.collectives import mesh_axes
from fusionlab.batch import Vocabulary
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.objectives import build_objective
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.sharding import rules
from fusionlab.sharding.batches import batch_shardings, split_rows
from fusionlab.sharding.mesh import AXES, MeshConfig, make_mesh
from fusionlab.testing.batches import random_batch

VOCABULARY = Vocabulary(("text", "image"), (48, 16))
ROWS, LENGTH, DIM, LAYERS = 8, 32, 16, 2
MESHES = [
  tuple(2**power for power in powers)
  for powers in itertools.product(range(4), repeat=5)
  if sum(powers) == 3
]


def mesh_of(sizes):
  return make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))


@functools.cache
def parts_of(towers):
  """Model, parameters, batch and the step: loss and gradients."""
  config = MixtureOfTransformersConfig(
    dim=DIM, num_layers=LAYERS, num_heads=8, ffn_dim=16, towers=towers,
    compute_dtype="float32", attention="reference",
  )  # fmt: skip
  model = build_model(config, VOCABULARY)
  objective = build_objective(
    NextTokenConfig(chunk=LENGTH), VOCABULARY, np.ones(48, np.int32)
  )
  # Groups of one row, as rows that devices share need them.
  batch = random_batch(
    np.random.default_rng(0), VOCABULARY, rows=ROWS, length=LENGTH,
    towers=towers, group_rows=1, padding=16, documents=2,
  )  # fmt: skip
  params = jax.jit(model.init_params)(jax.random.key(0))

  def step(params, batch):
    def f(p):
      mean = objective(model, p, batch, train=True)["loss"]
      return mean.total / mean.count

    return jax.value_and_grad(f)(params)

  return model, params, batch, step


@functools.cache
def expected(towers):
  _, params, batch, step = parts_of(towers)
  return jax.jit(step)(params, batch)


@functools.cache
def compiled(sizes, towers=(0, 1)):
  """The step, compiled for a mesh, and its arguments placed there."""
  model, params, batch, step = parts_of(towers)
  mesh = mesh_of(sizes)
  batch = split_rows(batch, rules.sequence_shards(mesh))
  shardings = rules.param_shardings(model.param_axes(), params, mesh)
  placed = batch_shardings(batch, mesh)

  def sharded(params, batch):
    with rules.in_mesh(mesh):
      return step(params, batch)

  program = (
    jax.jit(
      sharded,
      in_shardings=(shardings, placed),
      out_shardings=(rules.replicated(mesh), shardings),
    )
    .lower(params, batch)
    .compile()
  )
  return program, jax.device_put((params, batch), (shardings, placed))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_computes_what_one_device_does(sizes):
  """Loss and gradients, to float32 rounding."""
  program, arguments = compiled(sizes)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
    program(*arguments),
    expected((0, 1)),
  )


def test_the_mesh_that_was_asked_for_is_the_one_that_runs():
  """Shards of a parameter have the sizes that the rules say."""
  _, (params, batch) = compiled((1, 2, 2, 1, 2))
  w = params["layers"]["ffn"]["text"]["w_in"]
  assert w.addressable_shards[0].data.shape == (LAYERS, DIM // 2, 16 // 2)
  assert batch.tokens.addressable_shards[0].data.shape == (4, LENGTH // 2)


def traffic(sizes, towers):
  """Bytes of the arrays that collectives work on, by kind and mesh axes."""
  program, _ = compiled(sizes, towers)
  axes = dict(zip(AXES, sizes, strict=True))
  found = collections.Counter()
  for c in hlo.analyse(program.as_text()).collectives:
    if c.group_size > 1:
      found[c.kind, mesh_axes(c, axes)] += c.executions * c.whole_bytes
  return found


def bytes_of(towers):
  """Bytes of a model's layers' matrices, of its tables, QK-norms, other norms."""
  _, params, *_ = parts_of(towers)
  found = dict.fromkeys(("matrices", "tables", "qk_norms", "norms"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    kind = (
      "tables" if "embed" in name
      else "qk_norms" if "q_norm" in name or "k_norm" in name
      else "norms" if "norm" in name
      else "matrices"
    )  # fmt: skip
    found[kind] += leaf.nbytes
  return found


STREAM = ROWS * LENGTH * DIM * 4  # float32 [B, L, d]
KEYS = ROWS * LENGTH * DIM * 4  # as many heads as queries have


@pytest.mark.parametrize("towers", [(0, 0), (0, 1)], ids=["dense", "mot"])
def test_data_parallelism_sums_gradients(towers):
  """One sum of every parameter's gradient, and of the metrics."""
  found = traffic((8, 1, 1, 1, 1), towers)
  gradients = sum(bytes_of(towers).values())
  metrics = found["all-reduce", "data"] - gradients
  assert set(found) == {("all-reduce", "data")}
  assert 0 < metrics < 100


@pytest.mark.parametrize("towers", [(0, 0), (0, 1)], ids=["dense", "mot"])
def test_fsdp_gathers_weights_twice_and_sums_gradients(towers):
  """Matrices are gathered forward and backward, tables once: K times with towers.

  CPU has no reduce-scatter of its own making: layers' gradients are all-reduced.
  """
  found, size = traffic((1, 8, 1, 1, 1), towers), bytes_of(towers)
  assert set(found) == {
    ("all-gather", "fsdp"), ("all-reduce", "fsdp"), ("reduce-scatter", "fsdp")
  }  # fmt: skip
  assert found["all-gather", "fsdp"] == 2 * size["matrices"] + size["tables"]
  assert found["reduce-scatter", "fsdp"] == size["tables"]
  layers = size["matrices"] + size["norms"] + size["qk_norms"]
  assert 0 < found["all-reduce", "fsdp"] - layers < 100


@pytest.mark.parametrize("towers", [(0, 0), (0, 1)], ids=["dense", "mot"])
def test_tensor_parallelism_sums_activations(towers):
  """The embedding; o and w_out forward; q, k, v, w_in, w_gate backward; the loss.

  Whatever the towers: each token's activation is summed once.
  """
  found = traffic((1, 1, 8, 1, 1), towers)
  assert set(found) == {("all-reduce", "tensor")}
  streams = 1 + LAYERS * (2 + 5) + 1
  scores = 3 * ROWS * LENGTH * 4  # top, total and the target's, of each token
  assert found["all-reduce", "tensor"] == (
    streams * STREAM + scores + bytes_of(towers)["qk_norms"]
  )


@pytest.mark.parametrize("towers", [(0, 0), (0, 1)], ids=["dense", "mot"])
def test_context_parallelism_gathers_keys_and_values(towers):
  """Once a layer forward, their gradients scattered back; whatever the towers."""
  found = traffic((1, 1, 1, 1, 8), towers)
  assert set(found) == {
    ("all-gather", "sequence"),
    ("all-reduce", "sequence"),
    ("reduce-scatter", "sequence"),
  }
  assert found["all-gather", "sequence"] == LAYERS * 2 * KEYS
  assert found["reduce-scatter", "sequence"] == LAYERS * 2 * KEYS
  gradients = sum(bytes_of(towers).values())
  assert 0 < found["all-reduce", "sequence"] - gradients < 100


def test_towers_add_parameters_bytes_and_nothing_else():
  """On a mesh of three axes: what MoT sends more than dense does, by kind."""
  sizes = (1, 2, 2, 1, 2)
  mot, dense = traffic(sizes, (0, 1)), traffic(sizes, (0, 0))
  assert set(mot) == set(dense)
  extra = {key: mot[key] - dense[key] for key in mot}
  more = {k: v - bytes_of((0, 0))[k] for k, v in bytes_of((0, 1)).items()}
  # Along tensor each device has half of every matrix.
  half = more["matrices"] // 2
  assert extra.pop(("all-gather", "fsdp")) == 2 * half
  assert extra.pop(("all-reduce", "tensor")) == more["qk_norms"]
  # Gradients: over fsdp, of which each device keeps its half, then over sequence.
  norms = more["norms"] + more["qk_norms"]
  assert extra.pop(("all-reduce", "fsdp")) == half + norms
  assert extra.pop(("all-reduce", "sequence")) == half // 2 + norms
  assert not any(extra.values()), extra


def test_groups_may_span_devices():
  """A run that goes on with more devices keeps its groups of rows."""
  model, params, _, step = parts_of((0, 1))
  batch = random_batch(
    np.random.default_rng(1), VOCABULARY, rows=ROWS, length=LENGTH,
    towers=(0, 1), group_rows=4, padding=2,
  )  # fmt: skip
  mesh = mesh_of((2, 4, 1, 1, 1))
  shardings = rules.param_shardings(model.param_axes(), params, mesh)

  def sharded(params, batch):
    with rules.in_mesh(mesh):
      return step(params, batch)

  got = jax.jit(
    sharded, in_shardings=(shardings, batch_shardings(batch, mesh))
  )(params, batch)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
    got,
    jax.jit(step)(params, batch),
  )
