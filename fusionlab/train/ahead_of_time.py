"""The steps of a run, compiled before there is a run: `--mode=compile`.

Shapes alone are needed, so no data is read and nothing is allocated, and the
devices may be those of a machine that is not there.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from fusionlab.analysis import parameters
from fusionlab.analysis.compiled import Report, compile_report
from fusionlab.analysis.devices import chip, chip_of
from fusionlab.analysis.gpu_targets import GpuTarget, read_target
from fusionlab.analysis.step_costs import report_by_formula
from fusionlab.batch import Vocabulary
from fusionlab.data.loader import Rows, abstract_batch
from fusionlab.data.opening import rows_of
from fusionlab.data.plan import layout_counts
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.models import build_model
from fusionlab.objectives import build_objective
from fusionlab.sharding import axes, rules
from fusionlab.sharding.batches import batch_shardings
from fusionlab.sharding.mesh import (
  PRESETS,
  MeshConfig,
  Preset,
  make_mesh,
  mesh_shape,
)
from fusionlab.sharding.topologies import (
  CUDA_HOW,
  absent_devices,
  absent_gpus,
  cuda_plugin,
  host_devices,
)
from fusionlab.tokenizers import load_tokenizers
from fusionlab.train.setup import Setup, build_steps, default_group_rows
from fusionlab.train.state import with_shardings
from fusionlab.train.workdir import resolve


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What of `fusionlab.data.Data` the steps are made from.

  Attributes:
    vocabulary: the shared vocabulary.
    token_bytes: zeros; values do not matter here.
    layout_counts: places of each modality in a group.
  """

  vocabulary: Vocabulary
  token_bytes: Int[np.ndarray, " V"]
  layout_counts: tuple[int, ...]


def compile_steps(
  experiment: Experiment, target_config: str = ""
) -> Iterator[Report]:
  """Compiles what a run would execute: a training step, and a generation step.

  Args:
    experiment: the configuration; `config.mesh.preset` says for which devices.
    target_config: a file with XLA's description of the GPU; "" for the one that
      is committed for the preset's.

  Yields:
    A report of each. For GPUs without the CUDA plugin one of the training step,
    by formula.

  Raises:
    UserError: a mesh that does not fit, or a machine that cannot be compiled for.
  """
  preset = PRESETS.get(experiment.mesh.preset)
  gpus = preset is not None and not preset.topology
  if target_config and not gpus:
    raise UserError(
      f"--target_config={target_config} describes a GPU, and"
      f" config.mesh.preset={experiment.mesh.preset} is none"
    )
  if preset is not None and gpus and not cuda_plugin() and not target_config:
    yield _lowered_for_gpu(experiment, preset)
    return
  devices, target = None, None
  if preset is not None and gpus:
    target = read_target(preset.chip, target_config)
    devices = absent_gpus(experiment.mesh.preset, target)
  elif preset is not None:
    devices = absent_devices(experiment.mesh.preset)
  mesh = make_mesh(experiment.mesh, devices)
  found = target.chip if target else chip_of(mesh.devices.flat[0])
  setup, rows = setup_without_data(experiment, mesh)
  tokens = rows.batch_rows * rows.row_length / mesh.size
  notes = () if target is None else (_absent(target),)
  yield compile_report(
    "training step",
    lambda: lower_train_step(setup, rows),
    mesh,
    found,
    tokens=tokens,
    model_flops=tokens * setup.train_flops_per_token,
    kernel_flops=_attention_flops(
      setup, rows.batch_rows // experiment.train.accumulate
    ),
    notes=notes,
  )
  shards = rules.data_shards(mesh)
  forward = experiment.model.forward_flops_per_token(
    setup.data.vocabulary.size, experiment.data.row_length
  )
  yield compile_report(
    "generation step, a row to each data shard",
    lambda: lower_generation_step(setup),
    mesh,
    found,
    tokens=shards / mesh.size,
    model_flops=forward * shards / mesh.size,
    kernel_flops={},
    notes=notes,
  )


def _absent(target: GpuTarget) -> str:
  """Says what a program for GPUs was compiled for, and without."""
  return (
    f"compiled for {target.name} as {target.file} describes it; XLA tries kernels"
    f" out on a card, and then may choose others"
  )


def _lowered_for_gpu(experiment: Experiment, preset: Preset) -> Report:
  """Lowers the training step for CUDA on stand-ins; the figures are formulas'.

  XLA's own compiler for GPUs comes with the CUDA plugin.
  """
  model = experiment.model
  if model.compute_dtype == "auto":
    model = dataclasses.replace(model, compute_dtype="bfloat16")
    experiment = dataclasses.replace(experiment, model=model)
  sizes = mesh_shape(experiment.mesh, preset.devices)
  every = MeshConfig("auto", **sizes)
  mesh = make_mesh(every, host_devices(preset.devices))
  setup, rows = setup_without_data(experiment, mesh)
  lower_train_step(setup, rows, platform="cuda")
  vocab_size = setup.data.vocabulary.size
  report = report_by_formula(
    setup.experiment,
    parameters.count(model, vocab_size, setup.model.vocabulary.grids),
    model.vocab_size or vocab_size,
    sizes,
    chip(preset.chip),
    setup.train_flops_per_token,
  )
  return dataclasses.replace(
    report, notes=(f"To compile with XLA's own compiler: {CUDA_HOW}",)
  )


