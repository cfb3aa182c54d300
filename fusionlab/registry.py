"""Kinds by name: a registered word, or `package.module:Class` from outside."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, cast

from fusionlab.errors import UserError, nearest


class Registry:
  """Maps the word in `config.<noun>.kind` to the object that implements it.

  Entries are `"module:attribute"` strings, imported when first asked for, so a
  registry costs nothing to import and nobody has to fork to add a kind.

  Attributes:
    noun: what is registered, for messages ("model", "source", …).
    entries: registered name -> "module:attribute".
  """

  def __init__(self, noun: str, entries: Mapping[str, str]):
    self.noun = noun
    self.entries = dict(entries)

  def config_class(self, kind: str) -> type:
    """Returns the dataclass of a kind's settings, its attribute `Config`.

    Raises:
      UserError: see `load`; or an object without one.
    """
    config = getattr(self.load(kind), "Config", None)
    if not dataclasses.is_dataclass(config):
      raise UserError(
        f"{self.noun} kind {kind!r} has no settings: give the class a dataclass"
        f" as its attribute Config"
      )
    return cast(type, config)

  def load(self, kind: str) -> Any:
    """Returns the object behind `kind`.

    Args:
      kind: a registered name or `package.module:Class`.

    Raises:
      UserError: an unknown name, a module that cannot be imported, or an
        attribute that the module does not have.
    """
    target = self.entries.get(kind, kind)
    module_name, colon, attribute = target.partition(":")
    if not colon:
      raise UserError(
        f"unknown {self.noun} kind {kind!r}{nearest(kind, self.entries)}"
        f" A kind of your own is written package.module:Class."
      )
    try:
      module = importlib.import_module(module_name)
    except Exception as error:  # whatever running a user's file may raise
      if kind in self.entries:
        raise  # ours: a package to install, or a bug
      raise UserError(
        f"{self.noun} kind {kind!r}: cannot import {module_name!r} ({error});"
        f" is its package installed and on PYTHONPATH?"
      ) from error
    try:
      return getattr(module, attribute)
    except AttributeError:
      raise UserError(
        f"{self.noun} kind {kind!r}: {module_name} has no {attribute!r}"
        f"{nearest(attribute, vars(module))}"
      ) from None
