"""Towers: which parameters a modality has of its own.

Source: Mixture-of-Transformers (arXiv 2411.04996), Eq. 1-3: all of them; MoMa
(arXiv 2407.21770), "1t1i": the feed-forward ones.
"""

import dataclasses
import math
from collections.abc import Sequence

from fusionlab.errors import ConfigError, UserError, nearest

# Parameters that no tower has of its own.
SHARED = "shared"
# What a new tower starts as where it copies none.
DRAWN = "random"

UNTIE_NAMES = (
  "q", "k", "v", "o", "qk_norm", "mixer_norm", "ffn", "ffn_norm", "final_norm",
)  # fmt: skip


def parse_untie(untie: str) -> frozenset[str]:
  """Splits the string of untied parameter names.

  Args:
    untie: any subset of `UNTIE_NAMES`, separated by spaces; '' unties nothing.

  Raises:
    UserError: an unknown name, with the nearest ones.
  """
  names = untie.split()
  for name in names:
    if name not in UNTIE_NAMES:
      raise UserError(
        f"config.model.untie has an unknown name"
        f" {name!r}{nearest(name, UNTIE_NAMES)}"
      )
  return frozenset(names)


def tower_names(
  modalities: Sequence[str], towers: Sequence[int]
) -> tuple[str, ...]:
  """Names each tower by the modalities that share it ('image+speech').

  Args:
    modalities: names, in order of modality id.
    towers: tower of each modality; towers are numbered 0..T-1, all in use.

  Raises:
    UserError: lengths that differ, or a tower without a modality.
  """
  if len(modalities) != len(towers):
    raise UserError(
      f"config.model.towers={tuple(towers)} has {len(towers)} entries for the"
      f" {len(modalities)} modalities {tuple(modalities)}: give one tower each"
    )
  if sorted(set(towers)) != list(range(max(towers) + 1)):
    raise UserError(
      f"config.model.towers={tuple(towers)} must number the towers from 0"
      f" without a gap, e.g. {tuple(range(len(towers)))}"
    )
  return tuple(
    "+".join(m for m, t in zip(modalities, towers, strict=True) if t == k)
    for k in range(max(towers) + 1)
  )


def tower_counts(
  modality_counts: Sequence[int], towers: Sequence[int]
) -> tuple[int, ...]:
  """Sums places per modality into places per tower."""
  return tuple(
    sum(c for c, t in zip(modality_counts, towers, strict=True) if t == k)
    for k in range(max(towers) + 1)
  )


@dataclasses.dataclass(frozen=True)
class Towers:
  """Which tower each modality has, and which parameters are per tower.

  Attributes:
    names: of the towers; ("shared",) where there is one.
    of_modality: tower of each modality.
    untied: names out of `UNTIE_NAMES`; empty where there is one tower.
    owners: per modality, whose are the parameters that are its own whatever is
      untied: its ids' rows of the tables, and the patches that a continuous one
      enters and leaves by. Its tower; in a dense model the modality itself.
  """

  names: tuple[str, ...]
  of_modality: tuple[int, ...]
  untied: frozenset[str]
  owners: tuple[str, ...]

  @classmethod
  def parse(
    cls, modalities: Sequence[str], towers: Sequence[int], untie: str
  ) -> "Towers":
    """Reads `config.model.{modalities,towers,untie}`.

    One tower, or nothing untied, is the dense model: no layout, no move.

    Raises:
      UserError: see `tower_names` and `parse_untie`.
    """
    names = tower_names(modalities, towers)
    untied = parse_untie(untie)
    if len(names) == 1 or not untied:
      return cls((SHARED,), (0,) * len(towers), frozenset(), tuple(modalities))
    owners = tuple(names[k] for k in towers)
    return cls(names, tuple(towers), untied, owners)

  @property
  def count(self) -> int:
    """Number of towers."""
    return len(self.names)

  @property
  def groups(self) -> tuple[str, ...]:
    """Names that parameters may be chosen by: who has some, then `SHARED`."""
    own = dict.fromkeys((*self.names, *self.owners))
    return (*(name for name in own if name != SHARED), SHARED)

  def leaves(self, name: str) -> tuple[str, ...]:
    """Tree names under which the parameter `name` is kept."""
    return self.names if name in self.untied else (SHARED,)

  def routes(self, *names: str) -> bool:
    """Whether a sub-layer with these parameters works in routed order."""
    return not self.untied.isdisjoint(names)


