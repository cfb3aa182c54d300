"""What is frozen stays, costs nothing, and lets gradients through."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusionlab.batch import batch_of_ids
from fusionlab.errors import ConfigError
from fusionlab.experiment import Experiment
from fusionlab.objectives import build_objective
from fusionlab.objectives.next_token import NextTokenConfig
from fusionlab.towers import parse_by_tower
from fusionlab.train.config import OptimizerConfig
from fusionlab.train.optimizer import (
  make_optimizer,
  make_schedule,
  named_leaves,
)
from fusionlab.train.partition import make_partition
from fusionlab.train.setup import Setup
from fusionlab.train.state import init_state
from fusionlab.train.step import make_train_step
from tests.models import tiny

LEARNING_RATE = 1e-2


class Parts:
  """A tiny MoT with the optimizer of some options."""

  def __init__(self, k=2, model=None, **options):
    defaults = {
      "learning_rate": LEARNING_RATE, "warmup_steps": 0, "schedule": "constant"
    }  # fmt: skip
    self.config = OptimizerConfig(**(defaults | options))
    self.model, self.params = model or tiny.make(k)
    self.towers = self.model.config.routed_towers
    self.partition = make_partition(
      self.config, self.model, self.model.vocabulary
    )
    axes, towers = self.model.param_axes(), None
    if self.partition is not None:
      axes, towers = self.partition.trained_axes, self.partition.trained_towers
    self.optimizer = make_optimizer(
      self.config,
      make_schedule(self.config, 100),
      axes=axes,
      towers=towers,
      rates=parse_by_tower(self.config.learning_rate_of, self.towers, "x"),
      decays=parse_by_tower(self.config.weight_decay_of, self.towers, "x"),
    )

  def trained(self, params):
    return params if self.partition is None else self.partition.split(params)[0]

  def state(self):
    return init_state(
      lambda key: self.params,
      self.optimizer,
      jax.random.key(0),
      trained=self.trained,
    )

  def step(self, **options):
    return make_train_step(
      self.model,
      objective_of(self.model),
      self.optimizer,
      partition=self.partition,
      **options,
    )

  def after(self, steps=1, batch=None):
    """The state after some steps, and the last step's metrics."""
    state, step, metrics = self.state(), self.step(), {}
    batch = tiny.batch_for(self.model) if batch is None else batch
    for _ in range(steps):
      state, metrics = step(state, batch)
    return state, metrics


def objective_of(model):
  return build_objective(
    NextTokenConfig(), model.vocabulary, np.ones(40, np.int32)
  )


def moved(before, after):
  """Path -> largest change of each leaf."""
  old, new = named_leaves(before), named_leaves(after)
  return {name: float(jnp.abs(new[name] - old[name]).max()) for name in old}


def is_of(path, tower):
  return f"/{tower}/" in f"/{path}"


@pytest.mark.parametrize(
  "changes",
  [{}, {"tie_embeddings": True}, {"untie": "ffn"}, {"vocab_size": 96}],
)
@pytest.mark.parametrize("freeze", ["text", "image", "shared text"])
def test_split_and_merge_are_exact(changes, freeze):
  model, params = tiny.make(2, **changes)
  partition = make_partition(
    OptimizerConfig(freeze=freeze), model, model.vocabulary
  )
  trained, frozen = partition.split(params)
  jax.tree.map(
    np.testing.assert_array_equal, partition.merge(trained, frozen), params
  )
  sizes = [sum(a.size for a in jax.tree.leaves(t)) for t in (trained, frozen)]
  assert sum(sizes) == sum(a.size for a in jax.tree.leaves(params))
  assert min(sizes) > 0


def test_frozen_parameters_do_not_move_at_all():
  """No update, no decay: bit for bit, table rows too, after steps with decay."""
  parts = Parts(freeze="text", weight_decay=0.5, no_decay="")
  state, _ = parts.after(steps=3)
  changes = moved(parts.params, state.params)
  for name, change in changes.items():
    if is_of(name, "text"):
      assert change == 0, name
    elif is_of(name, "image"):
      assert change > 0, name
  rows = slice(0, 40), slice(40, 80)
  for table, axis in (("embed", 0), ("unembed", 1)):
    old, new = parts.params[table], state.params[table]
    text, image = (
      np.abs(np.take(new - old, range(r.start, r.stop), axis)).max()
      for r in rows
    )
    assert text == 0 and image > 0


def test_frozen_parameters_have_no_moments():
  parts = Parts(freeze="text")
  moments = named_leaves(parts.state().opt_state)
  assert moments
  assert not [name for name in moments if is_of(name, "text")]
  held = sum(a.size for a in moments.values() if jnp.ndim(a))
  trained = sum(a.size for a in jax.tree.leaves(parts.trained(parts.params)))
  assert held == 2 * trained


@functools.cache
def one_step(**options):
  """The parts of some options, and the state and metrics after a step."""
  parts = Parts(**options)
  return parts, *parts.after()


def test_frozen_parameters_have_no_share_in_the_clip_norm():
  """The norm is that of the trained gradients, which are those of training all."""
  whole, _, all_of_it = one_step()
  frozen, _, metrics = one_step(freeze="text")
  batch = tiny.batch_for(whole.model)
  _, gradient = tiny.loss_and_grad(whole.model, whole.params, batch)
  trained = frozen.partition.split(gradient)[0]
  assert float(metrics["grad_norm"]) == pytest.approx(
    float(optax.tree.norm(trained)), rel=1e-5
  )
  assert float(metrics["grad_norm"]) < 0.95 * float(all_of_it["grad_norm"])


