"""No process waits for ever for one that is gone.

Each process beats in jax's coordination service, which process 0 serves. Process
0 looks whose beat stands still, and any process that fails says so; all the
others then say what they heard, once, and end. jax's own check would end them
too, but from C++, with a stack trace in the place of a status, so it has twice
the time. jax has no public way to the service, hence the one private import.
"""

import atexit
import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from jax._src import distributed

from fusionlab.errors import UserError

LOST = 1  # exit code of a process that ends because of another

# Folders of the service, with one key for each process.
_BEAT, _HURT, _END, _GONE, _DONE = (
  f"fusionlab/{name}/" for name in ("beat", "hurt", "end", "gone", "done")
)
# Errors that a lost process may cause in the others' collectives.
_OF_OTHERS = re.compile(
  "(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|ABORTED"
  "|FAILED_PRECONDITION|DATA_LOSS): "
)
_RESUME = "the same command resumes from the last complete checkpoint"
_watch: "_Watch | None" = None


def client() -> Any:
  """Jax's client of the coordination service; None for a process alone."""
  return distributed.global_state.client


def watch(peer_timeout: float) -> None:
  """Begins to watch the other processes; a second call changes nothing.

  Args:
    peer_timeout: seconds without a beat after which a process counts as lost.
      Where the devices' communication fails too, a few seconds are enough.
  """
  global _watch
  if _watch is None and client() is not None:
    _watch = _Watch(peer_timeout)
    _watch.start()
    # Runs before jax's own, which would wait minutes for who is gone.
    atexit.register(_watch.leave)
    shown = sys.excepthook
    sys.excepthook = lambda *error: (shown(*error), fail(error[1]))


def on_end(callback: Callable[[str], None] | None) -> None:
  """Sets what is called before this process ends because of another.

  Args:
    callback: takes what happened, one line; called on process 0, or where that
      one is the lost one on process 1. It runs in a thread of its own.
  """
  if _watch is not None:
    _watch.on_end = callback


def fail(error: BaseException) -> None:
  """Tells the other processes that this one fails, so that they end too.

  Where the error is one that a lost process causes here, this waits until that
  one is known, and does not return then.

  Args:
    error: what this process will raise.
  """
  if _watch is not None:
    _watch.fail(error)


def name() -> str:
  """'process 3 of 8'; '' for a process alone."""
  state = distributed.global_state
  if state.client is None or state.num_processes == 1:
    return ""
  return f"process {state.process_id} of {state.num_processes}"


def is_first() -> bool:
  """Whether this is the process that writes and speaks."""
  return distributed.global_state.process_id == 0


