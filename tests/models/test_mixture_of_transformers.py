"""MoT's exact properties (M1-M10), routed against the select oracle."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusionlab.analysis import parameters
from fusionlab.models.mixture_of_transformers import (
  SIZES,
  MixtureOfTransformersConfig,
)
from fusionlab.objectives import build_objective
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.routing import make_layout
from fusionlab.testing.batches import layout_of
from fusionlab.towers import UNTIE_NAMES
from fusionlab.train.state import init_state
from fusionlab.train.step import make_train_step
from tests.models.tiny import (
  NAMES,
  apply,
  batch_for,
  close,
  loss_and_grad,
  make,
  on_real,
)

PACKED = {"rows": 4, "group_rows": 2, "padding": 5, "documents": 3}


@pytest.mark.parametrize(
  ("dispatch", "k", "options"),
  [
    ("layout", 2, {}),
    ("layout", 2, PACKED),
    ("layout", 2, {"present": (0,)}),
    ("layout", 2, {"present": (1,), "padding": 2}),
    ("layout", 2, {"rows": 1, "length": 1}),
    ("layout", 2, {"rows": 1, "length": 2}),
    ("layout", 3, {}),
    ("layout", 3, PACKED),
    ("ragged", 2, {}),
    ("ragged", 3, PACKED),
  ],
)
def test_m2_routed_equals_the_select_oracle(dispatch, k, options):
  """Outputs and gradients agree at float32 for any interleaving."""
  model, params = make(k, dispatch=dispatch)
  oracle, _ = make(k, dispatch="select")
  batch = batch_for(model, **options)
  got, expected = (apply(m, params, batch) for m in (model, oracle))
  close(on_real(got, batch), on_real(expected, batch), atol=1e-5)
  # A lone token has no next one; here it predicts itself.
  batch = batch.replace(
    weight=np.maximum(batch.weight, batch.weight.max() == 0)
  )
  got, expected = (loss_and_grad(m, params, batch) for m in (model, oracle))
  close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("untie", "placement"),
  [
    ("ffn", "swin"),
    ("ffn ffn_norm", "pre"),
    ("q k v o qk_norm", "swin"),
    ("k", "pre"),
    ("final_norm", "swin"),
    ("mixer_norm ffn_norm", "swin"),
    (" ".join(UNTIE_NAMES), "pre"),
  ],
)
def test_any_untie_equals_the_select_oracle(untie, placement):
  """Which parameters are per tower never changes what is computed."""
  changes = {"untie": untie, "norm_placement": placement, "num_kv_heads": 2}
  model, params = make(**changes)
  oracle, _ = make(dispatch="select", **changes)
  batch = batch_for(model, seed=4, padding=3)
  got, expected = (loss_and_grad(m, params, batch) for m in (model, oracle))
  close(got, expected, rtol=1e-4)


def _copied(tree):
  """The dense model's parameters in both towers."""
  if isinstance(tree, dict) and "shared" in tree:
    return dict.fromkeys(("text", "image"), tree["shared"])
  if isinstance(tree, dict):
    return {name: _copied(sub) for name, sub in tree.items()}
  return tree


@pytest.mark.smoke
@pytest.mark.parametrize("dispatch", ["layout", "select", "ragged"])
def test_m1_identical_towers_are_the_dense_model(dispatch):
  """Dense weights in every tower give the dense output; `select` to the bit."""
  dense, shared = make(untie="")
  model, _ = make(dispatch=dispatch)
  batch = batch_for(model)
  got = apply(model, _copied(shared), batch)
  expected = apply(dense, shared, batch.replace(layout=None))
  if dispatch == "select":
    np.testing.assert_array_equal(got, expected)
  else:
    close(got, expected)


