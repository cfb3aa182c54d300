"""LMFusion: text stays the text model's to the bit while pictures are learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import lmfusion
from fusionlab.batch import batch_of_ids
from fusionlab.errors import UserError
from fusionlab.experiment import Experiment
from fusionlab.interop.exporting import export_model
from fusionlab.interop.importing import import_model
from fusionlab.models import build_model
from fusionlab.objectives import build_objective
from fusionlab.routing import Router
from fusionlab.tokenizers import LatentTokenizer, load_tokenizers
from fusionlab.tokenizers.autoencoder import LatentConfig, init_params
from fusionlab.train.checkpoint import load_model, save_model
from fusionlab.train.initial import grown_params
from fusionlab.train.optimizer import named_leaves
from fusionlab.train.state import stream
from fusionlab.train.step import make_train_step
from tests.interop import folders
from tests.train import test_partition

DEEP = "q k v o qk_norm mixer_norm ffn ffn_norm final_norm"
UNTIED = {"deep": DEEP, "shallow": "ffn ffn_norm", "none": ""}
SEPARATIONS = pytest.mark.parametrize("separate", UNTIED)
IDS = 270  # of the text model; <boi> and <eoi> follow, then the picture's
LENGTH = 20


class Parts(test_partition.Parts):
  """A fused model with its own objective and an optimizer."""

  def step(self, **options):
    return make_train_step(
      self.model,
      objective_of(self.model),
      self.optimizer,
      partition=self.partition,
      dropout_seed=0,
      **options,
    )


def objective_of(model):
  settings = {
    "model": {"kind": "lmfusion"},
    "objective": {"kind": "next_token_diffusion"},
    "data": {"sources": {"a": {"kind": "jsonl"}}},
  }
  config = Experiment.from_mapping(settings).objective
  lengths = np.ones(model.vocabulary.size, np.int32)
  return build_objective(config, model.vocabulary, lengths)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with an imported text model and a tokenizer of latents."""
  folder = tmp_path_factory.mktemp("lmfusion")
  given = folders.write(folder / "given", tie_word_embeddings=True)
  import_model(given, folder / "base")
  latents = LatentConfig(
    image_size=8, downsampling=4, channels=2, patch=1, fine_channels=4,
    coarse_channels=4, encoder_coarse_blocks=1, decoder_coarse_blocks=1,
    decoder_fine_blocks=0,
  )  # fmt: skip
  weights = jax.jit(lambda key: init_params(latents, key))(jax.random.key(0))
  tokenizer = LatentTokenizer.from_params(
    latents, weights, np.zeros(2), np.ones(2)
  )
  tokenizer.save(folder / "latents.safetensors")
  return folder


@pytest.fixture(scope="module")
def base(home):
  """The text model and its parameters."""
  model, params, _ = load_model(home / "base")
  return model, params


@pytest.fixture(scope="module")
def fuse(home):
  """Grows the text model; the same one for the same changes."""

  @functools.cache
  def grow(separate="deep", patches="linear"):
    mapping = lmfusion.get_config(str(home / "base")).to_dict()
    mapping["model"] |= {
      "untie": UNTIED[separate], "patches": patches, "unet_channels": 4,
      "unet_blocks": 1,
    }  # fmt: skip
    mapping["data"]["image_tokenizer"] = str(home / "latents.safetensors")
    experiment = Experiment.from_mapping(mapping)
    data = experiment.data
    tokenizers = load_tokenizers(data.text_tokenizer, data.image_tokenizer)
    model = build_model(experiment.model, tokenizers.vocabulary, 64)
    key = jax.random.key(1)
    params = grown_params(experiment.init, model, tokenizers, key)
    return experiment, tokenizers, model, params

  return grow


