"""The decoder of every comparison: dense, or with towers, one code.

Llama-style: RMSNorm, SwiGLU, rotary positions within the document, no biases;
Chameleon's QK-norm and choice of norm placement (arXiv 2405.09818, §2.3). With
`untie` and `towers` it is Mixture-of-Transformers (`mixture_of_transformers`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusionlab.batch import Batch, Vocabulary
from fusionlab.errors import UserError
from fusionlab.models.block import Block, Context, stays_routed
from fusionlab.models.config import TransformerConfig
from fusionlab.nn.attention import Visibility, visibility_of
from fusionlab.nn.embedding import lookup
from fusionlab.nn.functional.rotary import rotary_angles
from fusionlab.nn.norms import RMSNorm
from fusionlab.nn.parameters import fan_in
from fusionlab.nn.stack import Stack
from fusionlab.routing import (
  Layout,
  Routed,
  Router,
  make_layout,
  make_router,
)
from fusionlab.sharding import axes
from fusionlab.sharding.rules import constrain
from kernels_pallas.platform import target_platform

# Per layer the collection "cache" of its block; leaves `[B, G, S, D]`.
Cache: TypeAlias = tuple[Any, ...]


@flax.struct.dataclass
class Decoded:
  """What a step with a cache returns.

  Attributes:
    hidden: after the final norm, in sequence order.
    chosen: the residual stream after the layers asked for, in that order.
    cache: with the new tokens in it.
    prediction: what the noise of continuous positions is predicted by, where it
      was asked for.
  """

  hidden: Float[Array, "B T d"]
  chosen: tuple[Float[Array, "B T d"], ...]
  cache: Cache
  prediction: Float[Array, "B T C"] | None = None


# (embedding table, sequence of tokens, names of its axes) -> [B, L, d].
Embed: TypeAlias = Callable[[jax.Array, Sequence[str]], jax.Array]


class Transformer(nn.Module):
  """A batch becomes hidden states; `logits` turns those into scores.

  Attributes:
    config: sizes and choices.
    vocabulary: the shared id space.
    row_length: tokens of the longest document that the model has seen, those of
      a row in training; 0 where it is not known.
  """

  config: TransformerConfig
  vocabulary: Vocabulary
  row_length: int = 0

  Config = TransformerConfig

  @property
  def vocab_size(self) -> int:
    """Number of ids V in the embedding and output tables."""
    return self.config.vocab_size or self.vocabulary.size

  @property
  def compute_dtype(self) -> Any:
    """Dtype of matmuls; parameters, norms and softmax stay float32."""
    name = self.config.compute_dtype
    if name == "auto":
      name = "float32" if target_platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)

  @nn.compact
  def __call__(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "B L d"]:
    """Hidden states after the final norm, in sequence order.

    Args:
      batch: rows of packed documents.
      train: whether dropout acts (needs the RNG stream "dropout").

    Raises:
      UserError: a batch without the layout the towers need.
    """
    inputs: Any = jax.tree.map(jnp.asarray, batch)
    return self._hidden(inputs, self._lookup(inputs.tokens), train=train)

  @nn.nowrap
  def _lookup(self, tokens: Int[Array, "B L"]) -> Embed:
    """How tokens enter: by their rows of the table."""
    return lambda table, names: lookup(table, tokens, self.compute_dtype, names)

  @nn.nowrap
  def _hidden(
    self, inputs: Any, enter: Embed, *, train: bool
  ) -> Float[Array, "B L d"]:
    """All between a batch (of jax arrays) that enters and its hidden states."""
    c = self.config
    towers = c.routed_towers
    embed: Any = self.param(
      "embed",
      nn.with_partitioning(fan_in(c.dim), (axes.VOCAB, axes.EMBED)),
      (self.vocab_size, c.dim),
      jnp.float32,
    )
    if not c.tie_embeddings:
      self.param(
        "unembed",
        nn.with_partitioning(fan_in(c.dim), (axes.EMBED, axes.VOCAB)),
        (c.dim, self.vocab_size),
        jnp.float32,
      )
    router = make_router(
      towers,
      inputs.layout,
      inputs.modality,
      c.dispatch,
      split=inputs.stored is not None,
    )
    context = Context(
      router,
      self._visibility(
        inputs.position, inputs.k_start, inputs.k_end, stored=inputs.stored
      ),
    )
    row = (axes.ACT_BATCH,)
    if inputs.stored is not None:
      row = (axes.ACT_BATCH, axes.ACT_LENGTH)
    stream = self._enter(enter(embed, row), router, row)
    blocks = {"block": functools.partial(Block, c)}
    stack = Stack(blocks, c.num_layers, c.remat, c.scan_unroll, name="stack")
    nn.share_scope(self, stack)
    stream = stack(stream, context, train=train)
    norm = RMSNorm(towers, c.dim, "final_norm", c.norm_eps, name="final_norm")
    return constrain(self._leave(stream, norm, router), row)

  def decoding_params(self, params: Any) -> dict[str, Any]:
    """Parameters as `step` takes them: layers apart, in the dtype it computes in.

    A step reads every matrix once; a slice of the stacked layers, or a cast,
    would write it first.

    Args:
      params: the model's parameters.
    """

    def cast(leaf: jax.Array) -> jax.Array:
      return leaf.astype(self.compute_dtype) if leaf.ndim > 1 else leaf

    layers = tuple(
      jax.tree.map(lambda leaf, i=i: cast(leaf[i]), params["layers"])
      for i in range(self.config.num_layers)
    )
    return {**jax.tree.map(cast, {**params, "layers": {}}), "layers": layers}

  def init_cache(self, rows: int, length: int) -> Cache:
    """An empty cache of keys and values, in the compute dtype.

    Args:
      rows: B.
      length: S, tokens that a row can hold.
    """
    c = self.config
    shape = (rows, c.kv_heads, length, c.width_of_head)
    return tuple(
      {"attention": {n: jnp.zeros(shape, self.compute_dtype) for n in "kv"}}
      for _ in range(c.num_layers)
    )

  def step(
    self,
    params: Any,
    tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    start: Int[Array, " B"],
    fresh: Int[Array, " B"],
    layout: Layout | None = None,
    layers: Sequence[int] = (),
  ) -> Decoded:
    """Runs some more tokens of each row against a cache: one document per row.

    Pure, of static shapes, and the same function for a prompt, for one token and
    for a draft. A cache keeps no length, so forgetting a row's last n tokens is
    a `start` that is smaller by n, and nothing else.

    Args:
      params: of `decoding_params`.
      tokens: ids, the new ones of each row first.
      cache: of `init_cache`, or of an earlier step.
      start: tokens of the row that the cache already holds.
      fresh: how many of `tokens` are new, 0..T; the others are padding.
      layout: of `tokens`, padding included, runs each tower on its own tokens
        (prompts). Without it each tower that occurs runs on all tokens, and a
        tower that does not occur is not read.
      layers: indices of layers whose output is returned too.
    """
    return self._decode(
      params,
      tokens,
      cache,
      self._lookup(tokens),
      start=start,
      fresh=fresh,
      layout=layout,
      layers=layers,
    )

  @nn.nowrap
  def _decode(
    self,
    params: Any,
    tokens: Int[Array, "B T"],
    cache: Cache,
    enter: Embed,
    *,
    start: Int[Array, " B"],
    fresh: Int[Array, " B"],
    layout: Layout | None = None,
    layers: Sequence[int] = (),
    k_end: Int[Array, "B T"] | None = None,
  ) -> Decoded:
    """`step`, with what enters, and one past the last key that each sees."""
    c, towers = self.config, self.config.routed_towers
    position = start[:, None] + jnp.arange(tokens.shape[1])
    real = jnp.arange(tokens.shape[1]) < fresh[:, None]
    modality = jnp.where(real, self.vocabulary.modality_of(tokens), 0)
    dispatch = "present" if layout is None else "layout"
    router = make_router(towers, layout, modality, dispatch, real=real)
    capacity = cache[0]["attention"]["k"].shape[2]
    visibility = self._visibility(
      position,
      jnp.zeros_like(position),
      jnp.where(real, position + 1 if k_end is None else k_end, 0),
      slot=jnp.where(real, position, capacity),
    )
    row = (axes.ACT_BATCH,)
    stream = self._enter(enter(params["embed"], row), router, row)
    block: Any = Block(c, parent=None)
    after, held = [], []
    for weights, kept in zip(params["layers"], cache, strict=True):
      stream, changed = block.apply(
        {"params": weights, "cache": kept},
        stream,
        Context(router, visibility),
        train=False,
        mutable=["cache"],
      )
      held.append(changed["cache"])
      after.append(stream)
    norm = RMSNorm(towers, c.dim, "final_norm", c.norm_eps, parent=None)
    normalise: Any = functools.partial(
      norm.apply, {"params": params["final_norm"]}
    )
    chosen = []
    for i in layers:
      x = router.leave(after[i]) if stays_routed(towers) else after[i]
      chosen.append(x[0])
    return Decoded(
      self._leave(stream, normalise, router), tuple(chosen), tuple(held)
    )

  def _visibility(
    self,
    position: Int[Array, "B L"],
    k_start: Int[Array, "B L"],
    k_end: Int[Array, "B L"],
    slot: Int[Array, "B L"] | None = None,
    stored: Int[Array, "B L"] | None = None,
  ) -> Visibility:
    """What queries at these positions see, and how they are rotated."""
    c = self.config
    frequency = c.rope_scaling.frequencies(c.width_of_head, c.rope_base)
    angles = rotary_angles(position, frequency)
    visibility = visibility_of(k_start, k_end, angles, slot, stored)
    size = c.rope_scaling.magnitude
    if size == 1:
      return visibility
    cos, sin = visibility.cos * size, visibility.sin * size
    return dataclasses.replace(visibility, cos=cos, sin=sin)

  def _enter(
    self, entering: jax.Array, router: Router, row: Sequence[str]
  ) -> Routed:
    """What enters to the stream of the first layer; `row` names its axes."""
    stream = (constrain(entering, row),)
    return (
      router.enter(stream)
      if stays_routed(self.config.routed_towers)
      else stream
    )

  def _leave(
    self,
    stream: Routed,
    norm: Callable[[Routed, Router], Routed],
    router: Router,
  ) -> jax.Array:
    """The stream of the last layer to hidden states in sequence order."""
    towers = self.config.routed_towers
    if towers.routes("final_norm") and not stays_routed(towers):
      stream = router.enter(stream)
    stream = norm(stream, router)
    if towers.routes("final_norm") or stays_routed(towers):
      stream = router.leave(stream)
    return stream[0]

  def unembedding(self, params: Any) -> Float[Array, "d V"]:
    """The output table, float32; hidden states times it are the logits.

    Args:
      params: the model's parameters.
    """
    return (
      params["embed"].T if self.config.tie_embeddings else params["unembed"]
    )

  def logits(
    self, params: Any, hidden: Float[Array, "*s d"]
  ) -> Float[Array, "*s V"]:
    """Scores of every id, float32.

    Args:
      params: the model's parameters.
      hidden: what `apply` returned, or some positions of it.
    """
    return jnp.matmul(
      hidden,
      self.unembedding(params).astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  def init_params(self, key: jax.Array) -> dict[str, Any]:
    """Draws the parameters; float32, works under jit and eval_shape.

    Args:
      key: a `jax.random.key`.
    """
    return nn.unbox(self._init(key))

  def param_axes(self) -> dict[str, Any]:
    """The parameter tree with the tuple of axis names of each leaf."""
    return _boxed(lambda leaf: tuple(leaf.names), self)

  def abstract_params(self) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`; nothing is allocated."""
    return _boxed(lambda leaf: leaf.value, self)

  def _init(self, key: jax.Array) -> Any:
    # Parameters do not depend on a kernel, which may be another machine's.
    plain = dataclasses.replace(self.config, attention="reference")
    model = self.clone(config=plain)
    return model.init(key, self._smallest_batch())["params"]

  def _smallest_batch(self) -> Batch:
    """One row with a place for every tower: shapes do not depend on it."""
    towers = self.config.routed_towers
    ids = jnp.zeros((1, towers.count), jnp.int32)
    layout = None
    if towers.count > 1:
      layout = make_layout(
        ids,
        ids > 0,
        towers=towers.of_modality,
        counts=(1,) * towers.count,
        group_rows=1,
      )
    weight = jnp.zeros(ids.shape, jnp.float32)
    return Batch(ids, ids, ids, ids, ids, ids, ids, weight, layout)


