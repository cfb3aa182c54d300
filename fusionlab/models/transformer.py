"""The decoder of every comparison: dense, or with towers, one code.

Llama-style: RMSNorm, SwiGLU, rotary positions within the document, no biases;
Chameleon's QK-norm and choice of norm placement (arXiv 2405.09818, §2.3). With
`untie` and `towers` it is Mixture-of-Transformers (`mixture_of_transformers`).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionlab.batch import Batch, Vocabulary
from fusionlab.config import option
from fusionlab.errors import ConfigError, UserError
from fusionlab.nn.attention import Attention, Visibility, visibility_of
from fusionlab.nn.feed_forward import FeedForward, swiglu_width
from fusionlab.nn.functional.rotary import rotary_angles
from fusionlab.nn.norms import RMSNorm
from fusionlab.nn.parameters import fan_in
from fusionlab.nn.stack import Stack
from fusionlab.routing import Routed, Router, Towers, make_layout, make_router
from fusionlab.sharding import axes
from fusionlab.sharding.rules import constrain
from kernels_pallas.attention.api import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """`config.model`: a Llama-style decoder with towers.

  Defaults are the dense control: `untie=''`.
  """

  kind: str = option("transformer", "registered model or package.module:Class")
  modalities: tuple[str, ...] = option(
    ("text", "image"), "names; the index is the modality id"
  )
  towers: tuple[int, ...] = option(
    (0, 1),
    "tower of each modality: (0, 1) MoT, (0, 1, 1) leave-one-out, …",
    minimum=0,
  )
  untie: str = option("", "parameters that are per tower, by name; '' is dense")
  dim: int = option(192, "model width d", minimum=2)
  num_layers: int = option(4, "layers", minimum=1)
  num_heads: int = option(6, "query heads", minimum=1)
  num_kv_heads: int = option(0, "key-value heads; 0: num_heads", minimum=0)
  head_dim: int = option(0, "width of a head; 0: dim / num_heads", minimum=0)
  ffn_dim: int = option(
    0, "SwiGLU width F; 0: 256·ceil(⌊8d/3⌋/256), the Llama rule", minimum=0
  )
  vocab_size: int = option(
    0, "ids in all; 0: what the tokenizers have", minimum=0
  )
  norm_placement: str = option(
    "swin",
    "norm before the sub-layer, or on its output",
    choices=("pre", "swin"),
  )
  norm_eps: float = option(1e-5, "added to the mean square", minimum=1e-12)
  qk_norm: str = option(
    "rms",
    "norm of queries and keys over a head",
    choices=("none", "rms", "layer"),
  )
  rope_base: float = option(
    10000.0, "base of the rotary frequencies", minimum=1.0
  )
  dropout: float = option(
    0.0,
    "dropout after attention and FFN (Chameleon-7B: 0.1)",
    minimum=0.0,
    maximum=0.99,
  )
  tie_embeddings: bool = option(False, "one table for input and output")
  causal: bool = option(
    True,
    "promise that a token sees its own document up to itself, which attention"
    " may use; False where the batch has other intervals (spans that see"
    " themselves whole, windows)",
  )
  dispatch: str = option(
    "layout",
    "how a token meets its tower",
    choices=("layout", "ragged", "select"),
  )
  attention: str = option(
    "auto",
    "implementation of attention, by name",
    choices=("auto", *IMPLEMENTATIONS),
  )
  remat: str = option(
    "none",
    "what the backward pass recomputes: none, full (everything), dots"
    " (all but matmuls), dots_no_batch",
    choices=("none", "full", "dots", "dots_no_batch"),
  )
  scan_unroll: int = option(1, "layers unrolled per scan step", minimum=1)
  compute_dtype: str = option(
    "auto",
    "auto: bfloat16 on accelerators, float32 on CPU",
    choices=("auto", "float32", "bfloat16"),
  )

  @property
  def kv_heads(self) -> int:
    """Number of key-value heads G."""
    return self.num_kv_heads or self.num_heads

  @property
  def width_of_head(self) -> int:
    """Width of a head D."""
    return self.head_dim or self.dim // self.num_heads

  @property
  def width_of_ffn(self) -> int:
    """SwiGLU hidden width F."""
    return self.ffn_dim or swiglu_width(self.dim)

  def forward_flops_per_token(self, vocab_size: int, row_length: int) -> float:
    """Model FLOPs of one token's forward pass; a multiply-add is two.

    Causal attention counts half of the scores; remat, padding and the moves of
    routing count nothing. The cost does not depend on `towers` or `untie`.

    Args:
      vocab_size: ids V; `vocab_size` of the config overrides it.
      row_length: tokens L over which attention looks.
    """
    d, dh = self.dim, self.width_of_head
    seen = row_length / 2 if self.causal else row_length
    projections = 2 * d * dh * (2 * self.num_heads + 2 * self.kv_heads)
    scores_and_values = 2 * 2 * seen * self.num_heads * dh
    ffn = 2 * 3 * d * self.width_of_ffn
    head = 2 * d * (self.vocab_size or vocab_size)
    return self.num_layers * (projections + scores_and_values + ffn) + head

  @property
  def routed_towers(self) -> Towers:
    """The towers as the model runs them (one where nothing is untied)."""
    return Towers.parse(self.modalities, self.towers, self.untie)

  def check(self, path: str) -> None:
    """Raises ConfigError or UserError where sizes or names do not agree."""
    del path
    _ = self.routed_towers
    if not self.head_dim and self.dim % self.num_heads:
      raise ConfigError(
        f"config.model.dim={self.dim} is not a multiple of"
        f" config.model.num_heads={self.num_heads}; set config.model.head_dim"
      )
    if self.width_of_head % 2:
      raise ConfigError(
        f"the width of a head is {self.width_of_head}; rotary positions need an"
        f" even one (config.model.head_dim)"
      )
    if self.num_heads % self.kv_heads:
      raise ConfigError(
        f"config.model.num_heads={self.num_heads} is not a multiple of"
        f" config.model.num_kv_heads={self.kv_heads}"
      )


@flax.struct.dataclass
class Context:
  """Constants of the scan over layers."""

  router: Router
  visibility: Visibility


class Block(nn.Module):
  """One layer; h = x + Attn, y = h + FFN, normed before or on the output.

  Swin placement: h = x + norm(Attn(x)) (MoT Algorithm 1; Chameleon-34B); pre:
  h = x + Attn(norm(x)) (Llama; Chameleon-7B).
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
    self, stream: Routed, context: Context, *, train: bool
  ) -> Routed:
    """Maps the stream `[..., d]`; dropout acts where `train`."""
    c, router = self.config, context.router
    towers = c.routed_towers
    # Depth scaling keeps the variance of a pre-norm residual stream; Swin norms
    # set each sub-layer's output to unit scale whatever its weights.
    out_scale = (2 * c.num_layers) ** -0.5 if c.norm_placement == "pre" else 1.0
    mixer = functools.partial(
      Attention(
        towers,
        c.dim,
        c.num_heads,
        c.kv_heads,
        c.width_of_head,
        c.qk_norm,
        c.norm_eps,
        out_scale,
        c.attention,
        c.causal,
        name="attention",
      ),
      router=router,
      visibility=context.visibility,
    )
    ffn = functools.partial(
      FeedForward(towers, c.dim, c.width_of_ffn, out_scale, name="ffn"),
      router=router,
    )
    dropout = nn.Dropout(c.dropout, deterministic=not train)
    stays = stays_routed(towers)
    for name, sublayer, routes in (
      ("mixer_norm", mixer, _mixer_routes(towers)),
      ("ffn_norm", ffn, _ffn_routes(towers)),
    ):
      norm = RMSNorm(towers, c.dim, name, c.norm_eps, name=name)
      moves = routes and not stays
      x = router.enter(stream) if moves else stream
      if c.norm_placement == "pre":
        x = sublayer(norm(x, router))
      else:
        x = norm(sublayer(x), router)
      x = tuple(dropout(a) for a in x)
      if moves:
        x = router.leave(x)
      stream = tuple(a + b for a, b in zip(stream, x, strict=True))
    return stream