def test_m8_tower_gradients_sum_to_the_dense_gradient():
  """At identical weights the towers' gradients add up to the dense one."""
  dense, shared = make(untie="")
  model, _ = make()
  batch = batch_for(model)
  _, expected = loss_and_grad(dense, shared, batch.replace(layout=None))

  def add(tree):
    if isinstance(tree, dict) and "text" in tree:
      return {"shared": jax.tree.map(jnp.add, tree["text"], tree["image"])}
    if isinstance(tree, dict):
      return {name: add(sub) for name, sub in tree.items()}
    return tree

  _, got = loss_and_grad(model, _copied(shared), batch)
  close(add(got), expected, rtol=1e-4)


def test_m3_permuting_rows_permutes_outputs():
  """Routing is per token: rows do not know their neighbours."""
  model, params = make()
  batch = batch_for(model, rows=4, group_rows=1)
  order = np.asarray([2, 0, 3, 1])
  permuted = jax.tree.map(lambda a: a[order], batch)
  np.testing.assert_array_equal(
    apply(model, params, permuted), apply(model, params, batch)[order]
  )


def test_m3_rows_of_one_group_do_not_know_each_other():
  """Other interleavings in a group's other rows leave a row as it was."""
  model, params = make()
  batch = batch_for(model, rows=4, group_rows=4)
  order = np.asarray([0, 3, 1, 2])
  rows = {
    name: np.asarray(getattr(batch, name))[order]
    for name in ("tokens", "modality", "segment", "position")
  }
  layout = layout_of(rows["modality"], rows["segment"] > 0, (0, 1), 4)
  moved = batch.replace(
    **rows,
    k_start=batch.k_start[order],
    k_end=batch.k_end[order],
    layout=layout,
  )
  close(
    apply(model, params, moved), np.asarray(apply(model, params, batch))[order]
  )


def test_m3_relabelling_modalities_and_towers_changes_nothing():
  """Modality ids are names only."""
  model, params = make()
  batch = batch_for(model)
  swap = lambda tree: (  # noqa: E731
    {"text": swap(tree["image"]), "image": swap(tree["text"])}
    if isinstance(tree, dict) and "text" in tree
    else {n: swap(t) for n, t in tree.items()}
    if isinstance(tree, dict)
    else tree
  )
  swapped = batch.replace(
    modality=1 - batch.modality,
    layout=batch.layout.replace(
      take=batch.layout.take[::-1],
      place=np.where(
        batch.layout.place < batch.layout.take[0].shape[1],
        batch.layout.place + batch.layout.take[1].shape[1],
        batch.layout.place - batch.layout.take[0].shape[1],
      ),
    ),
  )
  close(
    apply(model, swap(params), swapped),
    apply(model, params, batch),
  )


@pytest.mark.parametrize("dispatch", ["layout", "select", "ragged"])
@pytest.mark.parametrize("places", [0, 8])
def test_m4_an_absent_modality_has_zero_gradient(dispatch, places):
  """No token of a modality: its tower's gradient is exactly 0.

  So it is where padding stands in the places that the layout keeps for it.
  """
  model, params = make(dispatch=dispatch)
  batch = batch_for(model, present=(0,), padding=4)
  size = batch.tokens.size
  batch = batch.replace(
    layout=make_layout(
      batch.modality,
      batch.segment > 0,
      towers=(0, 1),
      counts=(size - places, places),
      group_rows=len(batch.tokens),
    )
  )
  _, grads = loss_and_grad(model, params, batch)
  for path, leaf in jax.tree.leaves_with_path(grads):
    name = parameters.path_name(path)
    if "/image/" in name:
      assert not np.asarray(leaf).any(), name
    elif "/text/" in name:
      assert np.asarray(leaf).any(), name


def test_m5_image_weights_act_from_the_first_image_token_on():
  """Text before the first image token does not see the image tower."""
  model, params = make()
  batch = batch_for(model, rows=1, length=16, present=(0,))
  modality = np.asarray([[0] * 6 + [1] * 4 + [0] * 6], np.int32)
  batch = batch.replace(
    modality=modality,
    layout=layout_of(modality, modality >= 0, (0, 1), group_rows=1),
  )
  changed = jax.tree.map_with_path(
    lambda path, leaf: (
      leaf + 0.3 if "/image/" in parameters.path_name(path) else leaf
    ),
    params,
  )
  before, after = (apply(model, p, batch) for p in (params, changed))
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert (np.abs(before - after).max(-1)[:, 6:] > 1e-4).all()


