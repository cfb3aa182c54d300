"""`generate` where pictures are latents: as prompts, drawn, and on the way."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import generation_flags
from fusionlab.errors import UserError
from fusionlab.generation import command, prompts
from fusionlab.generation.config import Request
from fusionlab.generation.generate import generate
from fusionlab.generation.prompts import Encoded
from fusionlab.models import build_model
from fusionlab.models.transfusion import TransfusionConfig
from fusionlab.tokenizers import (
  LatentTokenizer,
  TextTokenizer,
  make_tokenizers,
)
from fusionlab.tokenizers.autoencoder import LatentConfig, init_params

# Four by four latents of three channels, in patches of 2 x 2.
SIZES = LatentConfig(
  image_size=16,
  downsampling=4,
  channels=3,
  fine_channels=4,
  coarse_channels=4,
  encoder_coarse_blocks=1,
  decoder_coarse_blocks=1,
  decoder_fine_blocks=0,
)
SETTINGS = {"diffusion_steps": 4, "snapshots": 2}


@pytest.fixture(scope="module")
def trio():
  """A model with drawn parameters, the packaged text and random pictures."""
  weights = init_params(SIZES, jax.random.key(1))
  image = LatentTokenizer.from_params(SIZES, weights, np.zeros(3), np.ones(3))
  tokenizers = make_tokenizers(TextTokenizer.load(), image)
  config = TransfusionConfig(
    dim=32, num_layers=1, num_heads=2, ffn_dim=32, compute_dtype="float32"
  )
  model = build_model(config, tokenizers.vocabulary, 64)
  return model, model.init_params(jax.random.key(0)), tokenizers


@pytest.fixture(scope="module")
def picture():
  return np.random.default_rng(0).integers(0, 255, (20, 16, 3), np.uint8)


def test_a_picture_in_a_prompt_is_its_latents(trio, picture):
  """Its one id at each patch, and back."""
  tokenizers = trio[2]
  v = tokenizers.vocabulary
  found = prompts.encode(["a", picture, "b", picture], tokenizers)
  block = [v.begin[1], *[v.offset(1)] * 4, v.end[1]]
  a, b = (tokenizers.text.encode(word) for word in "ab")
  assert found.ids == [v.bos, *a, *block, *b, *block]
  one = tokenizers.image.encode(picture[None, 2:18])[0]
  np.testing.assert_array_equal(found.latents, np.concatenate([one, one]))
  assert prompts.encode("a", tokenizers).latents is None
  other = np.concatenate([np.zeros_like(one), one])
  after = len(a) + 1 + len(block)
  shown = prompts.decode(
    [found.ids, found.ids], tokenizers, starts=[1, after], latents=[other] * 2
  )
  expected = tokenizers.image.decode(other.reshape(2, 4, 12))
  assert [type(part) for part in shown[0]] == [str, np.ndarray] * 2
  np.testing.assert_array_equal(shown[0][1], expected[0])
  np.testing.assert_array_equal(shown[0][3], expected[1])
  assert len(shown[1]) == 2 and shown[1][0] == "b"
  np.testing.assert_array_equal(shown[1][1], expected[1])


def test_pictures_are_drawn_and_come_back_as_prompts(trio, picture):
  """Also behind a picture of the prompt; with what they were on the way."""
  model, params, tokenizers = trio
  results = generate(
    *trio, ["a", [picture, "b"]], make="image", num_samples=2, **SETTINGS
  )
  assert [len(r.latents) for r in results] == [4, 4, 8, 8]
  for r in results:
    assert r.finish == "stop" and r.text == ""
    expected = tokenizers.image.decode(r.latents[None, -4:])[0]
    np.testing.assert_array_equal(r.pictures, [expected])
    (steps,) = r.snapshots
    assert steps.shape == (2, 16, 16, 3) and steps.dtype == np.uint8
  given = prompts.encode([picture], tokenizers).latents
  np.testing.assert_array_equal(results[2].latents[:4], given)
  assert not np.allclose(results[0].latents, results[1].latents)
  documents = [Encoded(list(r.ids), r.latents) for r in results]
  described = generate(
    model, params, tokenizers, documents, make="text", max_new_tokens=3
  )
  for before, after in zip(results, described, strict=True):
    assert after.ids[: len(before.ids)] == before.ids
    assert after.text and not after.pictures
    np.testing.assert_array_equal(after.latents, before.latents)


def test_latents_that_are_missing_are_said(trio, picture):
  ids = prompts.encode([picture], trio[2]).ids
  with pytest.raises(UserError, match=r"its ids need \(4, 12\)") as error:
    generate(*trio, [ids])
  assert "\n" not in str(error.value)


def test_the_command_writes_pictures_at_several_steps(
  trio, monkeypatch, tmp_path
):
  """One file a step, and all of them with the picture in a strip."""
  monkeypatch.setattr(command, "load_model", lambda path: trio)
  monkeypatch.setattr(command, "find", lambda path: path / "checkpoints" / "7")
  values = flags.FlagValues()
  generation_flags.define(values)
  words = ["", "--prompt=a", "--modality=image", "--snapshots=2"]
  values([*words, "--diffusion_steps=4", "--sampler=ddim", "--eta=0.5"])
  request = generation_flags.read(values)
  request = Request(**vars(request) | {"out": str(tmp_path / "out")})
  folder = command.run(str(tmp_path), request)
  said = json.loads((folder / "generated.json").read_text())
  assert said["settings"]["sampler"] == "ddim"
  (part,) = said["results"][0]["parts"]
  assert part == {
    "picture": "000_0.png",
    "steps": ["000_0_step001.png", "000_0_step002.png"],
    "strip": "000_0_steps.png",
  }
  pixels = {
    name: np.asarray(Image.open(folder / name))
    for name in (*part["steps"], part["picture"], part["strip"])
  }
  strip = pixels.pop(part["strip"])
  np.testing.assert_array_equal(
    strip, np.concatenate(list(pixels.values()), axis=1)
  )
  plain = Request(("a",), out=str(tmp_path / "plain"))
  plain = Request(**vars(plain) | {"settings": {"make": "image"}})
  folder = command.run(str(tmp_path), plain)
  assert [p.name for p in folder.glob("*.png")] == ["000_0.png"]
