"""A config.json becomes our config or one line, and comes back."""

import dataclasses

import pytest

from fusionlab.errors import UserError
from fusionlab.interop.llama import Specials
from fusionlab.interop.llama_config import read_config, write_config
from fusionlab.models.config import RopeScaling, TransformerConfig
from tests.interop.folders import CONFIG


def read(**changes):
  given = {k: v for k, v in (CONFIG | changes).items() if v != "absent"}
  return read_config(given, "config.json")


def test_keys_that_are_absent_have_the_formats_defaults():
  given = {k: v for k, v in CONFIG.items() if k not in ("rope_theta",)}
  keys = ("num_key_value_heads", "head_dim", "rms_norm_eps", "bos_token_id")
  keys += ("eos_token_id", "max_position_embeddings", "tie_word_embeddings")
  given = {k: v for k, v in given.items() if k not in keys}
  config, vocab_size, longest, specials = read_config(given, "config.json")
  assert (config.kv_heads, config.width_of_head, config.norm_eps) == (
    2,
    6,
    1e-6,
  )
  assert (config.rope_base, config.tie_embeddings) == (10000.0, False)
  assert (vocab_size, longest) == (270, 2048)
  assert specials == Specials(1, 2, None)
  assert config.modalities == ("text",)
  assert (config.norm_placement, config.qk_norm) == ("pre", "none")


def test_special_ids_may_be_several_or_none():
  *_, specials = read(eos_token_id=[7, 8], bos_token_id=None, pad_token_id=-1)
  assert specials == Specials(None, 7, None)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"model_type": "mistral"}, "model_type='mistral' is not supported; only"),
    (
      {"model_type": "absent"},
      "model_type=None is not supported; only 'llama'",
    ),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True is not supported; only"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported; only False"),
    ({"sliding_window": 4096}, "sliding_window=4096 is not supported; only"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"layer_types": ["sliding_attention"]}, "'sliding_attention'"),
    ({"hidden_size": "absent"}, "the key hidden_size is missing"),
    ({"vocab_size": "32"}, "vocab_size='32' must be a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number"),
    ({"num_key_value_heads": 3}, "not a multiple of"),
    ({"head_dim": 5}, "rotary positions need an even one"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be an id"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    (
      {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
      "rope_scaling.rope_type='dynamic' is not supported; only 'default',",
    ),
    (
      {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}},
      "rope_parameters.rope_type='longrope' is not supported",
    ),
    (
      {"rope_parameters": {"rope_type": "linear"}},
      "the key rope_parameters.factor is missing",
    ),
    (
      {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
      "the key rope_scaling.low_freq_factor is missing",
    ),
    (
      {
        "rope_parameters": {
          "rope_type": "default",
          "partial_rotary_factor": 0.5,
        }
      },
      "partial_rotary_factor=0.5 is not supported",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
  ],
)
def test_other_models_are_refused_in_one_line(changes, said):
  with pytest.raises(UserError) as error:
    read(**changes)
  assert said in str(error.value)
  assert str(error.value).startswith("config.json")
  assert "\n" not in str(error.value)


SCALINGS = [
  RopeScaling(),
  RopeScaling(kind="linear", factor=2.5),
  RopeScaling(
    kind="llama3",
    factor=8.0,
    original_max_position=32,
    low_freq_factor=0.5,
    high_freq_factor=2.0,
  ),
  RopeScaling(
    kind="yarn",
    factor=4.0,
    original_max_position=16,
    beta_fast=20.0,
    beta_slow=2.0,
    attention_factor=1.25,
    truncate=False,
  ),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind)
@pytest.mark.parametrize("keys", ["old", "new"])
def test_what_is_written_is_read(scaling, keys):
  config, *_ = read()
  config = dataclasses.replace(
    config, rope_scaling=scaling, rope_base=5e5, tie_embeddings=True
  )
  specials = Specials(3, 4, 5)
  written = write_config(
    config, vocab_size=9, max_position=77, specials=specials, dtype="float32"
  )
  # Programs before and after `rope_parameters` read one of them.
  if keys == "old":
    del written["rope_parameters"]
  else:
    del written["rope_scaling"], written["rope_theta"]
  assert read_config(written, "") == (config, 9, 77, specials)


def test_the_magnitude_of_yarn_by_two_scales():
  scaling = {"rope_type": "yarn", "factor": 6.0, "mscale": 0.7}
  scaling |= {"mscale_all_dim": 0.3, "original_max_position_embeddings": 16}
  config, *_ = read(rope_parameters=scaling)
  log = 0.1 * 1.791759469228055  # ln 6
  expected = (0.7 * log + 1) / (0.3 * log + 1)
  assert config.rope_scaling.magnitude == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"norm_placement": "swin", "qk_norm": "none"}, "norm_placement='swin'"),
    ({"norm_placement": "pre", "qk_norm": "rms"}, "qk_norm='rms'"),
  ],
)
def test_what_a_llama_cannot_hold_is_refused(changes, said):
  with pytest.raises(UserError, match=said):
    write_config(
      TransformerConfig(**changes),
      vocab_size=9,
      max_position=8,
      specials=Specials(0, 0, 0),
      dtype="float32",
    )