@pytest.mark.parametrize("implementation", ["reference", "xla_blockwise"])
@pytest.mark.parametrize("placement", ["pre", "swin"])
def test_m6_causality_by_gradient(placement, implementation):
  """d hidden_i / d embedding_j is 0 for j > i and for another document."""
  model, params = make(norm_placement=placement, attention=implementation)
  batch = batch_for(model, rows=1, length=12, documents=2)
  # Distinct ids make an embedding row stand for one position.
  tokens = np.arange(12, dtype=np.int32)[None]
  batch = batch.replace(tokens=tokens)

  def hidden(embed):
    out = model.apply({"params": params | {"embed": embed}}, batch)
    return jnp.linalg.norm(out[0], axis=-1) + out[0].sum(-1)

  influence = np.abs(jax.jit(jax.jacrev(hidden))(params["embed"])).sum(-1)[
    :, :12
  ]
  segment = np.asarray(batch.segment[0])
  allowed = np.tri(12, dtype=bool) & (segment[:, None] == segment)
  assert (influence[allowed] > 0).all()
  assert (influence[~allowed] == 0).all()


@pytest.mark.parametrize("k", [2, 3])
def test_m7_compiled_flops_are_the_dense_models(k):
  """The routed forward and backward cost at most 1.02 of the dense ones."""
  sizes = {"dim": 64, "ffn_dim": 256, "scan_unroll": 2}
  cost = {}
  for name, untie in (("dense", ""), ("mot", " ".join(UNTIE_NAMES))):
    model, params = make(k, untie=untie, **sizes)
    batch = batch_for(model, rows=4, length=48)
    objective = build_objective(
      NextTokenConfig(), model.vocabulary, np.ones(40, np.int32)
    )
    step = jax.grad(
      lambda p, b, m=model, o=objective: o(m, p, b, train=True)["loss"].total
    )
    compiled = jax.jit(step).lower(params, batch).compile()
    cost[name] = compiled.cost_analysis()["flops"]
    if name == "dense":
      tokens = 4 * 48
      formula = 3 * model.config.forward_flops_per_token(40 * k, 48) * tokens
      # XLA also counts norms, softmax and the masked half of the scores.
      assert 0.9 < cost[name] / formula < 1.5
  assert 0.98 <= cost["mot"] / cost["dense"] <= 1.02


def test_select_costs_every_tower():
  """The oracle's projections cost K times the dense ones: the ratio is real."""
  cost = {}
  for dispatch in ("layout", "select"):
    model, params = make(2, dispatch=dispatch, dim=64, ffn_dim=256)
    batch = batch_for(model, rows=4, length=48)
    run = jax.jit(lambda p, b, m=model: m.apply({"params": p}, b))
    cost[dispatch] = run.lower(params, batch).compile().cost_analysis()["flops"]
  assert 1.7 < cost["select"] / cost["layout"] < 2.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_train_step_has_one_scatter_the_embeddings_gradient(
  dtype, compiler_options
):
  """Routing, loss, attention and dropout add none to the compiled step."""
  model, params = make(compute_dtype=dtype, dropout=0.1)
  batch = batch_for(model, padding=3, documents=2)
  objective = build_objective(
    NextTokenConfig(), model.vocabulary, np.ones(40, np.int32)
  )
  optimizer = optax.adamw(1e-3)
  step = make_train_step(model, objective, optimizer, dropout_seed=0)
  state = init_state(lambda key: params, optimizer, jax.random.key(0))
  text = step.lower(state, batch).compile(compiler_options).as_text()
  assert text.count(" scatter(") == 1