class _Watch(threading.Thread):
  """Beats, looks (process 0) and listens, a few times in `timeout`."""

  def __init__(self, timeout: float):
    super().__init__(name="watch-processes", daemon=True)
    self.on_end: Callable[[str], None] | None = None
    self._client = client()
    self._index = distributed.global_state.process_id
    self._count = distributed.global_state.num_processes
    self._address = distributed.global_state.coordinator_address
    self._timeout = timeout
    self._interval = min(timeout / 10, 2.0)
    self._stopped = threading.Event()
    self._exit_code: int | None = None
    # Looks, not seconds: a job that was stopped and continued has lost nobody.
    self._beats: dict[int, tuple[str, int]] = {}
    self._asked: float | None = None
    self._ending = threading.Lock()
    # Losing the coordinator aborts from C++ at once. SIGABRT's handler is
    # libc's sleep, for as many seconds as the signal has for a number: time for
    # `_guard` to say what happened.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))

  def run(self) -> None:
    if self._index:
      name = "guard-coordinator"
      threading.Thread(target=self._guard, name=name, daemon=True).start()
    beat = 0
    while not self._stopped.wait(self._interval if beat else 0):
      beat += 1
      self._asked = time.monotonic()
      try:
        self._client.key_value_set(f"{_BEAT}{self._index}", str(beat), True)
        if self._index == 0:
          self._look()
        said = self._read(_END)
      except Exception:  # whatever jax raises for a service that left
        return self._lost_coordinator()
      self._asked = None
      if said and not self._stopped.is_set():
        self._end(next(iter(said.values())))

  def _guard(self) -> None:
    """Ends this process when the service answers no more.

    What jax does then keeps its own thread from ever failing our calls.
    """
    host, _, port = str(self._address).rpartition(":")
    while not self._stopped.wait(self._interval / 2):
      asked = self._asked
      waited = 0.0 if asked is None else time.monotonic() - asked
      if waited < self._interval / 2:
        continue
      try:
        socket.create_connection((host.strip("[]"), int(port)), 1.0).close()
      except ConnectionError:
        return self._lost_coordinator()
      except OSError:  # no route, no answer: perhaps for a moment only
        pass
      if waited > self._timeout:
        return self._lost_coordinator()

  def _lost_coordinator(self) -> None:
    if not self._stopped.is_set():
      self._end(
        f"process 0 of {self._count}, which coordinates the others, was lost"
        f" (its service at {self._address} answers no more); {_RESUME}",
        speaker=1,
      )

  def _look(self) -> None:
    """Process 0: says who is lost."""
    beats, hurt = self._read(_BEAT), self._read(_HURT)
    for index in range(1, self._count):
      now = beats.get(index, "")
      last, still = self._beats.get(index, (now, 0))
      self._beats[index] = (now, still + 1 if now == last else 0)
    # An error of the devices' communication is a sign too.
    patience = math.ceil((3.0 if hurt else self._timeout) / self._interval)
    lost = [
      index
      for index, (_, still) in self._beats.items()
      if still >= max(patience, 3) and index not in hurt
    ]
    if lost:
      names = ", ".join(map(str, lost))
      seconds = max(self._beats[lost[0]][1] * self._interval, 1)
      self._say(
        f"process {names} of {self._count} was lost (no sign of life for"
        f" {seconds:.0f} s: killed, or its host or network failed); {_RESUME}"
      )

  def fail(self, error: BaseException) -> None:
    if self._exit_code is not None:
      return
    text = " ".join(str(error).split())
    if _OF_OTHERS.match(text) and not isinstance(error, UserError):
      with contextlib.suppress(Exception):
        self._client.key_value_set(f"{_HURT}{self._index}", "", True)
      time.sleep(self._timeout + 5 * self._interval)
    self._exit_code = _exit_code(error)
    self._stopped.set()
    with contextlib.suppress(Exception):
      what = f"{type(error).__name__}: {text[:500]}" if text else repr(error)
      self._say(f"process {self._index} of {self._count} ended: {what}")

  def leave(self) -> None:
    """At exit: waits until all are done; one that failed waits for nobody."""
    if self._exit_code is None:
      with contextlib.suppress(Exception):
        self._client.key_value_set(f"{_DONE}{self._index}", "", True)
        while len(self._read(_DONE)) < self._count:
          time.sleep(min(self._interval, 0.2))
    self._stopped.set()
    if self._exit_code is not None:
      self._exit(self._exit_code)

  def _end(self, text: str, *, speaker: int = 0) -> NoReturn:
    """Ends this process because of another, whatever its main thread does."""
    self._ending.acquire()  # never released: one thread says it, once
    if speaker == 0:
      with contextlib.suppress(Exception):
        self._client.key_value_set(f"{_GONE}{self._index}", "", True)
    try:
      if self.on_end is not None and self._index == speaker:
        self.on_end(text)
    finally:
      print(f"error: {text}", file=sys.stderr, flush=True)
      self._exit(LOST)

  def _exit(self, code: int) -> NoReturn:
    """Ends without jax's shutdown, which would wait for those that are gone."""
    if self._index == 0:
      self._linger()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
    os._exit(code)

  def _linger(self) -> None:
    """Process 0 serves until the others have heard."""
    until = time.monotonic() + 3 * self._interval + 1
    with contextlib.suppress(Exception):
      while time.monotonic() < until:
        heard = self._read(_GONE).keys() | self._read(_END).keys() | {0}
        if len(heard) == self._count:
          return
        time.sleep(self._interval / 5)

  def _say(self, text: str) -> None:
    self._client.key_value_set(f"{_END}{self._index}", text, True)

  def _read(self, folder: str) -> dict[int, str]:
    """The keys of a folder by process."""
    found = self._client.key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): value for key, value in found}


def _exit_code(error: BaseException) -> int:
  """What the command line exits with after an error."""
  if isinstance(error, KeyboardInterrupt):
    return 130
  return 2 if isinstance(error, (UserError, OSError)) else 1
