"""Latents of pictures: order, normalisation, patches, errors, the packaged file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fusionlab.batch import LatentGrid
from fusionlab.data.sources.emoji_pictures import EmojiArtist
from fusionlab.data.sources.openmoji import HELDOUT_PICTURES, base_group
from fusionlab.data.sources.packaged import uniform
from fusionlab.errors import UserError
from fusionlab.tokenizers import ImageTokenizer, LatentTokenizer, storage
from fusionlab.tokenizers.autoencoder import LatentConfig, init_params
from fusionlab.tokenizers.latent_training import measure

TINY = LatentConfig(
  image_size=16,
  downsampling=4,
  channels=3,
  fine_channels=4,
  coarse_channels=4,
  encoder_coarse_blocks=1,
  decoder_coarse_blocks=1,
  decoder_fine_blocks=0,
)
MEAN, STD = np.array([1.0, -2, 0]), np.array([0.5, 3, 1])


def make(config=TINY, seed=0, notes=None, mean=MEAN, std=STD):
  """A tokenizer of random weights."""
  params = init_params(config, jax.random.key(seed))
  return LatentTokenizer.from_params(config, params, mean, std, notes)


def pictures(number, size=16, seed=0):
  """Noise, uint8 [number, size, size, 3]."""
  shape = (number, size, size, 3)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def drawn(stems, style):
  """OpenMoji pictures, uint8 [n, 64, 64, 3]."""
  artist, made = EmojiArtist("test"), []
  for stem in stems:
    picture, whole = artist.color(chr(int(stem, 16)))
    made.append(picture if style == "color" else artist.line(stem, whole))
  return np.stack(made)


@pytest.fixture(scope="module")
def tiny():
  """Four by four latents of three channels, in patches of 2 x 2."""
  return make()


@pytest.fixture(scope="module")
def packaged():
  """The file that the package carries."""
  return LatentTokenizer.load()


@pytest.mark.parametrize("number", [0, 1, 65])
def test_latents_and_pictures_have_the_promised_shapes(tiny, number):
  """Float32 [N, n, C] from pictures, and uint8 pictures from them."""
  assert tiny.grid == LatentGrid(side=4, patch=2, channels=3)
  patches = tiny.encode(pictures(number))
  assert patches.shape == (number, 4, 12) and patches.dtype == np.float32
  images = tiny.decode(patches)
  assert images.shape == (number, 16, 16, 3) and images.dtype == np.uint8


@pytest.mark.smoke
def test_a_picture_is_the_same_alone_and_among_others(packaged):
  """To the bit, both ways."""
  images = pictures(67, size=64)
  patches = packaged.encode(images)
  assert (packaged.encode(images[65:66]) == patches[65]).all()
  assert (packaged.decode(patches[65:66]) == packaged.decode(patches)[65]).all()


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_in_raster_order_of_row_column_channel(tiny, patch):
  """The posterior's mean, normalised, as issue 7's contract orders it."""
  images = pictures(2)
  mean, _ = tiny.posterior(images)
  expected = (mean - MEAN) / STD
  side = 4 // patch
  expected = expected.reshape(2, side, patch, side, patch, 3)
  expected = expected.transpose(0, 1, 3, 2, 4, 5).reshape(2, side**2, -1)
  found = tiny.with_patch(patch).encode(images)
  assert np.allclose(found, expected, atol=1e-5)
  # The second patch lies beside the first, not below it.
  if patch == 2:
    first = (mean[:, 0, 2] - MEAN) / STD
    assert np.allclose(found[:, 1, :3], first, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 4])
def test_another_patch_is_another_file_of_the_same_pictures(tiny, patch):
  """The hash tells them apart; pictures are the same; and it goes back."""
  other = tiny.with_patch(patch)
  assert other.hash != tiny.hash and other.notes == tiny.notes
  assert other.grid == LatentGrid(side=4, patch=patch, channels=3)
  images = pictures(3)
  again = other.decode(other.encode(images)).astype(int)
  assert abs(again - tiny.decode(tiny.encode(images))).max() <= 1
  assert other.with_patch(2).hash == tiny.hash
  assert tiny.with_patch(2) is tiny


@pytest.mark.parametrize("patch", [0, 3, 8, -2])
def test_a_patch_that_does_not_tile_the_latents_is_refused(tiny, patch):
  """With those that do."""
  with pytest.raises(UserError, match=r"4 x 4 latents; allowed: 1, 2, 4$"):
    tiny.with_patch(patch)


def test_decoding_undoes_the_normalisation():
  """Statistics move what a transformer sees, and no pixel."""
  plain = make(mean=np.zeros(3), std=np.ones(3))
  images = pictures(4)
  ours, theirs = make().encode(images), plain.encode(images)
  assert abs(ours - theirs).max() > 0.5
  change = make().decode(ours).astype(int) - plain.decode(theirs)
  assert abs(change).max() <= 1


def test_the_posterior_of_a_log_variance_without_end_is_clipped():
  """A variance that float32 cannot hold would make the loss infinite."""
  params = init_params(TINY, jax.random.key(0))
  bias = params["encoder"]["latents"]["bias"]
  params["encoder"]["latents"]["bias"] = bias.at[3:].set(1000.0)
  tokenizer = LatentTokenizer.from_params(TINY, params, MEAN, STD)
  _, log_variance = tokenizer.posterior(pictures(1))
  assert (log_variance == 20).all()


def test_saving_keeps_weights_patch_notes_and_hash(tmp_path):
  """`load` of what `save` wrote is the same tokenizer."""
  tokenizer = make(notes={"made": "here"}).with_patch(4)
  tokenizer.save(tmp_path / "latents.safetensors")
  loaded = LatentTokenizer.load(str(tmp_path / "latents.safetensors"))
  assert loaded.hash == tokenizer.hash
  assert loaded.hash != make(seed=1, notes={"made": "here"}).with_patch(4).hash
  assert loaded.config == dataclasses.replace(TINY, patch=4)
  assert loaded.notes == {"made": "here"}
  patches = tokenizer.encode(pictures(3))
  assert (loaded.encode(pictures(3)) == patches).all()
  assert (loaded.decode(patches) == tokenizer.decode(patches)).all()
  assert [p.name for p in tmp_path.iterdir()] == ["latents.safetensors"]


def test_the_packaged_file_is_small_and_says_its_terms(packaged):
  """Weights in 16 bit, statistics in 32; the licence of the pictures."""
  path = storage.packaged(storage.LATENT_FILE)
  tensors = safetensors.numpy.load_file(path)
  exact = {k for k, v in tensors.items() if v.dtype != np.float16}
  assert exact == {"mean", "std"}
  assert path.stat().st_size <= 1_500_000
  assert packaged.notes["licence"] == ImageTokenizer.load().notes["licence"]
  assert packaged.grid == LatentGrid(side=16, patch=2, channels=4)


HELDOUT = ["1F347", "1F3C6", "1F408", "1F440", "1F41F", "1F428"]
SEEN = ["1F34E", "1F600", "1F697", "1F333", "1F3E0", "1F418", "2B50", "1F451"]


@pytest.mark.smoke
@pytest.mark.parametrize(("style", "floor"), [("color", 27.0), ("line", 30.5)])
def test_the_packaged_file_reconstructs_heldout_pictures(
  packaged, style, floor
):
  """PSNR in dB of pictures it never saw."""
  for stem in HELDOUT:
    group = base_group(chr(int(stem, 16)))
    assert uniform("openmoji/base", group) < HELDOUT_PICTURES
  measured = measure(packaged, drawn(HELDOUT, style))
  assert measured["psnr"] > floor


def test_the_packaged_latents_have_mean_0_and_variance_1(packaged):
  """About, over sixteen of the three thousand pictures that define it."""
  images = np.concatenate([drawn(SEEN, style) for style in ("color", "line")])
  latents = packaged.encode(images).reshape(-1, 4)
  assert abs(latents.mean(0)).max() < 0.25
  assert abs(latents.std(0) - 1).max() < 0.25


@pytest.mark.parametrize(
  "images",
  [pictures(2, size=32), pictures(2).astype(np.float32)],
  ids=["size", "dtype"],
)
def test_wrong_pictures_are_refused(tiny, images):
  """By both ways in."""
  message = r"latent tokenizer: .* give uint8\[N, 16, 16, 3\]"
  for function in (tiny.encode, tiny.posterior):
    with pytest.raises(UserError, match=message):
      function(images)


@pytest.mark.parametrize(
  ("patches", "message"),
  [
    (np.zeros((2, 4, 11), np.float32), r"float32\[2, 4, 11\]; give float32\[N"),
    (np.zeros((2, 16, 3), np.float32), "patches are float32"),
    (np.zeros((2, 4, 12), np.int32), "patches are int32"),
    (np.full((2, 4, 12), np.nan, np.float32), "that are not numbers"),
    (np.full((2, 4, 12), np.inf, jnp.bfloat16), "that are not numbers"),
  ],
)
def test_wrong_patches_are_refused(tiny, patches, message):
  """Another shape or dtype, or values of a sampler that went wrong."""
  with pytest.raises(UserError, match=message):
    tiny.decode(patches)


def altered(content, *, entry=None, drop=None, add=None):
  """Another file with the same tensors but for what is named."""
  length = int.from_bytes(content[:8], "little")
  metadata = json.loads(content[8 : 8 + length])["__metadata__"]
  tensors = safetensors.numpy.load(content)
  tensors = {k: v for k, v in tensors.items() if k != drop} | (add or {})
  if entry is not None:
    changed = json.loads(metadata["fusionlab"]) | entry
    metadata["fusionlab"] = json.dumps(changed)
  return safetensors.numpy.save(tensors, metadata)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c[:-10], "is not a whole safetensors file"),
    (lambda c: c[:100], "is not a whole safetensors file"),
    (
      lambda c: safetensors.numpy.save({"a": np.zeros(3)}),
      "without the metadata",
    ),
    (
      lambda c: storage.packaged(storage.IMAGE_FILE).read_bytes(),
      "has format 'fusionlab.image_tokenizer.1'.* train-latents",
    ),
    (
      lambda c: altered(c, entry={"config": {"chanels": 4}}),
      "did you mean 'channels'",
    ),
    (
      lambda c: altered(c, entry={"config": {"channels": 7}}),
      "the file was altered",
    ),
    (
      lambda c: altered(c, entry={"config": {"patch": 3}}),
      "patch=3 does not divide the 16 latents",
    ),
    (lambda c: altered(c, drop="std"), "'std' of shape None"),
    (
      lambda c: altered(c, add={"std": np.array([1, 0, 1], np.float32)}),
      "a channel does not vary",
    ),
    (
      lambda c: altered(c, add={"mean": np.full(3, np.nan, np.float32)}),
      "that are not numbers",
    ),
  ],
)
def test_a_bad_file_is_refused_in_one_line(change, message, tmp_path):
  """Truncated, of another kind, or altered."""
  make().save(tmp_path / "good.safetensors")
  path = tmp_path / "bad.safetensors"
  path.write_bytes(change((tmp_path / "good.safetensors").read_bytes()))
  with pytest.raises(UserError, match=message) as caught:
    LatentTokenizer.load(str(path))
  assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
  """By the name it should have."""
  with pytest.raises(UserError, match="latent tokenizer: there is no file"):
    LatentTokenizer.load(str(tmp_path / "none.safetensors"))
