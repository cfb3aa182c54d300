"""SIGTERM and SIGINT: asked politely, a run saves and leaves."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


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

  Of several processes all must stop at one step, whichever got the signal. jax
  has that: it takes SIGTERM in C++, tells all processes through the coordination
  service and gives them one step to come (`processes.join` asks for it). A step
  then costs a look at a number, where a collective would wait for the devices;
  and a signal is obeyed at the next step or two, where asking by collectives is
  only bearable now and then. So there SIGTERM is left alone, and what else ends a
  run early is turned into one.

  Attributes:
    reason: 'SIGTERM' or 'SIGINT' once it came; '' before.
  """

  def __init__(self):
    self.reason = ""
    self._deferred = False
    self._several = jax.process_count() > 1
    self._looks = 0
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    if threading.current_thread() is threading.main_thread():
      ours = (signal.SIGTERM, signal.SIGINT)[self._several :]
      for number in ours:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self._several and self._previous:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jax's would swallow it

  def defer(self) -> None:
    """From now on, note signals instead of raising."""
    self._deferred = True

  def request(self, reason: str) -> None:
    """Asks all processes to stop, as a SIGTERM to this one does."""
    if not self.reason:
      self.reason = reason
      os.kill(os.getpid(), signal.SIGTERM)

  def reached(self) -> bool:
    """Whether several processes stop before this step; ask once a step."""
    # Counted from 1 at each start: jax meets those who have not asked yet there.
    self._looks += 1
    return multihost_utils.reached_preemption_sync_point(self._looks)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.reason and number == signal.SIGINT:
      raise KeyboardInterrupt
    if self._several:
      return self.request(signal.Signals(number).name)
    first = not self.reason
    self.reason = self.reason or signal.Signals(number).name
    if first and not self._deferred:
      raise Preempted(self.reason)