def _attention_flops(setup: Setup, rows: int) -> dict[str, float]:
  """FLOPs of one layer's splash kernels on a device, by part of their names.

  Products of queries with keys, and of weights with values, over half of the
  square: two forward; the backward passes compute the scores again.

  Args:
    setup: its model and mesh.
    rows: of a microbatch, over all devices.
  """
  config, mesh = setup.experiment.model, setup.mesh
  length = setup.experiment.data.row_length
  heads = config.num_heads * config.width_of_head
  product = 2 * rows * length * (length / 2) * heads / mesh.size
  return {
    "splash_mha_fwd": 2 * product,
    "splash_mha_dq": 3 * product,
    "splash_mha_dkv": 4 * product,
  }


def setup_without_data(
  experiment: Experiment, mesh: Mesh
) -> tuple[Setup, Rows]:
  """The parts of a run and the shape of its batches.

  `config.data.layout=auto` takes the mixture's own places per tower, which only
  the data knows; here every modality gets the same. FLOPs, bytes and traffic do
  not depend on it but by rounding.

  Args:
    experiment: the configuration.
    mesh: the devices.

  Raises:
    UserError: a mesh that does not fit the batch, the layout or the model.
  """
  experiment = resolve(experiment, default_group_rows(experiment, mesh))
  config = experiment.data
  tokenizers = load_tokenizers(
    config.text_tokenizer,
    config.image_tokenizer,
    latent_patch=config.latent_patch,
  )
  vocabulary = tokenizers.vocabulary
  model = build_model(experiment.model, vocabulary, config.row_length)
  rules.check_params(model.param_axes(), model.abstract_params(), mesh)
  parts = rules.sequence_shards(mesh)
  modalities = len(vocabulary.modalities)
  counts = layout_counts(
    config.layout,
    vocabulary.modalities,
    np.ones(modalities),
    np.full(modalities, parts),
    row_length=config.row_length,
    group_rows=config.group_rows,
    align=int(np.lcm(config.align, parts)),
  )
  rows = rows_of(
    experiment,
    counts,
    group_rows=config.group_rows,
    latent_dim=vocabulary.latent_dim,
    parts=parts,
  )
  token_bytes = np.zeros(vocabulary.size, np.int32)
  return (
    Setup(
      experiment=experiment,
      mesh=mesh,
      tokenizers=tokenizers,
      data=Shapes(vocabulary, token_bytes, counts),
      model=model,
      objective=build_objective(experiment.objective, vocabulary, token_bytes),
    ),
    rows,
  )


def lower_train_step(
  setup: Setup, rows: Rows, platform: str | None = None
) -> jax.stages.Lowered:
  """Lowers the very step that training runs.

  Args:
    setup: of `setup_without_data`.
    rows: shape of the batch.
    platform: to lower for; default that of the mesh's devices.
  """
  steps = build_steps(setup)
  batch = abstract_batch(rows)
  shardings = batch_shardings(batch, setup.mesh)
  step: Any = steps.train_step
  traced = step.trace(
    with_shardings(steps.abstract, steps.shardings),
    jax.tree.map(_with, batch, shardings),
  )
  return traced.lower(lowering_platforms=platform and (platform,))


def lower_generation_step(
  setup: Setup, *, rows_per_shard: int = 1
) -> jax.stages.Lowered:
  """Lowers one token of every row against a full cache.

  Parameters lie over devices as in training, rows as a batch does.

  Args:
    setup: of `setup_without_data`.
    rows_per_shard: rows of each data shard.
  """
  model, mesh = setup.model, setup.mesh
  config = setup.experiment.model
  length = setup.experiment.data.row_length
  rows = rows_per_shard * rules.data_shards(mesh)
  whole = model.abstract_params()
  with rules.in_mesh(mesh):
    params = jax.eval_shape(model.decoding_params, whole)
    cache = jax.eval_shape(functools.partial(model.init_cache, rows, length))
  names = model.param_axes()
  # A layer's leaves lose the axis of layers.
  layer = jax.tree.map(lambda n: n[1:], names["layers"], is_leaf=rules.is_names)
  names = {**names, "layers": (layer,) * config.num_layers}
  shardings = rules.param_shardings(names, params, mesh)
  held = (axes.ACT_BATCH, axes.KV_HEADS)
  first = _named(mesh, (axes.ACT_BATCH,))

  def step(params: PyTree, tokens: Any, cache: PyTree, length: Any):
    with rules.in_mesh(mesh):
      decoded = model.step(
        params, tokens, cache, start=length, fresh=jnp.ones_like(length)
      )
      logits = model.logits(params, decoded.hidden[:, 0])
      return jnp.argmax(logits, axis=-1), decoded.cache

  ints = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=first)
  return jax.jit(step, donate_argnums=2).lower(
    jax.tree.map(_with, params, shardings),
    jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=first),
    jax.tree.map(lambda x: _with(x, _named(mesh, held)), cache),
    ints,
  )


def _named(mesh: Mesh, names: tuple[str, ...]) -> NamedSharding:
  spec: PartitionSpec = rules.spec(names)
  return NamedSharding(mesh, spec)


def _with(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
