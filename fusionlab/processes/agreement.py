"""What all processes must see alike goes through process 0.

By the coordination service, not by the devices: a wait may be as long as a
preparation of data, and a process may come late to it.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from fusionlab.errors import UserError
from fusionlab.processes.peers import client, is_first

T = TypeVar("T")
_MISSING = "(absent)"
_turns = itertools.count()


def from_first(make: Callable[[], T]) -> T:
  """What process 0 makes, on all processes.

  The others wait for it as long as it takes; where it raises, `peers` ends them.
  All processes must call this in the same order.

  Args:
    make: called by process 0 only; what it returns must survive JSON.
  """
  service = client()
  if service is None:
    return make()
  key = f"fusionlab/agreed/{next(_turns)}"
  if is_first():
    made = make()
    service.key_value_set(key, json.dumps(made))
    return made
  while True:
    try:
      # In slices, between which Python sees its signals.
      return json.loads(service.blocking_key_value_get(key, 10_000))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def agree(what: str, mine: Mapping[str, Any]) -> None:
  """Compares what this process has with what process 0 has.

  Args:
    what: for the message.
    mine: flat, JSON-ready.

  Raises:
    UserError: the first thing that differs, on a process where it does.
  """
  first = from_first(lambda: dict(mine))
  own = json.loads(json.dumps(dict(mine)))
  for key in sorted(first.keys() | own.keys()):
    here, there = own.get(key, _MISSING), first.get(key, _MISSING)
    if here != there:
      raise UserError(
        f"this process has another {what} than process 0:"
        f" {key} is {here!r} here and {there!r} there"
      )
