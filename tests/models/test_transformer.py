"""What holds for the decoder whatever its towers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from tests.models.tiny import apply, batch_for, close, loss_and_grad, make


@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
def test_remat_and_unrolling_change_neither_tree_nor_values(remat):
  """Paths, shapes and results depend on the architecture alone."""
  model, params = make()
  other, others = make(remat=remat, scan_unroll=2)
  assert jax.tree.structure(params) == jax.tree.structure(others)
  batch = batch_for(model)
  close(
    loss_and_grad(model, params, batch),
    loss_and_grad(other, params, batch),
    rtol=1e-4,
  )


def test_remat_of_all_but_matmuls_keeps_attention():
  """Fewer temporaries, and no second pass of attention's forward scores."""
  costs = {}
  for remat in ("none", "dots", "full"):
    model, params = make(remat=remat, attention="xla_blockwise")
    batch = batch_for(model, length=512)
    program = (
      jax.jit(lambda p, b, model=model: loss_and_grad(model, p, b))
      .lower(params, batch)
      .compile()
    )
    costs[remat] = (
      program.memory_analysis().temp_size_in_bytes,
      program.as_text().count(" exponential("),
    )
  assert costs["dots"][0] < costs["none"][0]
  # A second forward pass takes one more exponential of each of the 4 segments.
  assert costs["dots"][1] + 4 == costs["full"][1]


def test_dropout_acts_in_training_only():
  """Dropout changes the training pass, follows its key, spares evaluation."""
  model, params = make(dropout=0.3)
  batch = batch_for(model)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train, key):
    rngs = {"dropout": jax.random.key(key)}
    return model.apply({"params": params}, batch, train=train, rngs=rngs)

  np.testing.assert_array_equal(run(False, 0), run(False, 1))
  np.testing.assert_array_equal(run(True, 0), run(True, 0))
  assert np.abs(run(True, 0) - run(True, 1)).max() > 1e-3


def test_tied_embeddings_share_the_table():
  """tie_embeddings leaves no output table."""
  model, params = make(tie_embeddings=True)
  assert "unembed" not in params
  hidden = apply(model, params, batch_for(model))
  assert model.logits(params, hidden).shape == (2, 24, 80)


def test_bfloat16_compute_keeps_parameters_and_loss_in_float32():
  """Only matmul inputs are bfloat16."""
  model, params = make(compute_dtype="bfloat16")
  loss, grads = loss_and_grad(model, params, batch_for(model))
  hidden = apply(model, params, batch_for(model))
  assert hidden.dtype == jnp.bfloat16
  assert loss.dtype == jnp.float32
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
  reference, _ = make()
  expected, _ = loss_and_grad(reference, params, batch_for(model))
  np.testing.assert_allclose(loss, expected, rtol=2e-2)


def test_bfloat16_sums_a_frequent_ids_gradient_in_float32():
  """Half of all positions hold one id; its embedding still learns."""
  models = [
    make(compute_dtype=t, num_layers=1) for t in ("bfloat16", "float32")
  ]
  batch = batch_for(models[0][0], rows=8, length=256)
  often = np.arange(batch.tokens.size).reshape(batch.tokens.shape) % 2 == 0
  batch = batch.replace(tokens=np.where(often, 7, batch.tokens))
  got, expected = (
    np.asarray(loss_and_grad(m, p, batch)[1]["embed"][7]) for m, p in models
  )
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 0.05


@pytest.mark.parametrize("qk_norm", ["none", "layer"])
def test_qk_norm_choices(qk_norm):
  """`none` has no weights; `layer` does what its definition says."""
  model, params = make(qk_norm=qk_norm, untie="")
  names = set(params["layers"]["attention"]["shared"])
  scales = {"q_norm_scale", "k_norm_scale", "q_norm_bias", "k_norm_bias"}
  assert names & scales == (scales if qk_norm == "layer" else set())
  batch = batch_for(model)
  if qk_norm == "layer":
    # Layer norm ignores what is added to a whole head and its scale.
    head = params["layers"]["attention"]["shared"]
    scaled = {**head, "q": head["q"] * 3.0, "k": head["k"] * 0.5}
    other = {**params["layers"], "attention": {"shared": scaled}}
    close(
      apply(model, params | {"layers": other}, batch),
      apply(model, params, batch),
      rtol=1e-2,
      atol=1e-2,
    )
  _, grads = loss_and_grad(model, params, batch)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_spans_that_see_themselves_whole_need_causal_off():
  """With causal=False every implementation looks ahead inside an interval."""
  rows, length = 2, 300  # several query blocks
  outputs = []
  for implementation in ("reference", "xla_blockwise"):
    model, params = make(causal=False, attention=implementation, num_layers=1)
    batch = batch_for(model, rows=rows, length=length)
    batch = batch.replace(k_end=np.full((rows, length), length, np.int32))
    outputs.append(apply(model, params, batch))
  close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_a_batch_without_layout_is_refused():
  """Several towers need a layout; the message says how to make it."""
  model, params = make()
  batch = batch_for(model).replace(layout=None)
  with pytest.raises(UserError, match="make_layout"):
    model.apply({"params": params}, batch)


def test_an_implementation_for_other_hardware_is_refused():
  """By name it never falls back: one line with the key and the reason."""
  model, params = make(attention="splash")
  batch = batch_for(model)
  with pytest.raises(UserError, match=r"attention: .*'splash'.*tpu, not cpu"):
    apply(model, params, batch)
