"""SIGTERM and SIGINT: asked politely, a run saves and leaves."""

import signal
import threading
from types import FrameType
from typing import Any


class Preempted(BaseException):
  """Raised by a signal while there is nothing of the run to save yet.

  As KeyboardInterrupt is, so that no `except Exception` on the way keeps it.
  """


class Signals:
  """Within this context, SIGTERM and the first SIGINT ask the run to end.

  Before `defer` they raise `Preempted` where the process stands (preparation
  and compilation have nothing to save); after it they are only noted, and the
  loop looks between two steps. A second SIGINT raises KeyboardInterrupt. In a
  thread that is not the main one nothing is installed.

  Attributes:
    reason: 'SIGTERM' or 'SIGINT' once it came; '' before.
  """

  def __init__(self):
    self.reason = ""
    self._deferred = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def defer(self) -> None:
    """From now on, note signals instead of raising."""
    self._deferred = True

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.reason and number == signal.SIGINT:
      raise KeyboardInterrupt
    first = not self.reason
    self.reason = self.reason or signal.Signals(number).name
    if first and not self._deferred:
      raise Preempted(self.reason)
