"""The step: what is minimised, what is kept, and that it compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionlab.models import build_model
from fusionlab.objectives import build_objective
from fusionlab.sharding import rules
from fusionlab.sharding.batches import place_batch
from fusionlab.sharding.mesh import MeshConfig, make_mesh
from fusionlab.tokenizers import load_tokenizers
from fusionlab.train.optimizer import make_optimizer, make_schedule
from fusionlab.train.state import (
  abstract_state,
  init_state,
  state_shardings,
  stream,
)
from fusionlab.train.step import make_train_step, split_batch
from tests.train import fakes


class Parts:
  """Model, objective, optimizer and loader of a tiny experiment.

  Its first state and its steps are made once: see `folder`.
  """

  def __init__(self, folder, mesh=None, nan_at=(), **flat):
    flat = {"data__group_rows": 1, "train__batch_size": 8, **flat}
    self.experiment = fakes.experiment_of(folder, **flat)
    data = self.experiment.data
    tokenizers = load_tokenizers(data.text_tokenizer, data.image_tokenizer)
    self.data = fakes.open_fake_data(self.experiment, tokenizers, nan_at=nan_at)
    self.model = build_model(self.experiment.model, tokenizers.vocabulary)
    self.objective = build_objective(
      self.experiment.objective, tokenizers.vocabulary, self.data.token_bytes
    )
    self.schedule = make_schedule(self.experiment.optimizer, 100)
    self.optimizer = make_optimizer(self.experiment.optimizer, self.schedule)
    self.mesh = mesh
    self.ema = self.experiment.optimizer.ema_decay > 0
    self.shardings = None
    if mesh is not None:
      abstract = abstract_state(
        self.model.abstract_params(), self.optimizer, ema=self.ema
      )
      self.shardings = state_shardings(
        abstract,
        rules.param_shardings(self.model.param_axes(), abstract.params, mesh),
        rules.replicated(mesh),
      )

  @functools.cached_property
  def _first(self):
    state = init_state(
      self.model.init_params,
      self.optimizer,
      stream(0, "params"),
      ema=self.ema,
      shardings=self.shardings,
    )
    return jax.device_get(state), jax.tree.map(lambda a: a.sharding, state)

  def state(self):
    """The first state, whose memory a step may take."""
    return jax.tree.map(
      lambda a, where: jax.device_put(np.array(a), where), *self._first
    )

  def step(self, **options):
    return step_of(self, **options)

  def batch(self, index=0):
    host = self.data.train[index]
    return host if self.mesh is None else place_batch(host, self.mesh)


@functools.cache
def step_of(parts, **options):
  """The compiled step of some parts."""
  return make_train_step(
    parts.model,
    parts.objective,
    parts.optimizer,
    schedule=parts.schedule,
    ema_decay=parts.experiment.optimizer.ema_decay,
    shardings=parts.shardings,
    mesh=parts.mesh,
    **options,
  )


parts_of = functools.cache(Parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The tokenizers of all tests: equal parts share their compiled programs."""
  return tmp_path_factory.mktemp("step")


def assert_close(a, b, **tolerances):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerances)


def test_split_takes_the_same_share_of_every_shard(folder):
  """Microbatch a holds rows a of each shard; groups stay with their rows."""
  batch = parts_of(folder).data.train[0]
  parts = split_batch(batch, accumulate=2, shards=2)
  expected = batch.tokens[[0, 1, 4, 5]]
  np.testing.assert_array_equal(parts.tokens[0], expected)
  np.testing.assert_array_equal(
    parts.layout.place[0], batch.layout.place[[0, 1, 4, 5]]
  )


