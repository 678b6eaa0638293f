"""What a run prints: lines for people, or one JSON object an event for a log store (`--log-format json`).

    {"time": "2026-01-01T00:00:00.000Z", "level": "info", "event": "train_step", "rank": 0, "node": "worker-1", ...}

`rank` is the training worker that wrote the event, null for the driver; `node` the host. Text that is no event of
events.jsonl (a table of results, an error) is an event `message`. The choice is an environment variable, so that every
part of the process prints alike, and a job on a cluster as the command that sent it.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

FORMAT_VARIABLE = "WATCHTOWER_LOG_FORMAT"
FORMATS = ("text", "json")
_FIRST = ("time", "level", "event", "rank", "node")
_FAILED = {"failed": "error", "interrupted": "warning"}


def is_json() -> bool:
    return os.environ.get(FORMAT_VARIABLE) == "json"


def say(text: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Print text, or the event `message` that holds it. An empty text is an empty line for people, and no event."""
    stream = stream or sys.stdout
    if not is_json():
        print(text, file=stream, flush=True)
    elif text.strip():
        print(json_line({"event": "message", "time": time.time(), "node": socket.gethostname(), "level": level,
                         "message": text.strip("\n")}), file=stream, flush=True)


def json_line(event: Mapping[str, Any]) -> str:
    """One event of events.jsonl as a line for a log store: time (RFC 3339, UTC), level, event, rank, node, the rest."""
    at = datetime.datetime.fromtimestamp(event["time"], datetime.UTC)
    head = {"time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "level": _level(event),
            "event": event["event"], "rank": event.get("rank"), "node": event.get("node")}
    return json.dumps({**head, **{name: value for name, value in event.items() if name not in (*_FIRST, "show")}},
                      ensure_ascii=False, separators=(",", ":"))


def _level(event: Mapping[str, Any]) -> str:
    """info, warning or error."""
    if event.get("level"):
        return event["level"]
    if event["event"] == "warning" or event.get("not_finite"):
        return "warning"
    return _FAILED.get(str(event.get("status")), "info")


def version() -> str:
    """The installed version of the package."""
    from importlib import metadata

    try:
        return metadata.version("watchtower")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"
