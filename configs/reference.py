"""What the schema allows, in words: for error messages, for overrides, and for docs/configuration.md.

Everything here reads the pydantic models of configs/schema.py; nothing is written down twice.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.schema import Config


@dataclass(frozen=True)
class Kind:
    """One alternative of a value: a plain type, its limits, and what the schema says of it."""

    type: Any  # int, float, bool, str, date, NoneType, a Literal, a list or dict type, or a model class
    limits: tuple = ()
    description: str = ""

    @property
    def is_section(self) -> bool:
        return isinstance(self.type, type) and issubclass(self.type, BaseModel)

    @property
    def is_mapping(self) -> bool:
        return get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list


def kinds(annotation: Any, limits: tuple = (), description: str = "") -> list[Kind]:
    """The alternatives of an annotation: unions taken apart, `Annotated` limits gathered, literals kept whole."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        found = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return kinds(inner, (*limits, *found), description)
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in kinds(part, limits, description)]
    return [Kind(annotation, limits, description)]


def field_kinds(field: FieldInfo) -> list[Kind]:
    return kinds(field.annotation, tuple(field.metadata), field.description or "")


def children(parents: list[Kind], part: str | int) -> list[Kind]:
    """The kinds that stand under `part` (a key, or an index of a list); empty where the schema has no such place."""
    found = []
    for kind in parents:
        if kind.is_section and part in kind.type.model_fields:
            found += field_kinds(kind.type.model_fields[part])
        elif kind.is_list and isinstance(part, int):
            found += kinds(get_args(kind.type)[0], (), kind.description)
        elif kind.is_mapping and isinstance(part, str):
            found += kinds(get_args(kind.type)[1], (), kind.description)
    return found


def key_names(parents: list[Kind]) -> list[str]:
    """The keys that the schema knows under these kinds, in its own order."""
    return [name for kind in parents if kind.is_section for name in kind.type.model_fields]


ROOT = [Kind(Config)]


def _limits(limits: tuple) -> str:
    low = high = ""
    shortest = None
    for limit in limits:
        if isinstance(limit, annotated_types.Ge):
            low = f"at least {limit.ge:g}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {limit.gt:g}"
        elif isinstance(limit, annotated_types.Le):
            high = str(limit.le) if isinstance(limit.le, int) else f"{limit.le:g}"
        elif isinstance(limit, annotated_types.MinLen):
            shortest = limit.min_length
    if low.startswith("at least") and high:
        return f" from {low.removeprefix('at least ')} to {high}"
    text = " and ".join(part for part in (low, high and f"at most {high}") if part)
    if shortest is not None:
        text = "not empty"
    return f", {text}" if text else ""


def _allowed_one(kind: Kind) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
             date: "a date (YYYY-MM-DD)",
             datetime: "a time (YYYY-MM-DDTHH:MM:SS, or a date for its midnight)", type(None): "null"}
    if kind.type in names:
        return names[kind.type] + _limits(kind.limits)
    if get_origin(kind.type) is Literal:
        choices = [str(choice) for choice in get_args(kind.type)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if kind.is_list:
        inner = get_args(kind.type)[0]
        return f"a list{_limits(kind.limits)}, each " + allowed(kinds(inner))
    if kind.is_mapping:
        return "a mapping of names to " + allowed(kinds(get_args(kind.type)[1])).removeprefix("a ")
    if kind.is_section:
        return "a section {" + ", ".join(kind.type.model_fields) + "}"
    return str(kind.type)


def allowed(alternatives: list[Kind]) -> str:
    """What a value may be: type, limits or choices, e.g. `a whole number from 0 to 3`."""
    return " or ".join(dict.fromkeys(_allowed_one(kind) for kind in alternatives))


def literal_choices(alternatives: list[Kind]) -> list[str]:
    return [choice for kind in alternatives if get_origin(kind.type) is Literal
            for choice in get_args(kind.type) if isinstance(choice, str)]


@dataclass(frozen=True)
class Key:
    """One key of the config, for listings. `path` marks an element of a list as `[]`."""

    path: str
    allowed: str
    default: str
    description: str
    is_section: bool
    is_repeated: bool
    """Its keys, which follow, say all of it: a section whose default is its keys' defaults."""


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        value = [v.model_dump(mode="json", exclude_defaults=True) for v in value]
    return json.dumps(value, default=str)


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key under a section, depth first, in the schema's order."""
    for name, field in model.model_fields.items():
        alternatives = field_kinds(field)
        sections = [(k.type, "") for k in alternatives if k.is_section]
        sections += [(k.type, "[]") for outer in alternatives if outer.is_list
                     for k in kinds(get_args(outer.type)[0]) if k.is_section]
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        yield Key(prefix + name, allowed(alternatives), default, field.description or "", bool(sections),
                  _only_its_keys(field, alternatives))
        for section, mark in sections:
            yield from all_keys(section, f"{prefix}{name}{mark}.")


def _only_its_keys(field: FieldInfo, alternatives: list[Kind]) -> bool:
    if not alternatives[0].is_section or field.is_required():
        return False
    try:
        return field.get_default(call_default_factory=True) == alternatives[0].type()
    except ValueError:  # the section has no default of its own
        return False


def _table(rows: list[Key]) -> list[str]:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    return lines + [f"| `{k.path}` | {cell(k.allowed)} | `{cell(k.default)}` | {cell(k.description)} |" for k in rows]


def describe() -> str:
    """Every key with what is allowed, its default and its meaning (with the unit), as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Every key of a run. `python -m configs.reference > docs/configuration.md` writes this page from the schema,",
        "`configs/schema.py`; a test keeps it current.",
        "",
        "A run file is YAML; a key that it leaves out has the default below. `extends: other.yaml` takes the values of",
        "another file first (a path beside the file). On the command line, dotted overrides follow the file:",
        "",
        "```",
        "watchtower run configs/demo.yaml train.epochs=2 stages=[crm] crm.models.0.name=mlp data.target.column=flag",
        "watchtower run configs/smoke.yaml gates.at_least.crm.dnn.oracle.recall@100=0.4 crm.publish=null",
        "```",
        "",
        "Values are YAML. A list or a section that is given whole replaces the one before; below `gates.at_least`,",
        "`index.search` and the column maps, the rest of the key is one name, dots and all (quotes work too).",
        "`null` is off, or the default that the meaning names. There are no secrets in a config: object stores take",
        "theirs from the environment.",
    ]
    top = [key for key in all_keys() if "." not in key.path]
    lines += ["", "## The run", "", *_table([k for k in top if not k.is_section])]
    for section in (key for key in top if key.is_section):
        rows = [k for k in all_keys() if k.path.startswith(section.path + ".")]
        lines += ["", f"## {section.path}", "", f"{section.description[:1].upper()}{section.description[1:]}.", ""]
        doc = (Config.model_fields[section.path].annotation.__doc__ or "").strip()
        if doc and not doc.startswith("Usage docs"):
            lines[-1:] = ["", doc, ""]
        lines += _table([k for k in rows if not k.is_repeated])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(describe(), end="")
