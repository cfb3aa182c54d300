"""FLOPs, bytes, loops and collectives are read right from compiled programs."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from fusionlab.analysis import hlo
from fusionlab.analysis.collectives import mesh_axes
from fusionlab.analysis.hlo_text import parse_shapes
from fusionlab.errors import UserError

AXES = {"data": 2, "fsdp": 4}


def _analyse(function, *arguments) -> hlo.Program:
  return hlo.analyse(jax.jit(function).lower(*arguments).compile().as_text())


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _mlp(weights, x):
  def layer(x, w):
    return jnp.tanh(x @ w[0]) @ w[1], None

  return jax.lax.scan(layer, x, weights)[0].sum()


@pytest.mark.smoke
def test_a_scanned_mlp_counts_every_layer():
  """Five layers of two products forward; twice more for the gradients."""
  weights, x = (_f32(5, 16, 48), _f32(5, 48, 16)), _f32(8, 16)
  forward = 5 * 2 * 2 * 8 * 16 * 48
  program = _analyse(_mlp, weights, x)
  assert program.flops == forward
  assert [loop.trips for loop in program.loops] == [5]
  both = _analyse(jax.grad(_mlp, argnums=(0, 1)), weights, x)
  assert both.flops == 3 * forward
  assert not both.unknown_loops and not both.uncounted


def test_remat_counts_the_recomputed_products():
  """What the backward pass computes again is computed."""

  def loss(weights, x):
    layer = jax.checkpoint(
      lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), prevent_cse=True
    )
    return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

  weights, x = (_f32(5, 16, 48), _f32(5, 48, 16)), _f32(8, 16)
  one = 5 * 2 * 8 * 16 * 48
  # Forward 2, gradients 4, and the first product again, which tanh needs.
  flops = _analyse(jax.grad(loss, argnums=(0, 1)), weights, x).flops
  assert flops == 7 * one


def test_nested_scans_multiply():
  """Three outer times seven inner iterations."""

  def step(x, w):
    return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x @ w), x), None

  program = _analyse(
    lambda x, w: jax.lax.scan(step, x, w)[0], _f32(4, 8), _f32(3, 8, 8)
  )
  assert program.flops == 3 * 7 * 2 * 4 * 8 * 8
  assert sorted((loop.trips, loop.executions) for loop in program.loops) == [
    (3, 1),
    (7, 3),
  ]


def test_a_loop_of_unknown_length_counts_once_and_is_named():
  """The bound is data."""
  program = _analyse(
    lambda n, x, w: jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ w), x),
    jax.ShapeDtypeStruct((), jnp.int32),
    _f32(4, 8),
    _f32(8, 8),
  )
  assert program.flops == 2 * 4 * 8 * 8
  assert len(program.unknown_loops) == 1


def test_the_dearer_branch_of_a_conditional_counts():
  """One product or three."""

  def dear(x, w):
    return jnp.sin(jnp.sin(x @ w) @ w) @ w

  program = _analyse(
    lambda p, x, w: jax.lax.cond(p, dear, lambda x, w: x @ w, x, w),
    jax.ShapeDtypeStruct((), jnp.bool_),
    _f32(4, 8),
    _f32(8, 8),
  )
  assert program.flops == 3 * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
  ("features", "padding", "expected"),
  [
    # 'VALID': 6 outputs, each 3 kernel positions and 4 to 10 features.
    (1, "VALID", 2 * 2 * 6 * 3 * 4 * 10),
    # 'SAME': 8 outputs, of which the outer two miss one kernel position.
    (1, "SAME", 2 * 2 * (8 * 3 - 2) * 4 * 10),
    # Depthwise: each output feature sees one input feature.
    (4, "VALID", 2 * 2 * 6 * 3 * 1 * 4),
  ],
)
def test_convolutions_count_positions_inside_the_input(
  features, padding, expected
):
  """Padding costs nothing; groups divide."""
  out = 10 if features == 1 else 4
  program = _analyse(
    lambda x, k: jax.lax.conv_general_dilated(
      x,
      k,
      (1,),
      padding,
      dimension_numbers=("NWC", "WIO", "NWC"),
      feature_group_count=features,
    ),
    _f32(2, 8, 4),
    _f32(3, 4 // features, out),
  )
  assert program.flops == expected


def test_a_scan_reads_its_layers_weights_once():
  """The stacked weights cost their slices: all of them, not all per layer."""
  layers, width, rows = 64, 256, 8
  program = _analyse(
    lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0],
    _f32(rows, width),
    _f32(layers, width, width),
  )
  weights = 4 * layers * width * width
  # A slice may be written and read again before it is multiplied.
  assert weights <= program.bytes_accessed < 4 * weights


def test_elementwise_traffic_is_operands_and_result():
  """One fusion reads two arrays and writes one."""
  program = _analyse(
    lambda x, y: jnp.exp(x) * y + 1, _f32(128, 256), _f32(128, 256)
  )
  assert program.bytes_accessed == 3 * 4 * 128 * 256
  assert program.flops == 0


@pytest.mark.parametrize(
  ("text", "size", "stored", "space"),
  [
    ("f32[8,4]{1,0}", 128, 128, 0),
    ("bf16[3,100]{1,0:T(8,128)(2,1)S(1)}", 600, 8 * 128 * 2, 1),
    ("f32[256,4]{0,1:T(4,128)}", 4096, 4096, 0),
    ("s4[3]{0}", 2, 2, 0),
    ("f8e4m3fn[2,2]{1,0}", 4, 4, 0),
    ("pred[]{:T(512)}", 1, 512, 0),
    ("u32[<=7]{0}", 28, 28, 0),
  ],
)
def test_sizes_of_arrays(text, size, stored, space):
  """Values, tiles' padding and memory space."""
  (shape,) = parse_shapes(text)
  assert (shape.bytes, shape.stored_bytes, shape.space) == (size, stored, space)


