"""What the gate of attention chooses, refuses and says, on any platform.

A mesh of absent devices in scope makes the platform; nothing runs there.
"""

import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.attention import api, attention, recorded_choices

NO_TOKAMAX = importlib.util.find_spec("tokamax") is None


KINDS = {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}


def on(platform: str, devices: int = 1):
  """A context in which programs are made for another platform."""
  device = jax.sharding.AbstractDevice(KINDS[platform], 1, platform)
  mesh = jax.sharding.AbstractMesh(
    (devices,),
    ("rows",),
    axis_types=(jax.sharding.AxisType.Auto,),
    abstract_device=device,
  )
  return jax.sharding.use_abstract_mesh(mesh)


def shapes(length=256, heads=4, groups=2, width=64, dtype="bfloat16"):
  """A call's arrays, for tracing."""
  array = lambda h: jax.ShapeDtypeStruct((2, length, h, width), dtype)  # noqa: E731
  interval = jax.ShapeDtypeStruct((2, length), "int32")
  return array(heads), array(groups), array(groups), interval, interval


def trace(*arrays, **options):
  return jax.eval_shape(functools.partial(attention, **options), *arrays)


@pytest.fixture
def lines(monkeypatch):
  """What the gate logs, with nothing logged before."""
  found = []
  monkeypatch.setattr(
    api.logging, "log", lambda _, form, *values: found.append(form % values)
  )
  api._log_choice.cache_clear()
  yield found
  api._log_choice.cache_clear()


def test_choices_are_recorded_though_they_were_said_before(lines):
  """Each once, of the block alone."""
  trace(*shapes())
  with recorded_choices() as choices:
    trace(*shapes())
    trace(*shapes(length=512))
  trace(*shapes(length=128))
  assert choices == lines == ["attention: xla_blockwise on cpu"]


@pytest.mark.smoke
def test_auto_says_once_what_it_chose(lines):
  for _ in range(2):
    trace(*shapes())
    trace(*shapes(), documents=True)
  assert lines == ["attention: xla_blockwise on cpu"]
  with on("tpu"):
    trace(*shapes(), documents=True)
    trace(*shapes())
    trace(*shapes())
  assert lines[1:] == [
    "attention: splash on tpu",
    "attention: xla_blockwise on tpu; splash refused: intervals that need not"
    " be whole causal documents (documents=True)",
  ]
  with on("gpu"):
    trace(*shapes(dtype="float32"))
    trace(*shapes(dtype="float32"))
  tokamax = (
    "not installed (pip install 'fusionlab[kernels]')"
    if NO_TOKAMAX
    else "it chooses its kernel by the GPU at hand, and there is none"
  )
  assert lines[3:] == [
    f"attention: xla_blockwise on gpu; tokamax refused: {tokamax};"
    " cudnn refused: float32 (it takes float16 and bfloat16)"
  ]


@pytest.mark.parametrize(
  ("platform", "name", "arrays", "options", "reason"),
  [
    ("cpu", "splash", {}, {"documents": True}, "it runs on tpu, not cpu"),
    ("cpu", "cudnn", {}, {}, "it runs on gpu, not cpu"),
    ("tpu", "cudnn", {}, {}, "it runs on gpu, not tpu"),
    ("gpu", "splash", {}, {"documents": True}, "it runs on tpu, not gpu"),
    ("gpu", "cudnn", {"dtype": "float32"}, {}, "float32 .it takes float16 and"),
    ("gpu", "cudnn", {"width": 136}, {}, "head width 136 .it takes multiples"),
    ("gpu", "cudnn", {"width": 12}, {}, "head width 12 .it takes multiples"),
    (
      "gpu",
      "cudnn",
      {"length": 4098},
      {},
      "4098 keys .it builds a mask of B·Q·S",
    ),
    ("tpu", "splash", {}, {}, "intervals that need not be whole"),
    ("tpu", "splash", {"dtype": "float16"}, {"documents": True}, "float16 .it"),
    ("tpu", "splash", {"width": 640}, {"documents": True}, "head width 640"),
  ],
)
def test_a_named_implementation_refuses_and_never_falls_back(
  platform, name, arrays, options, reason
):
  message = f"attention implementation '{name}' cannot do this call: .*{reason}"
  with on(platform), pytest.raises(ValueError, match=message):
    trace(*shapes(**arrays), implementation=name, **options)


@pytest.mark.skipif(not NO_TOKAMAX, reason="tokamax is installed")
def test_a_missing_extra_is_named():
  with pytest.raises(ValueError, match=r"pip install 'fusionlab\[kernels\]'"):
    trace(*shapes(), implementation="tokamax")


