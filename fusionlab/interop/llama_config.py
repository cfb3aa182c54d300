"""Keys of a Llama's config.json: to our config and back.

Keys that a file lacks have the defaults of Hugging Face's `LlamaConfig`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

from fusionlab.config import from_mapping
from fusionlab.errors import ConfigError, UserError
from fusionlab.interop.llama import Specials
from fusionlab.models.config import RopeScaling, TransformerConfig

# Keys whose other values are other models, with what each may be.
_ONLY: Mapping[str, tuple[Any, ...]] = {
  "model_type": ("llama",),
  "hidden_act": ("silu",),
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "sliding_window": (None,),
  "partial_rotary_factor": (None, 1.0),
  "quantization_config": (None,),
}
_SCALINGS = ("default", "linear", "llama3", "yarn")


def read_config(
  given: Mapping[str, Any], origin: str
) -> tuple[TransformerConfig, int, int, Specials]:
  """The dense model that a config.json describes.

  Args:
    given: its content.
    origin: its path, for messages.

  Returns:
    The model's config, the number of ids V, the longest document's tokens, and
    the ids of documents.

  Raises:
    UserError: a key that is missing, of a wrong type, or that means another
      model: what was given and what may be.
  """
  for key, allowed in _ONLY.items():
    value = given.get(key, allowed[0] if key != "model_type" else None)
    if value not in allowed:
      names = " or ".join(repr(a) for a in allowed)
      raise UserError(
        f"{origin}: {key}={value!r} is not supported; only {names}"
      )
  layers = given.get("layer_types") or ()
  other = next((kind for kind in layers if kind != "full_attention"), None)
  if other is not None:
    raise UserError(
      f"{origin}: layer_types has {other!r}, which is not supported; only"
      f" 'full_attention'"
    )
  keys = _Keys(given, origin)
  dim, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
  max_position = keys.integer("max_position_embeddings", 2048)
  base, scaling = _rope(given, keys, max_position)
  mapping = {
    "kind": "transformer",
    "modalities": ("text",),
    "towers": (0,),
    "untie": "",
    "dim": dim,
    "num_layers": keys.integer("num_hidden_layers"),
    "num_heads": heads,
    "num_kv_heads": keys.integer("num_key_value_heads", heads),
    "head_dim": keys.integer("head_dim", dim // heads),
    "ffn_dim": keys.integer("intermediate_size"),
    "norm_placement": "pre",
    "norm_eps": keys.number("rms_norm_eps", 1e-6),
    "qk_norm": "none",
    "rope_base": base,
    "rope_scaling": scaling,
    "tie_embeddings": keys.boolean("tie_word_embeddings", default=False),
  }
  try:
    config = from_mapping(TransformerConfig, mapping, "config.model")
  except ConfigError as error:
    raise UserError(f"{origin} describes no model of ours: {error}") from error
  specials = Specials(
    keys.id("bos_token_id", 1),
    keys.id("eos_token_id", 2),
    keys.id("pad_token_id"),
  )
  return config, keys.integer("vocab_size"), max_position, specials


def write_config(
  config: TransformerConfig,
  *,
  vocab_size: int,
  max_position: int,
  specials: Specials,
  dtype: str,
) -> dict[str, Any]:
  """The config.json of a dense model or of one tower.

  Both spellings of the rotary keys are written: programs older and newer than
  `rope_parameters` read the one that they know.

  Args:
    config: the model's.
    vocab_size: ids V.
    max_position: tokens of the longest document.
    specials: ids of documents.
    dtype: of the tensors.

  Raises:
    UserError: something of the model that a Llama cannot be.
  """
  for key, value, only in (
    ("norm_placement", config.norm_placement, "pre"),
    ("qk_norm", config.qk_norm, "none"),
  ):
    if value != only:
      raise UserError(
        f"a Llama cannot hold config.model.{key}={value!r}; only {only!r} can"
        f" be exported"
      )
  scaling = _scaling_keys(config.rope_scaling)
  rope = {"rope_theta": config.rope_base, "rope_type": "default"}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": vocab_size,
    "hidden_size": config.dim,
    "intermediate_size": config.width_of_ffn,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.width_of_head,
    "hidden_act": "silu",
    "max_position_embeddings": max_position,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_base,
    "rope_scaling": scaling or None,
    "rope_parameters": rope | scaling,
    "tie_word_embeddings": config.tie_embeddings,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "bos_token_id": specials.bos,
    "eos_token_id": specials.eos,
    "pad_token_id": specials.pad,
    "dtype": dtype,
    "torch_dtype": dtype,
    "use_cache": True,
  }


def _rope(
  given: Mapping[str, Any], keys: "_Keys", max_position: int
) -> tuple[float, dict[str, Any]]:
  """Base and scaling, of the old keys or the new one."""
  section = given.get("rope_scaling") or given.get("rope_parameters") or {}
  where = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
  if not isinstance(section, Mapping):
    raise UserError(f"{keys.origin}: {where}={section!r} must be an object")
  rope = _Keys(section, keys.origin, f"{where}.")
  base = rope.number("rope_theta", keys.number("rope_theta", 10000.0))
  if section.get("partial_rotary_factor", 1.0) not in (None, 1.0):
    raise UserError(
      f"{keys.origin}: {where}.partial_rotary_factor="
      f"{section['partial_rotary_factor']!r} is not supported; only 1.0"
    )
  kind = section.get("rope_type", section.get("type", "default"))
  if kind not in _SCALINGS:
    raise UserError(
      f"{keys.origin}: {where}.rope_type={kind!r} is not supported; only"
      f" {', '.join(map(repr, _SCALINGS))}"
    )
  if kind == "default":
    return base, {"kind": "none"}
  before = keys.integer("original_max_position_embeddings", 0, minimum=0)
  before = before or rope.integer(
    "original_max_position_embeddings", max_position
  )
  if kind == "linear":
    return base, {"kind": kind, "factor": rope.number("factor")}
  if kind == "llama3":
    return base, {
      "kind": kind,
      "factor": rope.number("factor"),
      "original_max_position": before,
      "low_freq_factor": rope.number("low_freq_factor"),
      "high_freq_factor": rope.number("high_freq_factor"),
    }
  factor = rope.number("factor", max_position / before)
  scales = [rope.number(k, 0.0) for k in ("mscale", "mscale_all_dim")]
  magnitude = rope.number("attention_factor", 0.0)
  if not magnitude and all(scales):
    # Both scale the logarithm in the paper's magnitude.
    logarithm = RopeScaling(kind="yarn", factor=factor).magnitude - 1
    magnitude = (1 + scales[0] * logarithm) / (1 + scales[1] * logarithm)
  return base, {
    "kind": kind,
    "factor": factor,
    "original_max_position": before,
    "beta_fast": rope.number("beta_fast", 32.0) or 32.0,
    "beta_slow": rope.number("beta_slow", 1.0) or 1.0,
    "attention_factor": magnitude,
    "truncate": rope.boolean("truncate", default=True),
  }


def _scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
  """The keys of `rope_scaling`; none where nothing is scaled."""
  if scaling.kind == "none":
    return {}
  keys: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "linear":
    return keys
  keys["original_max_position_embeddings"] = scaling.original_max_position
  if scaling.kind == "llama3":
    return keys | {
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
    }
  return keys | {
    "beta_fast": scaling.beta_fast,
    "beta_slow": scaling.beta_slow,
    "attention_factor": scaling.magnitude,
    "truncate": scaling.truncate,
  }


@dataclasses.dataclass(frozen=True)
class _Keys:
  """Typed reading of a JSON object; null is absent, no default is required."""

  given: Mapping[str, Any]
  origin: str
  prefix: str = ""

  def integer(
    self, key: str, default: int | None = None, minimum: int = 1
  ) -> int:
    value = self._value(key, default)
    if type(value) is not int or value < minimum:
      self._wrong(key, value, f"a whole number of at least {minimum}")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    value = self._value(key, default)
    if type(value) not in (int, float):
      self._wrong(key, value, "a number")
    return float(value)

  def boolean(self, key: str, *, default: bool) -> bool:
    value = self._value(key, default)
    if type(value) is not bool:
      self._wrong(key, value, "true or false")
    return value

  def id(self, key: str, default: int | None = None) -> int | None:
    """A special id; of several the first. Null is a model without one."""
    value = self.given.get(key, default)
    first = value[0] if isinstance(value, list) and value else value
    if first is None:
      return None
    if not isinstance(first, int):
      self._wrong(key, value, "an id, a list of ids or null")
    # Some configs say -1 for none.
    return first if first >= 0 else None

  def _value(self, key: str, default: Any) -> Any:
    value = self.given.get(key)
    if value is None:
      value = default
    if value is None:
      raise UserError(f"{self.origin}: the key {self.prefix}{key} is missing")
    return value

  def _wrong(self, key: str, value: Any, what: str) -> NoReturn:
    raise UserError(
      f"{self.origin}: {self.prefix}{key}={value!r} must be {what}"
    )
