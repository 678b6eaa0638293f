"""From a YAML file and dotted overrides to a checked `Config`, and back.

    load("configs/demo.yaml", ["train.epochs=2", "stages=[crm]", "crm.models.0.name=mlp"])

Every mistake is reported at once, one line each, as an `InputError`: where it stands (file and line, or the override),
the full path of the key, what is allowed, and the nearest name. Numbers and words follow YAML 1.2: `1e-3` is a number,
`on` and `no` are words. A bool is no number and a number is no text: nothing is converted behind one's back.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs import reference
from configs.errors import InputError
from configs.schema import Config
from configs.secrets import HIDDEN, redacted

Path_ = tuple[str | int, ...]
MAX_EXTENDS = 8
MOST_BYTES = 4 << 20  # of a config file
MOST_NODES = 50_000  # values of a config file, those that aliases repeat counted each time


# --- YAML -------------------------------------------------------------------------------------------------------------

_SCALARS = [  # the YAML 1.2 core schema, and 86_400
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    ("tag:yaml.org,2002:float",
     r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
     "-+0123456789."),
    ("tag:yaml.org,2002:timestamp", r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ][0-9]{2}:[0-9]{2}:[0-9]{2})?$",
     "0123456789"),
    ("tag:yaml.org,2002:merge", r"^(?:<<)$", "<"),
]


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be text, not {key!r}: put it in quotes", key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice (first in line {seen[key].line + 1})",
                    key_node.start_mark)
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: strings that would read as something else are quoted. No anchors."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data):
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Line breaks, of which Unicode has several, come back as they were only from double quotes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_Dumper.add_representer(str, _text)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _one_line(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return " ".join(str(problem).split()) + where


def _parse(text: str) -> tuple[Any, dict[Path_, int]]:
    """The value of a YAML text and the line of every key in it.

    Raises:
        ValueError: the text is no YAML, in one line of words.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[Path_, int] = {}
        _note_lines(node, (), lines, set())
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def _note_lines(node: yaml.Node, path: Path_, lines: dict[Path_, int], above: set[int]) -> None:
    if id(node) in above:
        raise ValueError(f"an alias refers to itself (line {node.start_mark.line + 1})")
    if len(lines) > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES} values (line {node.start_mark.line + 1})")
    above = above | {id(node)}
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*path, key.value), lines, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*path, index), lines, above)


# --- one tree of raw values, and where each came from -----------------------------------------------------------------

class _Tree:
    """Raw values as the files and overrides give them; `origin` says which line or override set a path."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origin: dict[Path_, str] = {}

    def where(self, path: Path_) -> str:
        for end in range(len(path), -1, -1):
            if path[:end] in self.origin:
                return self.origin[path[:end]]
        return "defaults"

    def own(self, path: Path_, source: str) -> None:
        for old in [p for p in self.origin if p[:len(path)] == path]:
            del self.origin[old]
        self.origin[path] = source

    def merge(self, values: dict[str, Any], origin: dict[Path_, str]) -> None:
        self.values = _merged(self.values, values)
        self.origin.update(origin)


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{k: _merged(below.get(k), v) for k, v in above.items()}}
    return above


def _read_file(path: Path, tree: _Tree, chain: tuple[Path, ...] = (), *, may_extend: bool = True) -> None:
    if len(chain) >= MAX_EXTENDS or path.resolve() in chain:
        raise InputError(f"{path}: extends goes round in a circle: {' -> '.join(map(str, (*chain, path)))}")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: is no plain file")  # a device or a pipe would never end
        if (size := path.stat().st_size) > MOST_BYTES:
            raise InputError(f"{path}: has {size} bytes; a config has {MOST_BYTES} at most")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.5) \
            if path.parent.is_dir() else []
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: there is no such config file{hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise InputError(f"{str(path)!r}: cannot be read: {error}") from None
    try:
        values, lines = _parse(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values, this file holds {_shown(values)}")
    parent = values.pop("extends", None)
    if parent is not None:
        if not may_extend:
            raise InputError(f"{path}: extends: the config of a run folder stands for itself")
        if not isinstance(parent, str):
            raise InputError(f"{path}: extends: {_shown(parent)} is not the path of another config file")
        _read_file(path.parent / parent, tree, (*chain, path.resolve()))
    tree.merge(values, {p: f"{path}:{line}" for p, line in lines.items() if p})


# --- overrides --------------------------------------------------------------------------------------------------------

_PART = re.compile(r"""\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<plain>[^.="'][^.=]*))\s*(?P<end>\.|=|$)""")