def texts(rows=2, length=LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(3, IDS, (rows, length)).tolist()


def batch_of(model, documents):
  """Rows of documents, whose pictures are noise."""
  vocabulary = model.vocabulary
  latents = None
  if vocabulary.continuous:
    rng = np.random.default_rng(3)
    latents = [
      rng.normal(size=(sum(i > IDS + 1 for i in ids), vocabulary.latent_dim))
      for ids in documents
    ]
    latents = [x.astype(np.float32) for x in latents]
  return batch_of_ids(
    documents,
    vocabulary,
    towers=model.config.routed_towers.of_modality,
    row_length=LENGTH,
    latents=latents,
    causal=model.config.causal,
  )


PICTURE = [IDS, *[IDS + 2] * 4, IDS + 1]


def mixed():
  """A caption, its picture and a text, and a picture before its caption."""
  (one, two) = texts(seed=2)
  return [[0, *one[:7], *PICTURE, *one[7:12]], [0, *PICTURE, *two[:9], 2]]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
  """Scores of the text model's ids."""
  hidden = model.apply({"params": params}, batch)
  return model.logits(params, hidden)[..., :IDS]


@pytest.fixture(scope="module")
def trained(fuse):
  """The parts of a frozen model, its state after three steps, the first norm."""

  @functools.cache
  def train(separate):
    *_, model, params = fuse(separate)
    parts = Parts(
      model=(model, params),
      freeze="text shared",
      weight_decay=0.5,
      no_decay="",
    )
    state, step = parts.state(), parts.step()
    norms = []
    for _ in range(3):
      state, metrics = step(state, batch_of(model, mixed()))
      norms.append(float(metrics["grad_norm"]))
    return parts, state, norms[0]

  return train


@pytest.fixture(scope="module")
def gradient(fuse):
  """Of the first step, with respect to everything."""

  @functools.cache
  def differentiate(separate):
    *_, model, params = fuse(separate)
    objective = objective_of(model)
    batch = objective.balance(batch_of(model, mixed()))
    key = jax.random.fold_in(stream(0, "dropout"), 0)

    def loss(params):
      means = objective(model, params, batch, train=True, dropout_key=key)
      return means["loss"].total / means["loss"].count

    return jax.jit(jax.grad(loss))(params)

  return differentiate


@SEPARATIONS
def test_logits_of_text_are_the_text_models(base, trained, separate):
  """L1: bit for bit, before pictures are learned and after."""
  expected = logits(*base, batch_of(base[0], texts()))
  parts, state, _ = trained(separate)
  batch = batch_of(parts.model, texts())
  for params in (parts.params, state.params):
    np.testing.assert_array_equal(logits(parts.model, params, batch), expected)
  changed = test_partition.moved(parts.params, state.params)
  assert min(v for k, v in changed.items() if "image" in k.split("/")) > 0


def test_a_products_width_is_why_text_has_its_own(base, fuse):
  """The sum of a wider product is another; this width is one that shows it."""
  *_, model, _ = fuse()
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(4096 + 3, 128)), jnp.float32)
  hidden = jnp.asarray(rng.normal(size=(16, 128)), jnp.float32)
  ids = dataclasses.replace(
    model.vocabulary, sizes=(4098, 1), begin=(0, 4096), end=(0, 4097)
  )
  wide = model.clone(vocabulary=ids)
  assert (wide.text_ids, model.text_ids) == (4096, IDS)
  own = jax.jit(lambda h, t: jnp.matmul(h, t.T))
  ours = jax.jit(lambda h, t: wide.logits({"embed": t}, h))
  found = ours(hidden, table)
  np.testing.assert_array_equal(found[:, :4096], own(hidden, table[:4096]))
  np.testing.assert_allclose(found, own(hidden, table), atol=1e-4)


def test_text_before_the_first_picture_is_the_text_models(base, fuse):
  """L6: in a row of both; behind the picture it is another."""
  *_, model, params = fuse()
  ids = mixed()[0]
  found = logits(model, params, batch_of(model, [ids]))
  alone = [i if i < IDS else 5 for i in ids]
  expected = logits(*base, batch_of(base[0], [alone]))
  np.testing.assert_array_equal(found[0, :8], expected[0, :8])
  assert (found[0, 14:19] != expected[0, 14:19]).any(-1).all()


@SEPARATIONS
def test_nothing_of_text_is_updated(trained, gradient, separate):
  """L2: no update, no decay, no moments, no share in the clip norm."""
  parts, state, first_norm = trained(separate)
  for name, change in test_partition.moved(parts.params, state.params).items():
    mine = "image" in name.split("/")
    assert name == "embed" or (change > 0) == mine, name
  old, new = parts.params["embed"], state.params["embed"]
  np.testing.assert_array_equal(new[: IDS + 2], old[: IDS + 2])
  # The picture's id is never next and never looked up: only decay is left.
  np.testing.assert_allclose(new[IDS + 2], old[IDS + 2] * 0.995**3, rtol=1e-5)
  moments = named_leaves(parts.state().opt_state)
  held = sum(a.size for a in moments.values() if jnp.ndim(a))
  own = named_leaves(parts.trained(parts.params))
  assert {"image" in name.split("/") for name in own} == {True}
  assert held == 2 * sum(a.size for a in own.values())
  whole = gradient(separate)
  norm = optax.tree.norm(parts.partition.split(whole)[0])
  assert first_norm == pytest.approx(float(norm), rel=1e-4)
  assert first_norm < 0.99 * float(optax.tree.norm(whole))


@pytest.mark.parametrize(
  ("separate", "patches"),
  [("deep", "linear"), ("shallow", "linear"), ("none", "unet")],
)
def test_the_image_tower_begins_as_the_text_tower(
  base, fuse, separate, patches
):
  """L3; patches and new rows are drawn, all else is the text model's."""
  *_, model, params = fuse(separate, patches)
  before = named_leaves(base[1])
  shapes = named_leaves(model.abstract_params())
  for name, leaf in named_leaves(params).items():
    assert leaf.shape == shapes[name].shape
    if name.startswith("patches/"):
      assert name.startswith("patches/image/")
      assert leaf.any() or name != "patches/image/w_in"
    elif name == "embed":
      np.testing.assert_array_equal(leaf[:IDS], before[name])
      assert len(leaf) == IDS + 3 and np.std(leaf[IDS:]) > 0.2
    else:
      parts = [
        "shared" if k in ("text", "image") else k for k in name.split("/")
      ]
      np.testing.assert_array_equal(leaf, before["/".join(parts)])


