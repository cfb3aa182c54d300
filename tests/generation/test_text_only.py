"""A model of text only, on a tokenizer of another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.errors import UserError
from fusionlab.generation import prompts
from fusionlab.generation.generate import generate
from fusionlab.models import build_model
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.tokenizers import TextTokenizer, make_tokenizers
from tests.tokenizers import foreign


def make(content, **ids):
  tokenizers = make_tokenizers(
    TextTokenizer.from_hugging_face(content, size=300, **ids)
  )
  config = MixtureOfTransformersConfig(
    modalities=("text",),
    towers=(0,),
    dim=16,
    num_layers=1,
    num_heads=2,
    ffn_dim=16,
    compute_dtype="float32",
  )
  model = build_model(config, tokenizers.vocabulary, 64)
  return model, model.init_params(jax.random.key(0)), tokenizers


@pytest.fixture(scope="module")
def trio():
  """As Llama 2: <unk>, <s>, </s>, bytes, pieces."""
  return make(foreign.sentencepiece(), bos=1, eos=2)


def writes(*ids):
  """A processor that lets these ids follow the prompt."""

  def processor(logits, state):
    at = state.length - state.prompt
    return logits.at[0, jnp.asarray(ids)[at[0]]].set(1e6)

  return processor


def test_a_continuation_keeps_the_space_it_begins_with(trio):
  """Where a stop string looks for it, too."""
  text = trio[2].text
  whole = text.encode("the apple")
  before = next(n for n in range(1, 9) if text.decode(whole[n:])[0] == "a")
  options = {"processors": [writes(*whole[before:], 2)], "temperature": 0.0}
  prompt = [1, *whole[:before]]
  (result,) = generate(*trio, [prompt], **options)
  assert result.finish == "eos" and result.ids == (1, *whole)
  assert text.decode(whole[:before]) + result.text == "the apple"
  begins = result.text[:2]
  (result,) = generate(*trio, [prompt], stop=[begins], **options)
  assert result.finish == "stop" and result.text == ""


@pytest.mark.parametrize("make_what", ["auto", "text"])
def test_what_is_asked_of_text_works(trio, make_what):
  for result in generate(
    *trio,
    ["the", ""],
    make=make_what,
    max_new_tokens=5,
    repetition_penalty=1.3,
    stop=["never"],
    temperature=1.0,
  ):
    assert all(isinstance(part, str) for part in result.parts)
    assert 1 <= len(result.ids) <= 12


def test_one_id_may_separate_documents():
  trio = make(foreign.byte_level(), bos=None, eos=0)
  (result,) = generate(
    *trio,
    "the",
    temperature=0.0,
    processors=[lambda logits, state: logits.at[:, 0].set(1e6)],
  )
  assert result.finish == "eos" and result.parts == ()


@pytest.mark.parametrize(
  ("prompt", "options", "said"),
  [
    ("the", {"make": "image"}, "make='image' needs an image tokenizer"),
    (np.zeros((8, 8, 3), np.uint8), {}, "a prompt's picture needs an image"),
    ([[1, 300]], {}, "id 300 at position 1 is not in 0..299"),
  ],
)
def test_pictures_are_refused_in_one_line(trio, prompt, options, said):
  with pytest.raises(UserError, match=said) as caught:
    generate(*trio, prompt, **options)
  assert "\n" not in str(caught.value)


def test_parts_of_a_document_are_shown_from_anywhere(trio):
  tokenizers = trio[2]
  ids = prompts.encode("the apple", tokenizers).ids
  for start in range(1, len(ids)):
    before = tokenizers.text.decode(ids[:start])
    (shown,) = prompts.decode([ids], tokenizers, starts=[start])
    assert before + "".join(map(str, shown)) == "the apple"
