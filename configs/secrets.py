"""Secrets that locations and variables carry, taken out of everything that is written or shown.

    redact("s3://AKIA..:abc@bucket/logs")          "s3://***@bucket/logs"
    redact("https://host/x?sig=abc&part=2")        "https://host/x?sig=***&part=2"

What counts as a secret: the user and password of a URL, the query fields that sign or unlock one, keys with a value
behind them (`secret_key=..`, `Authorization: Bearer ..`), AWS key ids, and the value of every environment variable
whose name ends like one (AWS_SECRET_ACCESS_KEY, RAY_AUTH_TOKEN). Called by all that writes: the messages of
`configs.errors`, the saved config, events, markers, manifests and error logs. A location is used as it was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"
_LEAST_LENGTH = 6  # of a variable's value: a shorter one stands in too many words to be searched for

_NAME = (r"(?:aws_?)?(?:secret(?:_?access)?_?key|access_?key(?:_?id)?|session_?token|security_?token|auth_?token|"
         r"access_?token|refresh_?token|api_?key|account_?key|client_?secret|password|passwd|secret|token|sig|"
         r"signature|credential|sas|x-amz-[a-z-]+|x-goog-[a-z-]+|awsaccesskeyid|googleaccessid)")
_RULES = (
    # The user part of a URL; a port ("host:9000/..") is none. A secret may hold a slash.
    (re.compile(r"(\w[\w+.-]*://)[^\s/@:'\"]*:(?!\d+(?:/|$))[^\s@'\"]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(\w[\w+.-]*://)[^\s/@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"([?&;]{_NAME}=)[^\s&;#'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic)?\s*)[^\s'\"]+", re.IGNORECASE),
     rf"\1{HIDDEN}"),
    (re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\b(?:aws_)?(?:secret_access_key|secret_key|access_key|access_key_id|session_token|auth_token|"
                r"api_key|client_secret|password|passwd)['\"]?\s*[:=]\s*['\"]?)[^\s'\",;&}*]+", re.IGNORECASE),
     rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?|API_KEY|ACCESS_KEY|ACCESS_KEY_ID|"
                              r"PRIVATE_KEY|SECRET_KEY|CONNECTION_STRING)$")


def redact(text: str) -> str:
    """The text with `***` in the place of every secret in it; twice does no more than once."""
    return _redact(text, _secret_values())


def redacted(value: Any) -> Any:
    """The same structure of mappings, lists and scalars with every text in it redacted."""
    return _redacted(value, _secret_values())


def _redact(text: str, secret_values: list[str]) -> str:
    # Every text of a run comes by here, and most hold nothing that any of the rules could begin with.
    if ":" in text or "=" in text or "AKIA" in text or "ASIA" in text or "bearer" in text.lower():
        for pattern, instead in _RULES:
            text = pattern.sub(instead, text)
    for secret in secret_values:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def _redacted(value: Any, secret_values: list[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secret_values)
    if isinstance(value, Mapping):
        return {_redact(key, secret_values) if isinstance(key, str) else key: _redacted(inner, secret_values)
                for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(inner, secret_values) for inner in value]
    return value


def _secret_values() -> list[str]:
    """Values of this process's secret variables, the longest first."""
    # The names as bytes, which is how they are kept: nothing is decoded or hashed anew.
    found = {os.environ.get(name, "") for name in _secret_names(tuple(os.environb))}
    return sorted((value for value in found if len(value) >= _LEAST_LENGTH), key=len, reverse=True)


@lru_cache(maxsize=1)
def _secret_names(names: tuple[bytes, ...]) -> tuple[str, ...]:
    return tuple(name for name in map(os.fsdecode, names) if _SECRET_VARIABLE.search(name.upper()))