def _split_override(text: str) -> tuple[list[str], str]:
    """`a.b."c.d"=value` to (["a", "b", "c.d"], "value"), by the schema: under a mapping the rest is one name.

    Raises:
        ValueError: no key, no `=`, or quotes that do not close.
    """
    if "=" not in text:
        raise ValueError("an override is written key=value")
    parts: list[str] = []
    here, at = reference.ROOT, 0
    while True:
        if here and any(k.is_mapping for k in here) and text[at:at + 1] not in ("'", '"'):
            numbers = any(k.type is float for k in reference.children(here, "x"))
            name, sign, value = text[at:].rpartition("=") if numbers else text[at:].partition("=")
            if not sign or not name.strip():
                raise ValueError("an override is written key=value")
            return [*parts, name.strip()], value
        match = _PART.match(text, at)
        if match is None or not match["end"]:
            raise ValueError("an override is written key=value, the key a dotted path such as train.epochs")
        part = next(g for g in (match["double"], match["single"], match["plain"]) if g is not None)
        part = part.strip() if match["plain"] else part
        parts.append(part)
        at = match.end()
        here = reference.children(here, int(part) if _is_index(part, here) else part)
        if match["end"] == "=":
            return parts, text[at:]


def _is_index(part: str, here: list[reference.Kind]) -> bool:
    return part.isascii() and part.isdigit() and any(k.is_list for k in here)


def _apply(tree: _Tree, override: str) -> None:
    """Set one override in the tree.

    Raises:
        ValueError: one line that says what is wrong with it.
    """
    parts, raw = _split_override(override)
    path, kinds_at = _resolved(parts)
    value = _override_value(raw, kinds_at[-1], path)
    holder: Any = tree.values
    for depth, step in enumerate(path):
        here = path[:depth + 1]
        if isinstance(holder, list):
            if step > len(holder):
                raise ValueError(f"{dotted(here)}: the list has {len(holder)} elements, "
                                 f"numbered from 0 (number {len(holder)} adds one)")
            if step == len(holder):
                holder.append(None)
        if here == path:
            holder[step] = value
            tree.own(path, f"override {override}")
            return
        nested = holder[step] if isinstance(holder, list) else holder.get(step)
        wants_list = isinstance(path[depth + 1], int)
        if not isinstance(nested, list if wants_list else dict):
            nested = holder[step] = _default(here) if wants_list else {}
            tree.own(here, f"override {override}")
        holder = nested


def _resolved(parts: list[str]) -> tuple[Path_, list[list[reference.Kind]]]:
    """The parts of an override's key as a path of the schema, with the kinds at each step."""
    path: Path_ = ()
    steps: list[list[reference.Kind]] = []
    here = reference.ROOT
    for part in parts:
        step: str | int = int(part) if _is_index(part, here) else part
        below = reference.children(here, step)
        if not below:
            raise ValueError(_unknown(path, part, here))
        path, here = (*path, step), below
        steps.append(below)
    return path, steps


def _default(path: Path_) -> list:
    """The default of a list key, as raw values, so that an override can change one element of it."""
    model: Any = Config
    for part in path[:-1]:
        alternatives = reference.field_kinds(model.model_fields[part])
        model = next(k.type for k in alternatives if k.is_section)
    value = model.model_fields[path[-1]].get_default(call_default_factory=True)
    return [v.model_dump() if isinstance(v, BaseModel) else v for v in value or []]


def _override_value(raw: str, below: list[reference.Kind], path: Path_) -> Any:
    try:
        value, _ = _parse(raw)
    except ValueError as error:
        raise ValueError(f"{dotted(path)}: the value {raw!r} is not valid YAML: {error}") from None
    only_text = all(k.type in (str, type(None)) for k in below)
    if only_text and not isinstance(value, (str, dict, list)) and value is not None:
        return raw.strip()  # run_dir=2022 is meant as text: there is nothing else it could be
    return value


# --- errors -----------------------------------------------------------------------------------------------------------

def dotted(path: Iterable[str | int]) -> str:
    """A path as overrides write it; a part that holds a dot is quoted."""
    return ".".join(f'"{p}"' if isinstance(p, str) and ("." in p or "=" in p) else str(p) for p in path)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The nearest of `names`, or None where nothing is near."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    return found[0] if found else None


def _unknown(path: Path_, key: str, here: list[reference.Kind]) -> str:
    full = dotted((*path, key))
    names = reference.key_names(here)
    if any(k.is_list for k in here):
        return f"{full}: {dotted(path)} is a list; name an element by its number, such as {dotted((*path, 0))}"
    if not names:
        return f"{full}: {dotted(path)} is {reference.allowed(here)}, there are no keys below it"
    near = nearest(key, names)
    if near is not None:
        guess = dotted((*path, near))
    else:
        everywhere = [k.path for k in reference.all_keys()]
        same_name = [p for p in everywhere if p.rpartition(".")[2] == key]
        same_name.sort(key=lambda p: ("[]" in p, p.count(".")))
        guess = same_name[0] if same_name else nearest(full, everywhere)
    hint = f"did you mean {guess}? " if guess else ""
    return f"{full}: unknown key; {hint}{'keys of ' + dotted(path) if path else 'top-level keys'}: {', '.join(names)}"


def _walk(location: tuple) -> tuple[Path_, list[reference.Kind], str | None]:
    """A pydantic location to (path, kinds there, unknown last key): pydantic names union branches, we do not."""
    path: Path_ = ()
    here = reference.ROOT
    for at, part in enumerate(location):
        below = reference.children(here, part)
        if below:
            path, here = (*path, part), below
        elif at == len(location) - 1 and isinstance(part, str):
            return path, here, part
    return path, here, None


