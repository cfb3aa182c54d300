"""The one error a user is meant to read, and the nearest valid name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """Bad input, said in one line: what was given, what is allowed, what to do.

  The command line prints the message without a traceback and exits with 2
  (`--debug` shows the traceback). Library users may catch it.
  """


class ConfigError(UserError):
  """A key, type or value of a configuration that is not allowed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
  """Returns ", did you mean 'x'?" for the closest allowed name.

  Args:
    name: what was given.
    allowed: the names that exist.

  Returns:
    A clause to append to a message; where nothing is close, the allowed names.
  """
  allowed = sorted(allowed)
  close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
  if close:
    return ", did you mean " + " or ".join(repr(c) for c in close) + "?"
  shown = ", ".join(allowed[:20]) + (", …" if len(allowed) > 20 else "")
  return f" (allowed: {shown or 'none'})"
