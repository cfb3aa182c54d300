"""The steps compile from shapes alone, here and for machines that are not here."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from configs.mot_chameleon import get_config
from fusionlab.analysis import compiled, parameters
from fusionlab.analysis.devices import chip
from fusionlab.analysis.step_costs import step_costs
from fusionlab.data.loader import Rows, abstract_batch
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.sharding.batches import split_rows
from fusionlab.sharding.mesh import PRESETS, MeshConfig, make_mesh
from fusionlab.sharding.topologies import absent_devices
from fusionlab.testing.batches import random_batch
from fusionlab.tokenizers import load_tokenizers
from fusionlab.train.ahead_of_time import (
  compile_steps,
  lower_train_step,
  setup_without_data,
)
from tests.train.compiling import experiment_of

# Named apart, since these tests are minutes of compiling where it is installed.
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the extra `tpu` is not installed (libtpu compiles for TPU)",
)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_shapes_are_those_of_a_real_batch(parts):
  """Fields, dtypes and layout, for rows in order and rows that were dealt."""
  vocabulary = load_tokenizers("", "").vocabulary
  batch = random_batch(
    np.random.default_rng(0), vocabulary, rows=4, length=64, towers=(0, 1),
    group_rows=1,
  )  # fmt: skip
  real = split_rows(batch, parts)
  rows = Rows(64, 1, 4, (32, 32), towers=(0, 1), parts=parts)
  described = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), real
  )
  assert abstract_batch(rows) == described


def test_a_step_compiles_for_the_devices_at_hand():
  """On host devices there is no verdict and no time, but everything else."""
  experiment = experiment_of(
    {"preset": "cpu", "fsdp": 4, "data": 2}, rows=8, dim=32, ffn_dim=32
  )
  training, generation = compile_steps(experiment)
  assert training.tokens == 384
  assert training.memory.peak > training.memory.arguments > 0
  assert training.memory.fits is None
  assert training.roofline is None
  # Blockwise attention computes a little more than half of the square.
  assert 1 < training.flops / training.model_flops < 1.5
  axes = {(one.kind, one.axes) for one in training.traffic}
  assert ("all-gather", "fsdp") in axes
  assert ("all-reduce", "data") in axes
  assert generation.tokens == 1
  said = compiled.render(training)
  assert "training step: host, data 2 x fsdp 4" in said
  assert json.loads(json.dumps(training.to_json()))["fits"] is None


def test_a_mesh_that_does_not_fit_is_refused_before_compiling():
  """Batch, model and layout, each with the arithmetic."""
  for mesh, rows, message in (
    ({"data": 8}, 6, "cannot be split over 8 data shards"),
    ({"tensor": 8}, 8, r"tensor=8 does not divide .*num_kv_heads=4"),
    ({"sequence": 5}, 8, "does not divide"),
  ):
    with pytest.raises(UserError, match=message):
      next(compile_steps(experiment_of(mesh, rows=rows)))


def test_too_much_memory_is_a_verdict():
  """What libtpu says becomes numbers."""
  memory = compiled._too_much(
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of"
    " 15.75G hbm. Exceeded hbm capacity by 4.75G."
  )
  assert memory is not None
  assert not memory.fits
  assert memory.peak == int(20.5 * 2**30)
  report = compiled.Report("training step", "v5e", {"fsdp": 16}, memory, 1.0)
  said = compiled.render(report)
  assert "does not fit" in said
  assert "20.50" in said
  assert compiled._too_much("INTERNAL: something else") is None


@needs_libtpu
@pytest.mark.parametrize(
  "mesh",
  [
    {"preset": "tpu_v5e_256", "fsdp": 64},
    {"preset": "tpu_v5p_128", "fsdp": 32, "tensor": 4},
    {"preset": "tpu_v6e_256", "fsdp": 64, "sequence": 4},
  ],
  ids=lambda mesh: mesh["preset"],
)
def test_a_small_model_compiles_for_tpu_pods(mesh):
  """It fits, its collectives run along axes of the mesh, and its time is bound."""
  report = next(compile_steps(experiment_of(mesh, rows=256)))
  assert report.chip == PRESETS[mesh["preset"]].chip
  assert report.memory.fits
  assert report.memory.available == int(chip(report.chip).hbm_bytes)
  assert not report.not_counted
  assert report.roofline is not None
  assert 0 < report.roofline.mfu_serial < report.roofline.mfu_overlapped < 1
  # Attention of TPU's kernel computes whole blocks.
  assert 1 < report.flops / report.model_flops < 2
  assert {"fsdp", "data+fsdp"} & {one.axes for one in report.traffic}
  others = {axis for axis in ("tensor", "sequence") if axis in mesh}
  assert others <= {one.axes for one in report.traffic}


@needs_libtpu
def test_the_formulas_are_held_to_a_compiled_step():
  """Bytes sent and memory, as summary estimates them.

  The compiler may send a gather or a sum as permutes that overlap with products,
  so kinds are not compared.
  """
  experiment = experiment_of(
    {"preset": "tpu_v5e_16"}, rows=32, row_length=512, dim=1024, num_heads=8,
    num_layers=4, remat="full", vocab_size=8192,
  )  # fmt: skip
  report = next(compile_steps(experiment))
  counts = parameters.count(experiment.model, 8192)
  costs = step_costs(experiment, counts, 8192, report.mesh)
  sent, said = (
    # A sum that every device gets whole is sent twice.
    sum(t.sent_bytes / (2 if t.kind == "all-reduce" else 1) for t in one)
    for one in (report.traffic, costs.traffic)
  )
  assert sent == pytest.approx(said, rel=0.25)
  state = 3 * 4 * counts.total / 16
  assert report.memory.arguments == pytest.approx(state, rel=0.02)
  estimate = state + costs.activations
  held = report.memory.arguments + report.memory.temporaries
  assert held == pytest.approx(estimate, rel=0.25)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tpu_v5e_256", "tpu_v5p_128"])
def test_the_7b_model_fits_a_pod(preset):
  """At the paper's batch, with an estimated MFU of more than a half."""
  mapping = get_config("7b").to_dict()
  mapping["mesh"]["preset"] = preset
  report = next(compile_steps(Experiment.from_mapping(mapping)))
  assert report.memory.fits
  assert report.roofline is not None
  assert report.roofline.mfu_overlapped > 0.5


def test_lowering_allocates_nothing_of_the_model():
  """A model of terabytes lowers on this host."""
  mesh = make_mesh(MeshConfig(fsdp=8))
  big = experiment_of(
    {"fsdp": 8}, rows=8, dim=65_536, num_heads=64, num_layers=96
  )
  setup, rows = setup_without_data(big, mesh)
  assert "func.func public @main" in lower_train_step(setup, rows).as_text()


@needs_libtpu
def test_every_slice_is_known_to_libtpu():
  """With as many chips as the preset says, of its kind."""
  for name, preset in PRESETS.items():
    if preset.topology:
      devices = absent_devices(name)
      assert len(devices) == preset.devices
      assert any(k in devices[0].device_kind for k in chip(preset.chip).kinds)
