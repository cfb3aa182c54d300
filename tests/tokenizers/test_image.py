"""Picture codes: shapes, exactness, errors, and the packaged file's quality."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fusionlab.data.sources.emoji_pictures import EmojiArtist
from fusionlab.data.sources.openmoji import (
  HELDOUT_PICTURES,
  base_group,
)
from fusionlab.data.sources.packaged import uniform
from fusionlab.errors import UserError
from fusionlab.tokenizers import ImageTokenizer, storage
from fusionlab.tokenizers.autoencoder import (
  ImageConfig,
  depth_to_space,
  init_params,
  nearest_code,
  space_to_depth,
)
from fusionlab.tokenizers.image_training import measure

TINY = ImageConfig(
  image_size=16,
  patch=4,
  codebook_size=6,
  code_dim=3,
  fine_channels=8,
  coarse_channels=8,
  encoder_coarse_blocks=1,
  decoder_coarse_blocks=1,
  decoder_fine_blocks=0,
)


def make(config=TINY, seed=0, notes=None):
  codebook = np.random.default_rng(seed).normal(
    size=(config.codebook_size, config.code_dim)
  )
  params = init_params(config, jax.random.key(seed))
  return ImageTokenizer.from_params(config, params, codebook, notes)


def pictures(number, size=16, seed=0):
  shape = (number, size, size, 3)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def tiny():
  return make()


@pytest.fixture(scope="module")
def packaged():
  return ImageTokenizer.load()


@pytest.mark.parametrize("number", [0, 1, 64, 65])
def test_codes_and_pictures_have_the_promised_shapes(tiny, number):
  codes = tiny.encode(pictures(number))
  assert codes.shape == (number, 4) and codes.dtype == np.int32
  assert ((codes >= 0) & (codes < 6)).all()
  images = tiny.decode(codes)
  assert images.shape == (number, 16, 16, 3) and images.dtype == np.uint8


@pytest.mark.smoke
def test_a_picture_is_the_same_alone_and_among_others(packaged):
  images = pictures(67, size=64)
  codes = packaged.encode(images)
  assert (packaged.encode(images[65:66]) == codes[65]).all()
  assert (packaged.decode(codes[65:66]) == packaged.decode(codes)[65]).all()


@pytest.mark.parametrize(
  ("sizes", "codes"),
  [
    ({"image_size": 32, "patch": 2}, 64),
    ({"image_size": 32, "patch": 1, "codebook_size": 16}, 256),
  ],
)
def test_other_sizes_are_settings(sizes, codes):
  config = dataclasses.replace(TINY, **sizes)
  tokenizer = make(config)
  ids = tokenizer.encode(pictures(2, config.image_size))
  assert ids.shape == (2, codes) == (2, tokenizer.codes_per_image)
  assert tokenizer.decode(ids).shape == (2, *2 * (config.image_size,), 3)


def test_depth_to_space_undoes_space_to_depth():
  x = jnp.arange(2.0 * 8 * 8 * 3).reshape(2, 8, 8, 3)
  folded = space_to_depth(x, 4)
  assert folded.shape == (2, 2, 2, 48)
  # One position holds one square of pixels.
  assert (np.asarray(folded)[0, 1, 0].reshape(4, 4, 3) == x[0, 4:, :4]).all()
  assert (np.asarray(depth_to_space(folded, 4)) == x).all()


def test_the_nearest_code_is_the_nearest():
  rng = np.random.default_rng(0)
  latents, codebook = rng.normal(size=(50, 4)), rng.normal(size=(9, 4))
  distance = ((latents[:, None] - codebook) ** 2).sum(-1)
  found = nearest_code(jnp.asarray(latents), jnp.asarray(codebook))
  assert (np.asarray(found) == distance.argmin(-1)).all()


def test_saving_keeps_weights_notes_and_hash(tmp_path):
  tokenizer = make(notes={"made": "here"})
  tokenizer.save(tmp_path / "image.safetensors")
  loaded = ImageTokenizer.load(str(tmp_path / "image.safetensors"))
  assert loaded.hash == tokenizer.hash == make(notes={"made": "here"}).hash
  assert loaded.hash != make(seed=1).hash
  assert loaded.config == TINY and loaded.notes == {"made": "here"}
  codes = tokenizer.encode(pictures(3))
  assert (loaded.encode(pictures(3)) == codes).all()
  assert (loaded.decode(codes) == tokenizer.decode(codes)).all()
  assert [p.name for p in tmp_path.iterdir()] == ["image.safetensors"]


def test_weights_are_stored_in_16_bit(packaged):
  path = storage.packaged(storage.IMAGE_FILE)
  tensors = safetensors.numpy.load_file(path)
  assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
  text = storage.packaged(storage.TEXT_FILE)
  assert path.stat().st_size + text.stat().st_size <= 2_000_000
  assert "CC BY-SA 4.0" in packaged.notes["licence"]


HELDOUT = ["1F347", "1F3C6", "1F408", "1F440", "1F41F", "1F428"]


@pytest.mark.smoke
@pytest.mark.parametrize(("style", "floor"), [("color", 18.0), ("line", 17.7)])
def test_the_packaged_file_reconstructs_heldout_pictures(
  packaged, style, floor
):
  drawn = []
  artist = EmojiArtist("test")
  for stem in HELDOUT:
    text = "".join(chr(int(c, 16)) for c in stem.split("-"))
    assert uniform("openmoji/base", base_group(text)) < HELDOUT_PICTURES
    picture, whole = artist.color(text)
    drawn.append(picture if style == "color" else artist.line(stem, whole))
  assert measure(packaged, np.stack(drawn))["psnr"] > floor


def test_measures_are_of_pixels_in_0_to_1(tiny):
  images = pictures(5)
  codes = tiny.encode(images)
  error = (tiny.decode(codes) / 255.0) - images / 255.0
  measured = measure(tiny, images)
  assert measured["pictures"] == 5
  assert measured["mse"] == pytest.approx((error**2).mean(), rel=1e-4)
  assert measured["l1"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
  assert measured["psnr"] == pytest.approx(
    -10 * np.log10((error**2).mean()), rel=1e-4
  )
  share = np.bincount(codes.ravel()) / codes.size
  share = share[share > 0]
  entropy = -(share * np.log(share)).sum()
  assert measured["codes_used"] == len(share)
  assert measured["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)


@pytest.mark.parametrize(
  "images",
  [pictures(2, size=32), pictures(2).astype(np.float32)],
  ids=["size", "dtype"],
)
def test_wrong_pictures_are_refused(tiny, images):
  with pytest.raises(UserError, match=r"give\s+uint8\[N, 16, 16, 3\]"):
    tiny.encode(images)


@pytest.mark.parametrize(
  ("codes", "message"),
  [
    (np.zeros((2, 5), np.int32), "codes are int32"),
    (np.zeros((2, 4), np.float32), "codes are float32"),
    (np.full((2, 4), 6), "6 is not a code"),
    (np.full((2, 4), -1), "-1 is not a code"),
  ],
)
def test_wrong_codes_are_refused(tiny, codes, message):
  with pytest.raises(UserError, match=message):
    tiny.decode(codes)


def content_of(tokenizer, path):
  tokenizer.save(path)
  return path.read_bytes()


def altered(content, *, entry=None, drop=None, nan=False):
  """Another file with the same tensors but for what is named."""
  length = int.from_bytes(content[:8], "little")
  metadata = json.loads(content[8 : 8 + length])["__metadata__"]
  tensors = safetensors.numpy.load(content)
  tensors = {k: v.copy() for k, v in tensors.items() if k != drop}
  if nan:
    tensors["codebook"][0] = np.nan
  if entry is not None:
    changed = json.loads(metadata["fusionlab"]) | entry
    metadata["fusionlab"] = json.dumps(changed)
  return safetensors.numpy.save(tensors, metadata)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: b"", "is not a whole safetensors file"),
    (lambda c: b"not a file of this kind", "is not a whole safetensors file"),
    (lambda c: c[:-10], "is not a whole safetensors file"),
    (lambda c: c[:100], "is not a whole safetensors file"),
    (
      lambda c: safetensors.numpy.save({"a": np.zeros(3)}),
      "without the metadata",
    ),
    (
      lambda c: safetensors.numpy.save(
        {"a": np.zeros(3)}, {"fusionlab": "no JSON"}
      ),
      "without the metadata",
    ),
    (lambda c: altered(c, entry={"format": "other.2"}), "has format 'other.2'"),
    (
      lambda c: altered(c, entry={"config": {"pach": 4}}),
      "did you mean 'patch'",
    ),
    (
      lambda c: altered(c, entry={"config": {"codebook_size": 7}}),
      "the file was altered",
    ),
    (lambda c: altered(c, drop="codebook"), "'codebook' of shape None"),
    (lambda c: altered(c, nan=True), "that are not numbers"),
  ],
)
def test_a_bad_file_is_refused_in_one_line(change, message, tmp_path):
  content = content_of(make(), tmp_path / "good.safetensors")
  path = tmp_path / "bad.safetensors"
  path.write_bytes(change(content))
  with pytest.raises(UserError, match=message) as caught:
    ImageTokenizer.load(str(path))
  assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(UserError, match="there is no file"):
    ImageTokenizer.load(str(tmp_path / "none.safetensors"))
