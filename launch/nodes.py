"""A run over nodes that share no disk: the run folder stays on the driver's node, and others see it through an actor.

The driver's node has the run folder, the whole of it. Where the cluster may have other nodes, an actor beside it
answers for the folder (embeddings/owner.py). A task or training worker first looks whether the folder at its own path
is the one that is meant: where all nodes share it, that is all. Where it is not, the process sees it through the actor
(embeddings/elsewhere.py): reads come from there when they are made, and whatever is published goes there.

The actor is the driver's own and ends with it: a process that was cut off then has nobody left to publish to.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from configs.errors import WatchtowerError
from configs.secrets import redact, redacted
from embeddings import elsewhere
from embeddings.attempts import Attempt, acts_for, sees
from embeddings.elsewhere import Away, Mirror, Shared
from launch.console import say
from trainer import watchdog

CALLS_AT_ONCE = 64
ANSWERS_WITHIN_S = 60.0
LOOKS_EVERY_S = 5.0
QUICK = {"exists", "facts", "names", "manifests", "note", "write_note", "progress"}  # others may read or write for long
CHANGES_NOTHING = {"exists", "facts", "names", "manifests", "note", "progress", "files", "read", "take"}
ANSWERS_KEPT = 10_000
QUICKLY, QUICK_AT_ONCE = "quickly", 16  # threads of their own, which no long call takes
MOVES_BYTES = 1 << 20  # a second, that the actor reads or writes; asking for that takes a little itself
FOUND_WITHIN_S = 30.0  # an actor, by its name, once its driver has begun to start it
LOOKS_WITHIN_S = 2.0  # a shared folder may show a record late

_seen: dict[str | None, Mirror | None] = {}  # by what the folder's record says of itself: how this process sees it


@contextlib.contextmanager
def folder_for_nodes() -> Iterator[None]:
    """While the block runs, processes on all nodes of the cluster that `ray.init` has joined see the run folder of the
    attempt that this process acts for."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    attempt = acts_for()
    if attempt is None or attempt.place is None:
        yield
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=CALLS_AT_ONCE, concurrency_groups={QUICKLY: QUICK_AT_ONCE},
                       max_restarts=0, name=_name(attempt),
                       scheduling_strategy=here)(RunFolder).remote(str(attempt.run_dir))
    try:
        yield
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.get(actor.close.remote(), timeout=10)
        with contextlib.suppress(Exception):  # then it has ended with the cluster
            ray.kill(actor)


class RunFolder:
    """embeddings.owner.Owner in a process of the driver's node. What changes anything is done once, however often it is
    asked for under the same number: an answer may get lost on its way."""

    def __init__(self, run_dir: str):
        from embeddings.owner import Owner

        self._owner, self._lock = Owner(run_dir), threading.Lock()
        self._done: OrderedDict[str, Future] = OrderedDict()

    def ask(self, number: str, method: str, *arguments: Any) -> Any:
        if method in CHANGES_NOTHING:
            return getattr(self._owner, method)(*arguments)
        with self._lock:
            is_new = number not in self._done
            answer = self._done.setdefault(number, Future())
            while len(self._done) > ANSWERS_KEPT:
                self._done.popitem(last=False)
        if is_new:
            try:
                answer.set_result(getattr(self._owner, method)(*arguments))
            except Exception as error:
                answer.set_exception(error)
        return answer.result()

    def close(self) -> None:
        self._owner.close()


def _name(attempt: Attempt) -> str:
    return f"watchtower-folder-{attempt.place}"


def see_folder(attempt: Attempt) -> None:
    """From now on this process sees the run folder of an attempt, wherever it lies.

    Raises:
        WatchtowerError: it does not lie here, and nobody answers for it.
        InputError: another one lies here.
    """
    if attempt.place not in _seen:
        _seen.clear()
        elsewhere.see_through(None)
        _seen[attempt.place] = None if attempt.place is None or _is_here(attempt) else _mirror_of(attempt)
    elsewhere.see_through(_seen[attempt.place])


def _is_here(attempt: Attempt) -> bool:
    until = time.monotonic() + LOOKS_WITHIN_S
    while not (found := sees(attempt)) and attempt.run_dir.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _mirror_of(attempt: Attempt) -> Mirror | None:
    actor = _found(attempt)
    try:
        mirror = Mirror(attempt.run_dir, lambda method, *arguments: _ask(actor, attempt, method, arguments),
                        watchdog.moved)
    except Shared:  # a file system that shows the driver's record late
        return None
    mirror.tidy()
    return mirror


def _found(attempt: Attempt) -> Any:
    """The actor that answers for the run folder."""
    import ray

    until = time.monotonic() + FOUND_WITHIN_S
    while True:
        try:
            return ray.get_actor(_name(attempt))
        except ValueError as error:
            if time.monotonic() > until:
                raise WatchtowerError(f"{attempt.run_dir}: this node does not share the run folder, and the driver's "
                                      "node does not answer for it; the driver may be gone") from error
            time.sleep(0.2)


def _ask(actor: Any, attempt: Attempt, method: str, arguments: tuple) -> Any:
    """What the actor answers; it is asked again, under the same number, where it does not for a while.

    Raises:
        Away: it does not answer, for longer than a network may be away.
    """
    import ray

    quickly = actor.ask.options(concurrency_group=QUICKLY)
    number, answered, progress = uuid.uuid4().hex, time.monotonic(), 0
    while True:
        try:
            asked = (quickly if method in QUICK else actor.ask).remote(number, method, *arguments)
            while not ray.wait([asked], timeout=LOOKS_EVERY_S)[0]:
                if method in QUICK:
                    if time.monotonic() - answered > ANSWERS_WITHIN_S:
                        raise ray.exceptions.GetTimeoutError(f"{method} takes longer than {ANSWERS_WITHIN_S:g} s")
                    continue
                before, progress = progress, ray.get(quickly.remote("", "progress"), timeout=ANSWERS_WITHIN_S)
                answered = time.monotonic()
                if progress - before > MOVES_BYTES * LOOKS_EVERY_S:  # flushes a large file, or reads its checksum
                    watchdog.moved()
            return ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (WatchtowerError, OSError)) else error) from None
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.ActorDiedError) or time.monotonic() - answered > ANSWERS_WITHIN_S:
                raise Away(f"{attempt.run_dir}: the driver's node, which has the run folder, does not answer "
                           f"({type(error).__name__})") from error
            time.sleep(1.0)


def tell_owner(attempt: Attempt, path: Path, told: dict[str, Any]) -> None:
    """Leave a small JSON file at a path of the run folder, from a process that does not see it. What goes wrong is said
    on stderr: the caller is about to raise what it has to tell."""
    try:
        data = json.dumps(redacted(told)).encode()
        _ask(_found(attempt), attempt, "put", (path.relative_to(attempt.run_dir).as_posix(), data, None))
    except Exception as error:
        say(redact(f"the driver could not be told: {error!r}"), "warning", sys.stderr)


@contextlib.contextmanager
def at_work(attempt: Attempt | None) -> Iterator[None]:
    """`trainer.watchdog.at_work`, in a process of any node."""
    try:
        if attempt is not None:
            see_folder(attempt)
        with watchdog.at_work(attempt):
            yield
    except Away as error:
        raise WatchtowerError(f"a task on {socket.gethostname()}: {error}") from error
