"""Official layers in and out, alone and as a whole model."""

import dataclasses

import jax
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.interop import mixture_of_transformers as published
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from tests.models import tiny


def model_of(**changes):
  return tiny.make(2, **changes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", ["none", "rms"])
def test_out_and_in_changes_no_bit(qk_norm, tied):
  model, params = model_of(qk_norm=qk_norm, tie_embeddings=tied, num_kv_heads=2)
  out = published.to_state_dict(params, model.config)
  back = published.from_state_dict(out, model.config, model.vocab_size)
  jax.tree.map(np.testing.assert_array_equal, params, back)


def test_the_names_are_the_published_ones():
  model, params = model_of()
  out = published.to_state_dict(params, model.config)
  shapes = {name: array.shape for name, array in out.items()}
  layer = "layers.1.attention.local_experts_"
  assert shapes[f"{layer}wq.1.weight"] == (32, 32)
  assert shapes[f"{layer}attention_norm.0.weight"] == (32,)
  assert shapes[f"{layer}q_normalization.1.weight"] == (8,)
  layer = "layers.0.feed_forward.local_experts"
  assert shapes[f"{layer}.1.w1.weight"] == (48, 32)
  assert shapes[f"{layer}.0.w2.weight"] == (32, 48)
  assert shapes[f"{layer}_ffn_norm.1.weight"] == (32,)
  assert shapes["tok_embeddings.weight"] == shapes["output.weight"] == (80, 32)
  assert shapes["norm.1.weight"] == (32,)
  number = 2 * 2 * (4 + 2 + 1 + 3 + 1) + 2 + 2
  assert len(shapes) == number


def test_a_dense_model_is_one_of_one_modality():
  model, params = model_of(untie="", qk_norm="none")
  out = published.to_state_dict(params, model.config)
  assert "layers.0.attention.local_experts_wq.0.weight" in out
  assert not any(".1.weight" in name for name in out)
  back = published.from_state_dict(out, model.config, model.vocab_size)
  jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"norm_placement": "pre"}, "norm_placement='pre'; they have 'swin'"),
    ({"qk_norm": "layer"}, "qk_norm='layer'; they have 'rms' or 'none'"),
    ({"untie": "ffn"}, "untie='ffn'; with several towers they untie"),
  ],
)
def test_models_that_the_layers_cannot_be_are_one_line(changes, said):
  config = dataclasses.replace(MixtureOfTransformersConfig(), **changes)
  with pytest.raises(UserError) as error:
    published.from_state_dict({}, config, 10)
  assert said in str(error.value)


def test_a_modality_without_a_tower_is_named():
  model, params = model_of()
  out = published.to_state_dict(params, model.config)
  name = "layers.1.attention.local_experts_wq.2.weight"
  out[name] = out[name.replace("2", "1")]
  with pytest.raises(UserError, match=f"unknown tensor {name!r}, did you mean"):
    published.from_state_dict(out, model.config, model.vocab_size)
