"""FLOPs and parameter formulas are held to what is compiled and counted."""

import dataclasses

import jax
import pytest

from configs import mot_transfusion
from configs.mot_chameleon import get_config
from fusionlab.analysis import parameters, summary
from fusionlab.analysis.devices import chip, peak_flops
from fusionlab.analysis.step_costs import hiding_tokens, state_bytes, step_costs
from fusionlab.batch import Vocabulary
from fusionlab.experiment import Experiment
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.nn.patches import TIME_FEATURES
from fusionlab.sharding.mesh import AXES, mesh_shape
from fusionlab.train.config import OptimizerConfig
from fusionlab.train.optimizer import make_optimizer, make_schedule


@dataclasses.dataclass
class _Device:
  device_kind: str


def test_flops_of_a_token_by_hand():
  """Projections, half the scores, SwiGLU and head; all scores if not causal."""
  config = MixtureOfTransformersConfig(
    dim=8, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=10
  )
  layer = 2 * 8 * 8 + 2 * 2 * 8 * 4 + 2 * 8 * 8 + 4 * 5 * 8 + 2 * 3 * 8 * 10
  expected = 2 * layer + 2 * 8 * 100
  assert config.forward_flops_per_token(100, 10) == expected
  whole = dataclasses.replace(config, causal=False)
  scores = 2 * 2 * 2 * 5 * 8  # layers, two matmuls, half of L, width
  assert whole.forward_flops_per_token(100, 10) == expected + scores


def test_flops_do_not_depend_on_towers():
  """MoT costs a token what dense costs it."""
  mot = MixtureOfTransformersConfig()
  dense = dataclasses.replace(mot, untie="")
  assert mot.forward_flops_per_token(4096, 512) == (
    dense.forward_flops_per_token(4096, 512)
  )


@pytest.mark.smoke
def test_towers_split_the_total():
  """Per-tower numbers add up; active is one tower and the shared rest."""
  counts = parameters.count(MixtureOfTransformersConfig(), 4096)
  assert sum(counts.per_tower.values()) == counts.total
  assert counts.per_tower["text"] == counts.per_tower["image"]
  assert counts.active == counts.total - counts.per_tower["image"]
  assert counts.embedding == counts.per_tower["shared"] == 2 * 4096 * 192


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("cpu", None),
  ],
)
def test_peaks_by_device_kind(kind, peak):
  """The longest matching name counts; a CPU has none."""
  assert peak_flops(_Device(kind)) == peak


def test_summary_names_every_number():
  """Totals, towers, FLOPs and bytes stand in the table as counted."""
  mapping = get_config().to_dict()
  mapping["mesh"] |= {"preset": "auto", "fsdp": 4}
  experiment = Experiment.from_mapping(mapping)
  counts = parameters.count(experiment.model, 4096)
  text = summary.render(experiment)
  for number in (counts.total, counts.active, *counts.per_tower.values()):
    assert f"{number:,}" in text
  row = experiment.data.row_length
  forward = experiment.model.forward_flops_per_token(4096, row)
  assert f"{forward / 1e6:,.1f}" in text
  assert "bytes per device" in text
  adam = dataclasses.replace(
    experiment, optimizer=OptimizerConfig(kind="adamw")
  )
  # float32 parameters, gradients and two moments over four devices.
  assert f"{16 * counts.total / 4 / 2**20:,.1f}" in summary.render(adam)
  whole = Experiment.from_mapping(mapping | {"mesh": {"preset": "auto"}})
  assert "bytes of all devices" in summary.render(whole)


def test_summary_tells_what_brings_patches_in_and_out():
  """The two matrices of linear patches, and those of their noise level."""
  config = mot_transfusion.get_config()
  config.model.patches = "linear"
  experiment = Experiment.from_mapping(config.to_dict())
  words = summary.render(experiment).split("patches in and out")[1].split()
  dim, values = experiment.model.dim, 2 * 2 * 4
  time = TIME_FEATURES * (TIME_FEATURES + values)
  assert words[0] == "│" and words[1] == f"{2 * dim * values + time:,}"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_moments_are_counted_as_the_optimizer_keeps_them(kind):
  """Bytes of what optax's state holds of the parameters."""
  experiment = Experiment.from_mapping(get_config().to_dict())
  config = dataclasses.replace(experiment.optimizer, kind=kind)
  experiment = dataclasses.replace(experiment, optimizer=config)
  vocabulary = Vocabulary(("text", "image"), (3584, 512))
  model = build_model(experiment.model, vocabulary)
  optimizer = make_optimizer(
    config, make_schedule(config, 10), axes=model.param_axes()
  )
  state = jax.eval_shape(optimizer.init, model.abstract_params())
  held = sum(4 * x.size for x in jax.tree.leaves(state) if x.size > 16)
  counts = parameters.count(experiment.model, 4096)
  whole = dict.fromkeys(AXES, 1)
  said = state_bytes(experiment, counts, whole)["optimizer's moments"]
  assert said == pytest.approx(held, rel=1e-5)


def test_summary_tells_what_a_mesh_sends_and_from_where_it_hides():
  """K towers gather K times the matrices; the tokens are those of the formula."""
  config = get_config("7b")
  config.mesh.preset = "tpu_v5e_256"
  mot = Experiment.from_mapping(config.to_dict())
  config.model.untie = ""
  dense = Experiment.from_mapping(config.to_dict())
  mesh = mesh_shape(mot.mesh, 256)
  sent, least = {}, {}
  for name, experiment in (("mot", mot), ("dense", dense)):
    counts = parameters.count(experiment.model, 65_536)
    costs = step_costs(experiment, counts, 65_536, mesh)
    matrices = counts.total - counts.embedding - counts.norms
    gathered = 255 / 256 * 2 * (2 * matrices + counts.embedding)
    assert costs.traffic[0].sent_bytes == pytest.approx(gathered)
    sent[name] = sum(one.sent_bytes for one in costs.traffic)
    # Four links of 50 GB/s; 197 TFLOP/s.
    flops = 3 * experiment.model.forward_flops_per_token(65_536, 4096)
    least[name] = hiding_tokens(costs, chip("v5e"), mesh, flops)
    assert least[name] == pytest.approx(sent[name] / 200e9 * 197e12 / flops)
  assert 1.8 < sent["mot"] / sent["dense"] < 2
  text = " ".join(summary.render(mot).split())
  assert "the matrices of all 2 tower(s) are gathered" in text
  assert f"From {least['mot'] * 3 / 4:,.0f} tokens a device on" in text