def test_frozen_parameters_are_not_differentiated():
  """The compiled step has less to do than with everything trained."""

  # A scan's body is counted once: one layer is the whole of it.
  model = tiny.make(2, num_layers=1, ffn_dim=256)
  batch = tiny.batch_for(model[0], present=(0,))

  def flops(parts):
    compiled = parts.step().lower(parts.state(), batch).compile()
    return compiled.cost_analysis()["flops"]

  whole, frozen = (
    flops(Parts(model=model)),
    flops(Parts(model=model, freeze="text")),
  )
  # Of three products a matrix one is left out; norms, scores and tables stay.
  assert 0.6 < frozen / whole < 0.8


@pytest.mark.parametrize(
  ("freeze", "untie", "spared"),
  [("", "ffn", 0.0), ("text", "ffn q", 0.75), ("shared", "ffn q", 1.0)],
)
def test_model_flops_count_no_weight_gradients_of_what_is_frozen(
  freeze, untie, spared
):
  mapping = {
    "model": {"kind": "mixture_of_transformers", "untie": untie},
    "objective": {"kind": "next_token"},
    "data": {"sources": {"a": {"kind": "jsonl"}}},
    "optimizer": {"freeze": freeze},
  }
  experiment = Experiment.from_mapping(mapping)
  data = types.SimpleNamespace(
    vocabulary=tiny.vocabulary(2), layout_counts=(30, 10)
  )
  parts: Any = (None, None, data, None, None)
  found = Setup(experiment, *parts).train_flops_per_token
  forward = experiment.model.forward_flops_per_token(
    80, experiment.data.row_length
  )
  matrices = experiment.model.matrix_flops
  own = sum(
    v for k, v in matrices.items() if (k in untie) == (freeze == "text")
  )
  assert found == pytest.approx(3 * forward - spared * own)


def test_gradients_flow_through_frozen_activations():
  """A caption's loss reaches the picture's keys and values through frozen text.

  Facts: captioning is learned in no other way (LMFusion, image before caption).
  """
  parts = Parts(freeze="text")
  model = parts.model

  @jax.jit
  def gradients(trained, frozen, batch):
    def loss(trained):
      params = parts.partition.merge(trained, frozen)
      return objective_of(model)(model, params, batch, train=True)["loss"].total

    return jax.grad(loss)(trained)

  def gradient(document, weighed):
    batch = batch_of_ids(
      [document], model.vocabulary, towers=parts.towers.of_modality
    )
    weight = batch.weight * np.isin(batch.target, weighed)
    batch = dataclasses.replace(batch, weight=weight.astype(np.float32))
    return named_leaves(gradients(*parts.partition.split(parts.params), batch))

  text, image = [5, 6, 7, 8], [45, 46, 47, 48]
  after = gradient([*image, *text], text)
  before = gradient([*text, *image], text)
  for name in ("k", "v"):
    path = f"layers/attention/image/{name}"
    assert np.abs(after[path]).max() > 1e-6
    assert np.abs(before[path]).max() == 0
  assert not [name for name in after if is_of(name, "text")]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_of_towers_scale_first_updates(kind):
  """A factor of a half halves a tower's update, one of 0 leaves it as it was."""
  options = {} if kind == "adamw" else {"kind": kind}
  steps = [
    one_step(**options),
    one_step(learning_rate_of="text:0.5 image:0", **options),
  ]
  base, scaled = (moved(p.params, state.params) for p, state, _ in steps)
  for name, change in base.items():
    if is_of(name, "text"):
      assert scaled[name] == pytest.approx(change / 2, rel=1e-3)
    elif is_of(name, "image"):
      assert scaled[name] == 0 < change


def test_decays_of_towers():
  """Without gradients only decay moves parameters: by rate times decay each."""
  parts = Parts(
    weight_decay=0.5, weight_decay_of="image:0 text:0.25", no_decay="norm"
  )
  batch = tiny.batch_for(parts.model)
  batch = dataclasses.replace(batch, weight=np.zeros_like(batch.weight))
  after = named_leaves(parts.after(batch=batch)[0].params)
  for name, before in named_leaves(parts.params).items():
    if name in ("embed", "unembed") or "norm" in name:
      continue
    decay = 0.25 if is_of(name, "text") else 0
    np.testing.assert_allclose(
      after[name], before * (1 - LEARNING_RATE * decay), rtol=1e-5, atol=1e-8
    )
  table, old = after["embed"], parts.params["embed"]
  np.testing.assert_array_equal(table[40:], old[40:])
  assert np.abs(table[:40] - old[:40]).max() > 0


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("freeze", "txt", "did you mean 'text'"),
    ("freeze", "text image shared", "freezes every parameter"),
    ("freeze", "text text", "twice"),
    ("freeze", "text:1", "not of the form 'text'"),
    ("learning_rate_of", "text", "not of the form 'text:0.1'"),
    ("learning_rate_of", "text:-1", "is not a number from 0"),
    ("weight_decay_of", "image:lots", "is not a number from 0"),
    ("weight_decay_of", "speech:0", "it has text, image, shared"),
  ],
)
def test_mistakes_are_named(key, value, said):
  mapping = {
    "model": {"kind": "mixture_of_transformers"},
    "objective": {"kind": "next_token"},
    "data": {"sources": {"a": {"kind": "jsonl"}}},
    "optimizer": {key: value},
  }
  with pytest.raises(ConfigError, match=said):
    experiment = Experiment.from_mapping(mapping)
    model, _ = tiny.make(2)
    make_partition(experiment.optimizer, model, model.vocabulary)