@pytest.mark.parametrize("placement", ["pre", "swin"])
def test_m9_equals_algorithm_1_in_numpy(placement):
  """One layer against a direct transcription, QK-norm before the rotation."""
  model, params = make(num_layers=1, norm_placement=placement)
  batch = batch_for(model, rows=1, length=10)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  layer = jax.tree.map(lambda a: a[0], p["layers"])
  names = [NAMES[m] for m in np.asarray(batch.modality)[0]]

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

  def rotate(x, position):
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  x = p["embed"][np.asarray(batch.tokens)[0]]
  pre = placement == "pre"

  def attention(x):
    q, k, v = [], [], []
    for i, name in enumerate(names):
      w = layer["attention"][name]
      q_i, k_i, v_i = (np.einsum("d,dhk->hk", x[i], w[s]) for s in "qkv")
      q.append(rotate(norm(q_i, w["q_norm_scale"]), i))
      k.append(rotate(norm(k_i, w["k_norm_scale"]), i))
      v.append(v_i)
    q, k, v = map(np.stack, (q, k, v))
    s = np.einsum("ihk,jhk->hij", q, k) / math.sqrt(8)
    s = np.where(np.tri(10, dtype=bool), s, -np.inf)
    a = np.exp(s - s.max(-1, keepdims=True))
    a = np.einsum("hij,jhk->ihk", a / a.sum(-1, keepdims=True), v)
    return np.stack(
      [
        np.einsum("hk,hkd->d", a[i], layer["attention"][name]["o"])
        for i, name in enumerate(names)
      ]
    )

  def ffn(x):
    rows = []
    for i, name in enumerate(names):
      w = layer["ffn"][name]
      gate = x[i] @ w["w_gate"]
      rows.append(
        (gate / (1 + np.exp(-gate)) * (x[i] @ w["w_in"])) @ w["w_out"]
      )
    return np.stack(rows)

  for f, norm_name in ((attention, "mixer_norm"), (ffn, "ffn_norm")):
    scale = np.stack([layer[norm_name][n]["scale"] for n in names])
    x = x + (f(norm(x, scale)) if pre else norm(f(x), scale))
  expected = norm(x, np.stack([p["final_norm"][n]["scale"] for n in names]))
  close(apply(model, params, batch)[0], expected, atol=1e-5)


def test_m10_two_modalities_that_share_a_tower_are_one():
  """The map (0, 1, 1) equals a model of two modalities."""
  shared, params = make(3, towers=(0, 1, 1))
  batch = batch_for(shared)
  two, _ = make(2, vocab_size=120)

  def rename(tree):
    if isinstance(tree, dict):
      return {
        "image" if n == "image+speech" else n: rename(t)
        for n, t in tree.items()
      }
    return tree

  merged = batch.replace(modality=np.minimum(batch.modality, 1))
  close(
    apply(two, rename(params), merged),
    apply(shared, params, batch),
  )


EXPECTED_MILLIONS = {
  "37m": (37.0, 40.4, 43.8),
  "94m": (94.4, 121.6, 148.9),
  "443m": (442.5, 751, 1059),
  "880m": (880.8, 1560, 2240),
  "1.5b": (1501.6, 2735, 3968),
  "7b": (7013, 13489, 19965),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sizes_have_the_papers_parameter_counts(name, k):
  """Totals of the dense model, K=2 and K=3 within 0.1% of the table."""
  size = SIZES[name]
  config = MixtureOfTransformersConfig(
    modalities=NAMES[: max(k, 2)],
    towers=tuple(range(max(k, 2))),
    untie="" if k == 1 else " ".join(UNTIE_NAMES),
    dim=size.dim,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    vocab_size=65_536,
  )
  counts = parameters.count(config, 65_536)
  expected = EXPECTED_MILLIONS[name][k - 1] * 1e6
  assert counts.total == pytest.approx(expected, rel=1e-3)
  dense = parameters.count(dataclasses.replace(config, untie=""), 65_536)
  assert counts.active == dense.total