def test_what_is_no_module_is_refused():
  """A line, not a traceback from the middle of a parser."""
  with pytest.raises(UserError, match="not the text of an HLO module"):
    hlo.analyse("module @jit_f {}")


def _fixture(name: str) -> hlo.Program:
  path = pathlib.Path(__file__).parent / "fixtures" / f"{name}.hlo.txt"
  return hlo.analyse(path.read_text())


def test_a_tpus_scan_over_split_weights():
  """Compiled for v5e:2x4 by `python -m tests.analysis.make_hlo_fixtures`.

  Three layers of [512, 2048] x [2048, 2048] on each chip: their products are
  convolutions, loops say their trips only in their conditions, gathers are
  fusions of three steps, and the reduce-scatter is a fused all-reduce.
  """
  program = _fixture("fsdp_scan")
  assert program.num_devices == 8
  assert program.flops == 3 * 3 * 2 * 512 * 2048 * 2048
  assert [loop.trips for loop in program.loops] == [3, 3]
  sent: dict[tuple[str, str], float] = {}
  for found in program.collectives:
    key = (found.kind, mesh_axes(found, AXES))
    sent[key] = sent.get(key, 0) + found.total_bytes
  weights = 3 * 2048 * 2048 * 2
  # Forward and backward gather; gradients are summed over fsdp, then data.
  assert sent["all-gather", "fsdp"] == 2 * 3 / 4 * weights
  assert sent["all-reduce", "data"] == 2 * 1 / 2 * weights / 4
  # 2,048 rows in four parts are padded to 2,240, with halos sent onwards.
  scattered = sent.pop(("reduce-scatter", "fsdp"))
  assert scattered == pytest.approx(3 / 4 * weights, rel=0.04)
  halo = sent.pop(("collective-permute", "fsdp"))
  assert halo < 0.05 * scattered
  assert set(sent) == {("all-gather", "fsdp"), ("all-reduce", "data")}


def test_a_tpus_memory_traffic_leaves_out_the_chips_own():
  """The same program reads its weights and rows once, and writes gradients.

  Gathered weights and activations stay in the chip's own memory, `S(1)`.
  """
  program = _fixture("fsdp_scan")
  part = 3 * 512 * 2048 * 2
  everywhere = hlo.analyse(
    (pathlib.Path(__file__).parent / "fixtures" / "fsdp_scan.hlo.txt")
    .read_text()
    .replace("S(1)", "")
  )
  assert 2 * part < program.bytes_accessed < 4 * part
  assert everywhere.bytes_accessed > 3 * program.bytes_accessed


def test_a_kernels_stated_cost_counts():
  """`cost_estimate` of a Pallas call, four times in a loop (same command).

  The call's metadata takes several lines; what follows is read all the same.
  """
  program = _fixture("pallas_call")
  assert [loop.trips for loop in program.loops] == [4]
  assert program.flops == 4 * 1000
  assert not program.uncounted
  text = (
    (pathlib.Path(__file__).parent / "fixtures" / "pallas_call.hlo.txt")
    .read_text()
    .replace("cost_estimate", "cost_guess")
    .replace('"flops"', '"floops"')
  )
  silent = hlo.analyse(text)
  assert silent.flops == 0
  assert silent.uncounted == {"double": 4}


@pytest.mark.parametrize(
  ("call", "flops"),
  [
    # As XLA:GPU prints them for an H100, shortened.
    (
      "(bf16[64,256]{1,0}, s8[4194304]{0}) custom-call(%q, %k),"
      ' custom_call_target="__cublas$lt$matmul", backend_config={'
      '"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{'
      '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
      2 * 64 * 256 * 32,
    ),
    (
      "(bf16[2,64,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k),"
      ' custom_call_target="__cudnn$fmhaSoftmax", backend_config={'
      '"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":'
      '["2","4","64","64"]},"mask_type":"NO_MASK"}}',
      2 * 2 * 2 * 4 * 64 * 64 * 32,
    ),
    (
      "(bf16[2,64,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k),"
      ' custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={'
      '"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":'
      '["2","4","64","64"]},"mask_type":"PADDING_CAUSAL"}}',
      5 * 2 * 4 * 64 * 64 * 32,
    ),
    # As jax writes it and XLA keeps it where no card chooses the algorithm.
    (
      "(bf16[2,64,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k),"
      ' custom_call_target="__cudnn$fmhaScaleBiasSoftmax", backend_config={'
      '"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {'
      '"dimensions": ["2", "4", "64", "64"]}, "mask_type": "NO_MASK"}}',
      2 * 2 * 2 * 4 * 64 * 64 * 32,
    ),
  ],
)
def test_library_calls_of_a_gpu_count(call, flops):
  """From dimension numbers, and from the shape of the scores."""
  text = f"""HloModule jit_f, num_partitions=1

ENTRY %main (q: bf16[64,32], k: bf16[32,256]) -> bf16[64,256] {{
  %q = bf16[64,32]{{1,0}} parameter(0)
  %k = bf16[32,256]{{1,0}} parameter(1)
  %call = {call}
  ROOT %out = bf16[64,256]{{1,0}} get-tuple-element(%call), index=0
}}
"""
  program = hlo.analyse(text)
  assert program.flops == flops
  if "cublas" in call:
    # The scratch space is not what the product reads or writes.
    assert program.bytes_accessed == 2 * (64 * 32 + 32 * 256 + 64 * 256)