def test_kernels_are_not_left_to_the_partitioner():
  """XLA cannot split a kernel: a mesh in scope is refused outside shard_map."""
  call = functools.partial(attention, documents=True, implementation="splash")
  with on("tpu", devices=2):
    with pytest.raises(ValueError, match=r"call it inside jax\.shard_map"):
      jax.eval_shape(call, *shapes())
    rows = jax.sharding.PartitionSpec("rows")
    inside = jax.shard_map(
      call, in_specs=(rows,) * 5, out_specs=rows, check_vma=False
    )
    jax.eval_shape(jax.jit(inside), *shapes())


@pytest.mark.skipif(NO_TOKAMAX, reason="the extra `kernels` is not installed")
def test_another_tokamax_is_refused_with_the_reason(monkeypatch):
  """Its paths beneath the public function may go at any time."""
  from kernels_pallas.attention import tokamax

  arrays = shapes()[:3]
  reasons = tokamax._reasons(("mosaic_gpu", "triton"), *arrays, True)
  assert reasons == dict.fromkeys(reasons, "Not supported on cpu")
  tokamax._reason.cache_clear()
  monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention", None)
  (reason,) = tokamax._reasons(("triton",), *arrays, True).values()
  tokamax._reason.cache_clear()
  assert "tokamax._src.ops.attention" in reason


def test_cudnn_says_itself_that_it_is_missing():
  """Elsewhere than on a CUDA machine, jax finds no cuDNN."""
  if jax.default_backend() == "gpu":
    pytest.skip("there is a GPU")
  with on("gpu"), pytest.raises(ValueError, match="cuDNN is not detected"):
    trace(*shapes(), implementation="cudnn")


def lower(call, platform: str) -> str:
  """The program of a call and its gradients."""

  def loss(*arrays):
    return call(*arrays).astype(jnp.float32).sum()

  return (
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    .trace(*shapes(length=600))
    .lower(lowering_platforms=(platform,))
    .as_text()
  )


def test_splash_lowers_for_tpu():
  """Forward, and the two kernels of the backward pass."""
  call = functools.partial(attention, documents=True, implementation="splash")
  with on("tpu"):
    text = lower(call, "tpu")
  assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


# cuDNN cannot be lowered without its own packages.
@pytest.mark.skipif(NO_TOKAMAX, reason="the extra `kernels` is not installed")
@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
def test_tokamax_lowers_for_cuda(backend, monkeypatch):
  """Both kernels take intervals of any length, forward and backward."""
  from tokamax._src import config, gpu_utils

  from kernels_pallas.attention import tokamax

  call = functools.partial(
    tokamax.attention,
    scale=0.1,
    causal=True,
    backends=(backend,),
  )
  monkeypatch.setattr(gpu_utils, "is_sm90", lambda device=None: True)
  tokamax._reason.cache_clear()
  with on("gpu"), config.cross_compile(True):
    text = lower(call, "cuda")
  tokamax._reason.cache_clear()
  assert "custom_call" in text


@pytest.mark.parametrize(
  ("arrays", "options", "message"),
  [
    ({}, {"implementation": "cudn"}, "unknown; allowed: auto, .*'cudnn'"),
    ({"heads": 3}, {}, "3 query heads cannot share 2"),
    ({}, {"documents": True, "causal": False}, "documents=True promises"),
  ],
)
def test_bad_calls_are_refused(arrays, options, message):
  with pytest.raises(ValueError, match=message):
    trace(*shapes(**arrays), **options)


def test_causal_attention_has_as_many_keys_as_queries():
  q, _, _, *intervals = shapes(8)
  _, k, v, *_ = shapes(9)
  with pytest.raises(ValueError, match="pass causal=False"):
    trace(q, k, v, *intervals)


def test_importing_the_gate_imports_no_kernels(root):
  program = (
    "import sys, kernels_pallas.attention;"
    "print([n for n in sys.modules if n.split('.')[0] == 'tokamax'"
    " or n.startswith('jax.experimental.pallas')])"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=True,
    cwd=root,
  )
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
  ("platform", "level"), [("cpu", "INFO"), ("gpu", "WARNING")]
)
def test_a_slow_path_on_an_accelerator_is_a_warning(
  lines, monkeypatch, platform, level
):
  """So that a command line that hides INFO still shows it."""
  del lines  # nothing was logged before
  levels = []
  monkeypatch.setattr(
    api.logging, "log", lambda level, *_: levels.append(level)
  )
  with on(platform):
    trace(*shapes(dtype="float32"))
  assert levels == [getattr(api.logging, level)]


def test_empty_arrays_are_refused():
  with pytest.raises(ValueError, match=r"empty array: queries \(2, 0, 4, 64\)"):
    trace(*shapes(length=0))