def _mixer_routes(towers: Towers) -> bool:
  return towers.routes("q", "k", "v", "o", "qk_norm", "mixer_norm")


def _ffn_routes(towers: Towers) -> bool:
  return towers.routes("ffn", "ffn_norm")


def stays_routed(towers: Towers) -> bool:
  """Whether the residual stream is kept per tower.

  It is where both sub-layers route; where one does (`ffn` alone), the stream
  keeps sequence order and only that sub-layer's input and output move.
  """
  return _mixer_routes(towers) and _ffn_routes(towers)


class Transformer(nn.Module):
  """A batch becomes hidden states; `logits` turns those into scores.

  Attributes:
    config: sizes and choices.
    vocabulary: the shared id space.
  """

  config: TransformerConfig
  vocabulary: Vocabulary

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
      name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
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
    c = self.config
    towers = c.routed_towers
    inputs: Any = jax.tree.map(jnp.asarray, batch)
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
    router = make_router(towers, inputs.layout, inputs.modality, c.dispatch)
    angles = rotary_angles(
      inputs.position, head_dim=c.width_of_head, base=c.rope_base
    )
    context = Context(
      router, visibility_of(inputs.k_start, inputs.k_end, angles)
    )
    # Looked up before the cast: the gradient of a frequent id is a long sum,
    # which bfloat16 cannot hold.
    x = embed[inputs.tokens].astype(self.compute_dtype)
    stream = (constrain(x, (axes.ACT_BATCH,)),)
    if stays_routed(towers):
      stream = router.enter(stream)
    blocks = {"block": functools.partial(Block, c)}
    stack = Stack(blocks, c.num_layers, c.remat, c.scan_unroll, name="stack")
    nn.share_scope(self, stack)
    stream = stack(stream, context, train=train)
    norm = RMSNorm(towers, c.dim, "final_norm", c.norm_eps, name="final_norm")
    if towers.routes("final_norm") and not stays_routed(towers):
      stream = router.enter(stream)
    stream = norm(stream, router)
    if towers.routes("final_norm") or stays_routed(towers):
      stream = router.leave(stream)
    return constrain(stream[0], (axes.ACT_BATCH,))

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
    boxed = jax.eval_shape(self._init, jax.random.key(0))
    return jax.tree.map(
      lambda leaf: tuple(leaf.names),
      boxed,
      is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )

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


def build_model(
  config: TransformerConfig, vocabulary: Vocabulary
) -> Transformer:
  """Builds the model that `config.kind` names for a vocabulary.

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
  return MODELS.load(config.kind)(config, vocabulary)