@pytest.mark.smoke
def test_accumulation_equals_one_big_batch(folder):
  """Four microbatches give the loss and the update of the whole batch.

  Adam's first update is a sign, so second-moment roundoff is not hidden: the
  moments, which are linear and quadratic in the gradient, are compared too.
  """
  parts = parts_of(folder)
  results = []
  for accumulate in (1, 4):
    state, metrics = parts.step(accumulate=accumulate)(
      parts.state(), parts.batch()
    )
    loss = metrics["loss"]
    results.append(
      (loss.total / loss.count, metrics["grad_norm"], state.opt_state)
    )
  assert_close(results[0], results[1], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharded_equals_one_device(folder, accumulate):
  """data 2 x fsdp 2: the same loss, norm and moments as one device's."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2))
  results = []
  for parts in (parts_of(folder), parts_of(folder, mesh)):
    state, metrics = parts.step(accumulate=accumulate)(
      parts.state(), parts.batch()
    )
    loss = metrics["loss"]
    results.append(
      (loss.total / loss.count, metrics["grad_norm"], state.opt_state)
    )
  assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_state_is_created_sharded_and_stays_so(folder):
  """Moments lie where their parameter lies, before and after a step."""
  mesh = make_mesh(MeshConfig(fsdp=4))
  parts = parts_of(folder, mesh, optimizer__ema_decay=0.9)
  state = parts.state()
  shards = jax.tree.map(lambda x: x.sharding, state)
  new, _ = parts.step()(state, parts.batch())
  after = jax.tree.map(lambda x: x.sharding, new)
  for before, later in zip(
    jax.tree.leaves(shards), jax.tree.leaves(after), strict=True
  ):
    assert before == later
  adam = next(s for s in new.opt_state if hasattr(s, "mu"))
  split = [
    p.sharding.is_equivalent_to(m.sharding, p.ndim)
    for p, m in zip(
      jax.tree.leaves(new.params), jax.tree.leaves(adam.mu), strict=True
    )
  ]
  assert all(split)
  assert any(
    not p.sharding.is_fully_replicated for p in jax.tree.leaves(new.params)
  )


def test_ema_is_the_moving_average(folder):
  """ema = decay·ema + (1 - decay)·params, starting at the first parameters."""
  parts = parts_of(folder, optimizer__ema_decay=0.75)
  first = jax.tree.map(np.array, parts.state().params)
  state, _ = parts.step()(parts.state(), parts.batch())
  expected = jax.tree.map(
    lambda a, b: 0.75 * a + 0.25 * np.asarray(b), first, state.params
  )
  assert_close(state.ema, expected, rtol=1e-6)
  assert state.eval_params is state.ema


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_not_finite(folder, policy):
  """'skip' keeps parameters, moments and average and counts; both report."""
  parts = parts_of(folder, nan_at=(1,), optimizer__ema_decay=0.9)
  step = parts.step(on_nonfinite=policy)
  state, metrics = step(parts.state(), parts.batch(0))
  assert metrics["finite"]
  before = jax.tree.map(np.array, (state.params, state.opt_state, state.ema))
  state, metrics = step(state, parts.batch(1))
  assert not metrics["finite"]
  assert state.step == 2
  if policy == "skip":
    assert state.skipped == 1
    after = (state.params, state.opt_state, state.ema)
    assert_close(before, after, rtol=0, atol=0)
    state, metrics = step(state, parts.batch(2))
    assert metrics["finite"]
    assert state.skipped == 1


def test_schedule_follows_the_step_past_a_skip(folder):
  """After a skipped update the rate is that of the step, not of Adam's count."""
  parts = parts_of(folder, nan_at=(0,))
  step = parts.step(on_nonfinite="skip")
  state, _ = step(parts.state(), parts.batch(0))
  state, metrics = step(state, parts.batch(1))
  assert metrics["learning_rate"] == parts.schedule(1)


def test_dropout_depends_on_seed_and_step(folder):
  """The same seed and step give the same loss; another seed another one."""
  parts = parts_of(folder, model__dropout=0.5)
  first, second = parts.step(dropout_seed=0), parts.step(dropout_seed=1)
  later = parts.state().replace(step=jnp.int32(5))
  losses = [
    float(step(state, parts.batch())[1]["loss"].total)
    for step, state in (
      (first, parts.state()),
      (first, parts.state()),
      (second, parts.state()),
      (first, later),
    )
  ]
  assert losses[0] == losses[1]
  assert len(set(losses)) == 3


def test_a_recompile_is_an_error(folder):
  """A batch of another shape is refused instead of compiled."""
  parts = parts_of(folder)
  step = parts.step()
  state, _ = step(parts.state(), parts.batch())
  other = parts_of(folder, train__batch_size=4).batch()
  with pytest.raises(AssertionError, match="second time"):
    step(state, other)


def test_loss_falls(folder):
  """Forty steps on the synthetic documents learn most of their structure."""
  parts = parts_of(folder)
  step, state = parts.step(), parts.state()
  losses = []
  for index in range(40):
    state, metrics = step(state, parts.batch(index))
    losses.append(float(metrics["loss"].total / metrics["loss"].count))
  assert losses[-1] < 0.6 * losses[0]


def test_streams_differ_by_name():
  """Two names of one seed give independent keys; one name the same key."""
  a, b, c = stream(0, "params"), stream(0, "dropout"), stream(1, "params")
  assert jnp.array_equal(a, stream(0, "params"))
  assert not jnp.array_equal(a, b)
  assert not jnp.array_equal(a, c)
