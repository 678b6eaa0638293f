"""What ends the driver of a run: signals, and threads that have seen that it cannot go on.

SIGINT is Ctrl-C: the run ends at once, exit code 130. SIGTERM is what a scheduler sends before it takes a machine away:
while a group of training workers is at work it is asked to save and end (`asking_first`), for as long as
`train.grace_s`; a second SIGTERM, the end of that time, or no group, ends the run at once, exit code 143. In every case
the driver ends as an exception ends it: locks and Ray's processes go, and nothing half-written is published.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from configs.secrets import redact

TERMINATED = 143

_ask: Callable[[], bool] | None = None
_grace_s = 0.0
_asked = False
_raised = False
_error: Exception | None = None
_end_of_grace: threading.Timer | None = None


def end_on_sigterm() -> None:
    """Put the handler in place, on the main thread; elsewhere nothing is done."""
    global _asked, _raised, _error
    if threading.current_thread() is threading.main_thread():
        _asked, _raised, _error = False, False, None
        signal.signal(signal.SIGTERM, _handle)
        sys.unraisablehook = _swallowed


def is_asked() -> bool:
    """Whether a SIGTERM has come."""
    return _asked


def is_ended() -> bool:
    """Whether a SIGTERM was to end the run at once. Where it broke into an import, compiled code may have swallowed
    what was raised; what fails then, on a module that is half there, is the signal's doing."""
    return _raised


@contextlib.contextmanager
def asking_first(ask: Callable[[], bool], grace_s: float) -> Iterator[None]:
    """While the block runs the first SIGTERM calls `ask`, on the main thread, and leaves the block `grace_s` seconds to
    end by itself; if `ask` says that nobody will answer, the run ends at once."""
    global _ask, _grace_s
    before = _ask, _grace_s
    _ask, _grace_s = ask, grace_s
    try:
        yield
    finally:
        _ask, _grace_s = before
        if _end_of_grace is not None:  # it would break into what ends the run in order
            _end_of_grace.cancel()


def interrupt(error: Exception, patience_s: float = 60.0) -> None:
    """End the main thread with this error, from any other one: a SystemExit is raised there, which `telling_why` makes
    this error of. If it has not ended the process after so many seconds, the process says it and ends, exit code 1.
    Only the first error is raised: another one would break into the end of the run."""
    global _error
    if _error is not None:
        return
    if signal.getsignal(signal.SIGTERM) is not _handle:  # nobody here would hear of it
        _end_at_once(error)
    _error = error
    _later(patience_s, lambda: _end_at_once(error))
    os.kill(os.getpid(), signal.SIGTERM)


def why() -> Exception | None:
    """The error that a thread has interrupted the main thread with; None where none has."""
    return _error


@contextlib.contextmanager
def telling_why() -> Iterator[None]:
    """What leaves the block because of `interrupt` leaves it as the error that was given there.

    Raises:
        Exception: that error.
    """
    try:
        yield
    except SystemExit:
        if _error is None:
            raise
        raise _error from None


def _end_at_once(error: Exception) -> None:
    print(redact(f"watchtower: {error}"), file=sys.stderr, flush=True)
    os._exit(1)


def _handle(*_: object) -> None:
    global _asked, _raised, _end_of_grace
    if _error is not None:
        # Of what a handler raises while Ray waits for something, only SystemExit and KeyboardInterrupt come through.
        raise SystemExit(1)
    first, _asked = not _asked, True
    if first and _will_answer():
        _end_of_grace = _later(_grace_s, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return
    _raised = True
    raise SystemExit(TERMINATED)


def _swallowed(unraisable: Any) -> None:
    """What a signal raises while Python runs a finalizer ends there and is lost: the signal comes once more. And what
    a finalizer says that was broken into is noise."""
    ends = _asked or _error is not None
    if unraisable.exc_type is KeyboardInterrupt:
        _later(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    elif ends and unraisable.exc_type is SystemExit:
        _later(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif not ends:
        sys.__unraisablehook__(unraisable)


def _will_answer() -> bool:
    try:
        return _ask is not None and _ask()
    except OSError:  # a run folder that is full or away: nobody can be asked
        return False


def _later(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    return timer
