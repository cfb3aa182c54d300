"""The run-time type checker behind jaxtyping's import hook."""

from collections.abc import Callable

import beartype

# PEP 484: an int serves where a float is asked for.
_CONF = beartype.BeartypeConf(is_pep484_tower=True)


def check(function: Callable) -> Callable:
  """Checks a function's annotations, shapes included, at every call.

  The constructors of dataclasses are left alone: JAX rebuilds a pytree with
  whatever stands for its arrays at the time (shapes, shardings, nothing).
  """
  if function.__name__ == "__init__":
    return function
  return beartype.beartype(conf=_CONF)(function)