def test_captions_teach_the_image_tower_through_frozen_text(fuse, monkeypatch):
  """L4: it would not, were text's activations detached, not its parameters."""
  *_, model, params = fuse()
  ids = mixed()[1]
  batch = batch_of(model, [ids])
  weight = batch.weight * (np.arange(LENGTH) > 6)
  batch = dataclasses.replace(batch, weight=weight.astype(np.float32))

  def gradient():
    def loss(params):
      hidden = model.apply({"params": params}, batch)
      scores = jax.nn.log_softmax(model.logits(params, hidden))
      chosen = jnp.take_along_axis(scores, batch.target[..., None], axis=-1)
      return -(chosen[..., 0] * batch.weight).sum()

    found = named_leaves(jax.jit(jax.grad(loss))(params))
    return [
      float(jnp.abs(found[f"layers/attention/image/{x}"]).max()) for x in "kv"
    ]

  assert min(gradient()) > 1e-4
  apply = Router.apply

  def detached(self, f, stream, *weights):
    first, *rest = apply(self, f, stream, *weights)
    return (jax.lax.stop_gradient(first), *rest)

  monkeypatch.setattr(Router, "apply", detached)
  assert max(gradient()) == 0


@pytest.mark.parametrize("separate", ["deep", "none"])
def test_rates_of_text_scale_its_first_updates(fuse, gradient, separate):
  """L5: by 0, 0.1 and 1, exactly; those of pictures are the same."""
  *_, model, params = fuse(separate)

  def updates(**options):
    parts = Parts(model=(model, params), clip_norm=0.0, **options)
    grads, own = parts.trained(gradient(separate)), parts.trained(params)
    state = parts.optimizer.init(own)
    found, _ = jax.jit(parts.optimizer.update)(grads, state, own, step=0)
    return named_leaves(found)

  ratio = "text:{0} shared:{0}".format
  whole = updates(learning_rate_of=ratio(1))
  tenth = updates(learning_rate_of=ratio(0.1))
  none = updates(learning_rate_of=ratio(0))
  frozen = updates(freeze="text shared")
  assert len(frozen) < len(whole)
  for name, update in whole.items():
    if "image" in name.split("/"):
      for other in (tenth, none, frozen):
        np.testing.assert_array_equal(other[name], update)
    else:
      np.testing.assert_array_equal(tenth[name], update * np.float32(0.1))
      assert not none[name].any() and name not in frozen


def test_frozen_matrices_in_half_the_bytes(base, fuse):
  """Text is then that of the rounded text model, bit for bit."""
  *_, model, params = fuse()
  options = {"freeze": "text shared", "frozen_dtype": "bfloat16"}
  parts = Parts(model=(model, params), **options)
  parts.params = parts.partition.kept(params)
  rounded = {
    name: leaf.dtype == jnp.bfloat16
    for name, leaf in named_leaves(parts.params).items()
  }
  for name, is_so in rounded.items():
    assert is_so == ("/text/" in name and "norm" not in name), name
  state, _ = parts.after(steps=2, batch=batch_of(model, mixed()))
  kept = named_leaves(parts.params)
  for name, leaf in named_leaves(state.params).items():
    assert leaf.dtype == kept[name].dtype

  def coarse(path, leaf):
    name = "/".join(getattr(k, "key", "") for k in path)
    if "norm" in name or name == "embed":
      return leaf
    return leaf.astype(jnp.bfloat16).astype(leaf.dtype)

  alone = jax.tree_util.tree_map_with_path(coarse, base[1])
  np.testing.assert_array_equal(
    logits(model, state.params, batch_of(model, texts())),
    logits(base[0], alone, batch_of(base[0], texts())),
  )


@SEPARATIONS
def test_the_text_tower_comes_out_as_it_came_in(
  home, fuse, trained, tmp_path, separate
):
  """Every file of the exported folder, byte for byte."""
  experiment, tokenizers, *_ = fuse(separate)
  parts, state, _ = trained(separate)
  assert parts.model.row_length == 64  # of the text model, as its rows were
  save_model(tmp_path / "run", experiment, state.params, tokenizers)
  export_model(home / "base", tmp_path / "before")
  export_model(tmp_path / "run", tmp_path / "after", tower="text")
  before, after = (
    {p.name: p.read_bytes() for p in (tmp_path / x).iterdir()}
    for x in ("before", "after")
  )
  assert before == after and "model.safetensors" in before


def test_what_config_says_of_its_base(home, tmp_path):
  """No folder is one line with the command that makes it."""
  with pytest.raises(
    UserError, match=r"interop fetch smollm2 nowhere"
  ) as error:
    lmfusion.get_config("nowhere")
  assert "\n" not in str(error.value)
  model = lmfusion.get_config(str(home / "base")).model
  assert (model.num_heads, model.text_length, model.kind) == (2, 64, "lmfusion")
  tiny = Experiment.from_mapping(lmfusion.get_config("tiny").to_dict())
  assert tiny.init.text_steps and not tiny.init.checkpoint
