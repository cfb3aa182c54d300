"""Steps compiled for GPUs that are not there, or said by formula."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import Mesh

from experiments.command_line import define_flags, parse
from fusionlab.analysis import compiled
from fusionlab.analysis.devices import chip
from fusionlab.analysis.gpu_targets import read_target
from fusionlab.errors import UserError
from fusionlab.sharding import topologies
from fusionlab.sharding.mesh import PRESETS
from fusionlab.train import ahead_of_time
from fusionlab.train.ahead_of_time import compile_steps
from tests.train.compiling import experiment_of

needs_cuda = pytest.mark.skipif(
  not topologies.cuda_plugin(),
  reason="the extra `cuda` is not installed (its plugin compiles for GPUs)",
)
GPUS = {"preset": "gpu_h100_8"}
MIDDLE = {
  "rows": 32, "row_length": 512, "dim": 1024, "num_heads": 8, "num_layers": 4,
  "remat": "full", "vocab_size": 8192,
}  # fmt: skip


@pytest.fixture
def no_plugin(monkeypatch):
  monkeypatch.setattr(topologies, "_CUDA_PLUGINS", ("no_such_plugin",))


def test_without_the_plugin_figures_are_formulas_and_it_says_how(no_plugin):
  """One line names the packages."""
  (report,) = compile_steps(experiment_of(GPUS, rows=8, dim=64))
  assert report.by_formula
  assert report.memory.fits
  (how,) = [s for s in compiled.render(report).splitlines() if "ptxas" in s]
  assert "pip install -e '.[cuda]'" in how
  assert "jax-cuda13-plugin" in how
  assert report.to_json()["notes"] == (how,)


def test_a_description_of_a_gpu_must_be_of_use(no_plugin):
  """Not on a TPU, and not where nothing compiles from it."""
  tpu = experiment_of({"preset": "tpu_v5e_16"}, rows=16)
  with pytest.raises(
    UserError, match=r"--target_config=a .*=tpu_v5e_16 is none"
  ):
    next(compile_steps(tpu, "a"))
  card = read_target("h100").file
  with pytest.raises(UserError, match=r"gpu_h100_8 needs .*'\.\[cuda\]'"):
    next(compile_steps(experiment_of(GPUS, rows=8), card))


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--target_config=a"], "--target_config is for --mode=compile"),
    (["--mode=compile", "--target_config="], "--target_config= is empty"),
  ],
)
def test_the_command_line_takes_a_description_to_compile_from(
  root, words, said
):
  """And for nothing else."""

  def options(*words):
    config = f"--config={root / 'configs' / 'mot_chameleon.py'}"
    argv = ["run", config, *words]
    values = flags.FlagValues()
    define_flags(values, argv)
    return parse(values, argv)

  with pytest.raises(UserError, match=said):
    options(*words)
  assert options("--mode=compile").target_config == ""
  given = options("--mode=compile", "--target_config=card.pbtxt")
  assert given.target_config == "card.pbtxt"


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (NotImplementedError("topology not implemented"), "of the same version"),
    (
      jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Failed to parse"),
      "cannot describe the GPUs of config.mesh.preset=gpu_h100_64 by .*h100",
    ),
  ],
)
def test_a_plugin_that_makes_no_gpus_is_one_line(monkeypatch, error, said):
  asked = {}

  def get_topology_desc(**options):
    asked.update(options)
    raise error

  monkeypatch.setattr(topologies, "cuda_plugin", lambda: "jax_cuda13_plugin")
  monkeypatch.setattr(
    "jax.experimental.topologies.get_topology_desc", get_topology_desc
  )
  with pytest.raises(UserError, match=said):
    topologies.absent_gpus("gpu_h100_64", read_target("h100"))
  assert asked["topology"] == "1x8x8"


def report_of(compile, hbm_bytes=100.0):
  """The report of a stand-in for a lowered step on an H100 of so few bytes."""

  class Lowered:
    def compile(self):
      return compile()

  mesh = Mesh(np.asarray(jax.devices()[:1]), ("fsdp",))
  card = dataclasses.replace(chip("h100"), hbm_bytes=hbm_bytes)
  return compiled.compile_report(
    "step", lambda: Lowered(), mesh, card, tokens=1, model_flops=1.0,
    kernel_flops={}, notes=("said",),
  )  # fmt: skip


def test_ptxas_that_is_missing_is_one_line():
  def compile():
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: No PTX compilation provider")

  with pytest.raises(UserError, match="pip install nvidia-cuda-nvcc"):
    report_of(compile)


@pytest.mark.parametrize(
  ("share", "fits", "notes"),
  [(0.7, True, 1), (0.9, True, 2), (1.1, False, 1)],
)
def test_what_jax_takes_of_a_gpu_is_said(share, fits, notes):
  """Where a step fits the card and not what jax takes by itself."""
  step = jax.jit(lambda x: x + 1).lower(np.zeros(1000, np.float32)).compile()
  stats = step.memory_analysis()
  peak = stats.argument_size_in_bytes + stats.output_size_in_bytes
  peak += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
  report = report_of(lambda: step, hbm_bytes=peak / share)
  assert report.memory.fits is fits
  assert report.notes[0] == "said"
  assert len(report.notes) == notes
  said = "XLA_PYTHON_CLIENT_MEM_FRACTION" in compiled.render(report)
  assert said == (notes == 2)


@needs_cuda
def test_the_formulas_are_held_to_a_step_compiled_for_gpus():
  """Bytes sent to the byte, and memory; with the generation step after it."""
  experiment = experiment_of(GPUS, **MIDDLE)
  training, generation = compile_steps(experiment)
  formula = ahead_of_time._lowered_for_gpu(experiment, PRESETS["gpu_h100_8"])
  assert not training.by_formula
  assert training.chip == "h100"
  sent, said = (
    {t.kind: t.sent_bytes for t in one.traffic if t.sent_bytes > 1e6}
    for one in (training, formula)
  )
  assert sent.keys() == {"all-gather", "reduce-scatter"}
  assert sent == pytest.approx(said, rel=0.01)
  assert training.memory.arguments == pytest.approx(
    formula.memory.arguments, rel=0.02
  )
  assert training.memory.available == int(chip("h100").hbm_bytes or 0)
  assert training.flops == pytest.approx(formula.flops, rel=0.1)
  assert training.roofline is not None
  # cuDNN's attention, where it is installed, keeps no scores.
  about = 0.4 if "cudnn on gpu" in " ".join(training.notes) else 0.15
  assert training.memory.peak == pytest.approx(formula.memory.peak, rel=about)
  for report in (training, generation):
    assert report.memory.fits
    assert not report.not_counted
    absent, attention = report.notes
    assert "NVIDIA H100 80GB HBM3" in absent
    assert attention.startswith("attention: ")
    assert json.loads(json.dumps(report.to_json()))["fits"]


@needs_cuda
def test_an_implementation_asked_for_by_name_never_falls_back():
  """Tokamax chooses its kernel by the GPU at hand; splash is for TPUs."""
  for name in ("tokamax", "splash"):
    experiment = experiment_of(GPUS, rows=8, attention=name)
    with pytest.raises(UserError, match=f"config.model.attention: .*{name}"):
      next(compile_steps(experiment))


@needs_cuda
def test_every_gpu_preset_is_known_to_the_plugin():
  """With as many devices as it says, node by node."""
  for name, preset in PRESETS.items():
    if not preset.topology:
      devices = topologies.absent_gpus(name, read_target(preset.chip))
      assert [device.id for device in devices] == list(range(preset.devices))
      assert {device.process_index for device in devices} == set(
        range(preset.devices // 8)
      )


@needs_cuda
def test_what_xla_cannot_read_is_refused(tmp_path):
  """A card's description with a line too many."""
  card = tmp_path / "card.pbtxt"
  card.write_text(read_target("h100").text + "nonsense: 3\n")
  with pytest.raises(UserError, match=r"GPUs .* by .*card\.pbtxt"):
    next(compile_steps(experiment_of(GPUS, rows=8), str(card)))
