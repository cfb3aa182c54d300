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


def test_a_batch_without_layout_is_refused():
  """Several towers need a layout; the message says how to make it."""
  model, params = make()
  batch = batch_for(model).replace(layout=None)
  with pytest.raises(UserError, match="make_layout"):
    model.apply({"params": params}, batch)