def _messages(error: ValidationError, tree: _Tree) -> list[str]:
    found: list[tuple[Path_, str]] = []
    for item in error.errors(include_url=False):
        path, here, last = _walk(item["loc"])
        if item["type"] == "extra_forbidden" and last is not None:
            found.append(((*path, last), _unknown(path, last, here)))
            continue
        description = f" ({here[0].description})" if here and here[0].description else ""
        may_be = reference.allowed(here)
        if item["type"] == "missing":
            text = f"{dotted(path)}: missing; it must be {may_be}{description}"
        elif item["type"] in ("value_error", "assertion_error"):
            prefix = f"{dotted(path)}: " if path else ""
            text = prefix + item["msg"].removeprefix("Value error, ")
        else:
            text = f"{dotted(path)}: {_shown(item['input'])} is not allowed; it must be {may_be}{description}"
            choices = reference.literal_choices(here)
            near = nearest(item["input"], choices) if isinstance(item["input"], str) else None
            if near:
                text += f"; did you mean {near}?"
            elif any(k.type is str for k in here) and isinstance(item["input"], (int, float, bool)):
                text += "; put it in quotes"
        found.append((path, text))
    # A union reports every branch; the deepest report is the one about what was meant.
    kept = [(p, t) for p, t in found if not any(len(q) > len(p) and q[:len(p)] == p for q, _ in found)
            or "must be" not in t]
    return list(dict.fromkeys(f"{tree.where(p)}: {t}" for p, t in kept))


# --- the public face --------------------------------------------------------------------------------------------------

def load(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Config:
    """Read a run file, apply overrides in order, and check everything.

    Args:
        path: a YAML file, or a run folder (its resolved config.yaml; `run_dir` is then that folder).
        overrides: `key=value`, see docs/configuration.md.

    Raises:
        InputError: with all mistakes at once, one line each.
    """
    path = Path(path)
    tree = _Tree()
    if path.is_dir() and (path / "config.yaml").is_file():
        # A run's own config is whole: what it says stays in its folder.
        _read_file(path / "config.yaml", tree, may_extend=False)
        tree.values["run_dir"] = str(path)
    else:
        _read_file(path, tree)
    mistakes = []
    for override in overrides:
        try:
            _apply(tree, override)
        except ValueError as error:
            mistakes.append(f"override {override}: {error}")
    try:
        config = Config.model_validate(tree.values, strict=True)
    except ValidationError as error:
        mistakes += _messages(error, tree)
    except RecursionError:
        mistakes.append(f"{path}: it is nested too deeply")
    else:
        for key in ("logs", "items", "users"):
            if HIDDEN in (getattr(config.data, key) or ""):
                mistakes.append(f"data.{key}: the saved config leaves secrets out; give data.{key}=... again")
    if mistakes:
        count = "" if len(mistakes) == 1 else f"{len(mistakes)} mistakes in the config:\n"
        raise InputError(count + "\n".join(mistakes))
    return config


def require_logs(config: Config) -> None:
    """Raise an `InputError` where a run has neither logs nor a synthetic world to take their place, or half of both."""
    stray = [f"data.{key}" for key in ("items", "users") if getattr(config.data, key) is not None]
    if config.data.logs is None and config.data.synth is not None and stray:
        raise InputError(f"{stray[0]}: given, but data.logs is not: the synthetic world has its own; add data.logs=... "
                         f"or leave {' and '.join(stray)} out")
    if config.data.logs is None and config.data.synth is None:
        raise InputError(
            "data.logs: missing: this config reads real logs and does not say where they are; add\n"
            "    data.logs=FILE_OR_FOLDER data.items=FILE_OR_FOLDER\n"
            "to the command, or data.synth.users=2000 for the synthetic world")


def plain(section: Any) -> Any:
    """A model, or a structure of models, as JSON values."""
    if isinstance(section, BaseModel):
        return section.model_dump(mode="json")
    if isinstance(section, dict):
        return {str(key): plain(value) for key, value in section.items()}
    if isinstance(section, (list, tuple)):
        return [plain(value) for value in section]
    return section


def config_hash(section: Any) -> str:
    """sha256 (hex) of the canonical JSON of a config, one of its sections, or a dict of them."""
    text = json.dumps(plain(section), sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_yaml(config: Config | dict[str, Any]) -> str:
    values = config if isinstance(config, dict) else config.model_dump()
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def save_resolved(config: Config, path: str | os.PathLike) -> None:
    """Write the whole config with all defaults; `load` of the file gives an equal config, but for secrets that
    locations carried: these have to be given again. Appears at once and whole."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text("# The resolved config of this run: every key, defaults included; secrets are left out.\n"
                          + to_yaml(redacted(config.model_dump())), encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def changed_keys(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Dotted paths whose values differ between two plain structures, as `key: old -> new`."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [line for key in dict.fromkeys((*before, *after))
                for line in changed_keys(before.get(key), after.get(key), f"{prefix}{key}.")]
    return [] if before == after else [f"{prefix.rstrip('.')}: {_shown(before)} -> {_shown(after)}"]