@functools.cache
def _described(model: Any) -> Any:
  # Models are equal by value. Tracing the initialisation takes longer than all
  # else that a start does before it compiles, so it is done once.
  return jax.eval_shape(model._init, jax.random.key(0))


def _boxed(f: Callable[[Any], Any], model: Transformer) -> dict[str, Any]:
  """Maps the described parameters, each with its axes' names."""
  described: Any = _described
  return jax.tree.map(
    f, described(model), is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )


def build_model(
  config: TransformerConfig, vocabulary: Vocabulary, row_length: int = 0
) -> Transformer:
  """Builds the model that `config.kind` names for a vocabulary.

  Args:
    config: sizes and choices.
    vocabulary: the shared id space.
    row_length: tokens of a row in training; 0 where it is not known.

  Raises:
    UserError: modalities that the vocabulary does not have in this order, or
      fewer ids than it needs.
  """
  from fusionlab.models import MODELS

  if config.modalities != vocabulary.modalities:
    raise UserError(
      f"config.model.modalities={config.modalities} but the tokenizers make"
      f" {vocabulary.modalities}, in this order"
    )
  if config.vocab_size and config.vocab_size < vocabulary.size:
    raise UserError(
      f"config.model.vocab_size={config.vocab_size} is less than the"
      f" {vocabulary.size} ids of the tokenizers; 0 takes theirs"
    )
  build = MODELS.load(config.kind)
  return build(config, vocabulary, config.longest(row_length))