def tower_of(path: Sequence[str], towers: Towers) -> str:
  """Group whose parameter a path of the tree is; `SHARED` where it is nobody's.

  Args:
    path: keys, e.g. ("layers", "ffn", "image", "w_in").
    towers: of the model.
  """
  return next((key for key in path[:-1] if key in towers.groups), SHARED)


def parse_towers(text: str, towers: Towers, key: str) -> list[str]:
  """Reads a string of tower names.

  Args:
    text: names separated by spaces; '' is none.
    towers: of the model, whose `groups` they are.
    key: of the config, for messages.

  Raises:
    ConfigError: a name that the model does not have, with the nearest, or one
      given twice.
  """
  return [name for name, _ in _entries(text, towers, key, valued=False)]


def parse_by_tower(text: str, towers: Towers, key: str) -> dict[str, float]:
  """Reads a number for some towers, such as 'text:0.1 image:1'.

  Args:
    text: tower:number, separated by spaces; '' is none.
    towers: of the model, whose `groups` they are.
    key: of the config, for messages.

  Raises:
    ConfigError: a name that the model does not have, with the nearest, one given
      twice, or a number that is none or negative.
  """
  numbers = {}
  for name, value in _entries(text, towers, key, valued=True):
    try:
      numbers[name] = float(value)
    except ValueError:
      numbers[name] = math.nan
    if not 0 <= numbers[name] < math.inf:
      raise ConfigError(
        f"config.{key}={text!r}: {value!r} is not a number from 0; write e.g."
        f" '{name}:0.1'"
      )
  return numbers


def parse_copies(
  text: str, towers: Towers, key: str, *, drawn: bool = False
) -> dict[str, str]:
  """Reads which tower starts as a copy of which, such as 'speech:text'.

  Args:
    text: new:old, separated by spaces; '' is none.
    towers: of the model.
    key: of the config, for messages.
    drawn: whether 'new:random' is allowed.

  Raises:
    ConfigError: not of this form, a tower that the model does not have, or a
      copy of what is itself a copy.
  """
  pairs: dict[str, str] = {}
  where = f"config.{key}={text!r}"
  own = towers.groups[:-1]
  sources = (*own, *((DRAWN,) if drawn else ()))
  for word in text.split():
    name, _, source = word.partition(":")
    if not (name and source):
      raise ConfigError(f"{where}: {word!r} is not of the form 'speech:text'")
    for tower, known in ((name, own), (source, sources)):
      if tower not in known:
        raise ConfigError(
          f"{where}: the model has no tower {tower!r}{nearest(tower, known)};"
          f" it has {', '.join(own)}"
        )
    if name == source or name in pairs:
      raise ConfigError(f"{where} names {name!r} twice")
    pairs[name] = source
  for name, source in pairs.items():
    if source in pairs:
      raise ConfigError(
        f"{where}: {name!r} copies {source!r}, which is itself new; copy what is"
        f" there"
      )
  return pairs


def _entries(
  text: str, towers: Towers, key: str, *, valued: bool
) -> list[tuple[str, str]]:
  known = towers.groups
  found: dict[str, str] = {}
  for word in text.split():
    name, colon, value = word.partition(":")
    if name not in known:
      raise ConfigError(
        f"config.{key}={text!r}: the model has no tower"
        f" {name!r}{nearest(name, known)}; it has {', '.join(known)}"
      )
    if bool(colon) != valued:
      example = f"{name}:0.1" if valued else name
      raise ConfigError(
        f"config.{key}={text!r}: {word!r} is not of the form {example!r}"
      )
    if name in found:
      raise ConfigError(f"config.{key}={text!r} names {name!r} twice")
    found[name] = value
  return list(found.items())
