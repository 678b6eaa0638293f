"""`watchtower plan`: what a config would need of a cluster that is not there.

TorchRec's planner places the tables (`embeddings.plan`), one step of the real towers is traced (`trainer.step_trace`),
and memory, traffic and time follow from both (`trainer.sizing`). The result is a table on the terminal, JSON with
stable keys, and a picture. No logs are needed: how large the tables are is read from the run folder where it holds
sequences, else taken from the command line or the synthetic world; what is only assumed is marked so.

Exit codes: 0 it fits, 2 the input is wrong, 3 it does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError, QualityGateError
from configs.schema import Config, ModelConfig, RouterModelConfig
from embeddings.index_size import index_bytes, lives_on_gpu
from embeddings.plan import PlacedTable, place_tables
from launch.plan_picture import picture
from launch.remote import load_config, working_folder
from trainer.catalogue import DURATION_BUCKETS
from trainer.crm import FeatureSizes, table_specs
from trainer.loop import precision, zero_stage
from trainer.sequences import SequenceStore
from trainer.sizing import DEVICES, GIB, Device, Sizing, Training, assumptions, size_up
from trainer.step_trace import StepTrace, trace_crm, trace_router
from trainer.world import WorldSpec

# What is assumed of a catalogue of which nothing but its number of items is known.
ITEMS_AN_AUTHOR = 10
TAGS = 10_000
TAGS_AN_ITEM = 3.0
CATEGORY_ROWS = 100


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. rows: table name: rows, the unknown one left out."""

    config: str
    overrides: tuple[str, ...]
    devices: int
    device: Device
    per_node: int
    items: int | None = None
    users: int | None = None
    content_dim: int | None = None
    rows: tuple[tuple[str, int], ...] = ()

    def load(self) -> Config:
        """The config as a training on these devices would have it."""
        return load_config(self.config, [*self.overrides, f"train.workers={self.devices}",
                                         f"train.device={self.device.kind}"])


@dataclass(frozen=True)
class Sizes:
    """Of the tables. sources: what each is known from."""

    features: FeatureSizes
    tags_per_item: float
    sources: dict[str, str]


@dataclass
class Part:
    """The towers or the routers: their tables, and each model. no_place: why the tables find none."""

    name: str
    tables: tuple[PlacedTable, ...] | None
    no_place: str | None = None
    models: dict[str, Sizing] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What came out for one config on one kind and number of devices."""

    asked: Asked
    config: Config
    sizes: Sizes
    parts: list[Part]
    index: int
    index_on_gpu: bool

    @property
    def fits(self) -> bool:
        return all(part.tables is not None and all(sizing.fits for sizing in part.models.values())
                   for part in self.parts)

    def shortest(self) -> Sizing | None:
        """Of the models that do not fit the one with the least left; None where they fit or tables find no place."""
        short = [sizing for part in self.parts for sizing in part.models.values() if not sizing.fits]
        return min(short, key=lambda sizing: min(sizing.left, sizing.epoch_end_left), default=None)


class Planner:
    """Plans, and what several of them share: a tower that stays the same is traced once."""

    def __init__(self) -> None:
        self._traces: dict[tuple[str, ...], StepTrace] = {}

    def plan(self, asked: Asked) -> Plan:
        """Raises:
            InputError: the config is wrong, or nothing says how many items there are.
        """
        config = asked.load()
        sizes = table_sizes(config, asked)
        width = config.crm.tower.dim + 1
        known = index_bytes(config.index.factory, sizes.features.item, width)
        index = 4 * width * sizes.features.item if known is None else known
        on_gpu = asked.device.kind == "cuda" and config.index.device != "cpu" and lives_on_gpu(config.index.factory)
        plan = Plan(asked, config, sizes, [], index, on_gpu)
        towers = "crm" in config.stages or ("channels" in config.stages and "embedding" in config.channels.names
                                            and config.channels.embedding.source == "crm")
        for name, wanted in (("crm", towers), ("router", "router" in config.stages)):
            if wanted:
                plan.parts.append(self._part(plan, name))
        if not plan.parts:
            raise InputError("stages: neither crm nor router is among them, so there is nothing to plan for")
        return plan

    def _part(self, plan: Plan, name: str) -> Part:
        asked, config, sizes = plan.asked, plan.config, plan.sizes
        section = config.crm if name == "crm" else config.router
        try:
            tables = place_tables(
                table_specs(sizes.features, section), devices=asked.devices, per_node=asked.per_node,
                device_type=asked.device.kind, memory_bytes=asked.device.memory_bytes,
                optimizer=section.tables.optimizer)
        except InputError as error:
            return Part(name, None, str(error))
        part = Part(name, tables)
        kind = torch.device(asked.device.kind)
        for model in section.models:
            rows = (model.batch_rows or config.train.batch_rows) if name == "crm" else config.router.batch_requests
            training = Training(
                device=asked.device, devices=asked.devices, per_node=asked.per_node, rows=rows,
                zero_stage=zero_stage(config, kind), low=precision(config, kind) == "bf16",
                adam=config.train.optimizer == "adamw", index_bytes=plan.index if name == "crm" else 0,
                index_on_gpu=plan.index_on_gpu and name == "crm", items=sizes.features.item,
                vector_width=config.crm.tower.dim + 1 if name == "crm" else 0,
                negative_groups=config.crm.negative_groups if name == "crm" else 1)
            part.models[model.name] = size_up(training, self._trace(plan, name, model), tables)
        return part

    def _trace(self, plan: Plan, name: str, model: ModelConfig | RouterModelConfig) -> StepTrace:
        config, sizes = plan.config, plan.sizes
        section, call = (config.crm, trace_crm) if name == "crm" else (config.router, trace_router)
        key = (name, model.model_dump_json(), section.model_dump_json(exclude={"models", "publish", "tables"}),
               str(section.tables.dim), str(config.train.stride), plan.asked.device.kind)
        if key not in self._traces:
            self._traces[key] = call(config, model, sizes.features, sizes.tags_per_item,
                                     on_gpu=plan.asked.device.kind == "cuda")
        return self._traces[key]


# --- sizes ------------------------------------------------------------------------------------------------------------

def table_sizes(config: Config, asked: Asked) -> Sizes:
    """Rows of every table.

    Raises:
        InputError: nothing says how many items there are, or `--rows` names a table that the models do not have.
    """
    found = _of_run_folder(config) if asked.items is None else None
    if found is None:
        found = _of_numbers(config, asked)
    given = dict(asked.rows)
    names = {"author", "tag", *(f"category_{name}" for name in found.features.categories),
             *(f"user_{name}" for name in found.features.users)}
    if wrong := sorted(set(given) - names):
        raise InputError(f"--rows {wrong[0]}: the models have no such table; there are {', '.join(sorted(names))} "
                         "(--items says how many items there are)")
    features, sources = found.features, found.sources | dict.fromkeys(given, "given")

    def of(prefix: str, counts: dict[str, int]) -> dict[str, int]:
        return {name: given.get(f"{prefix}_{name}", rows - 1) + 1 for name, rows in counts.items()}

    if asked.content_dim is not None:
        sources["content_dim"] = "given"
    return Sizes(replace(
        features, author=given.get("author", features.author - 1) + 1, tag=given.get("tag", features.tag - 1) + 1,
        content_dim=features.content_dim if asked.content_dim is None else asked.content_dim,
        categories=of("category", features.categories), users=of("user", features.users)),
        found.tags_per_item, sources)


def _of_run_folder(config: Config) -> Sizes | None:
    folder = working_folder(config) / "sequences"
    if not (folder / "manifest.json").exists():
        return None
    store = SequenceStore(folder)
    catalogue = store.catalogue
    features = FeatureSizes.of(catalogue, store.users)
    names = ["item", "author", "tag", "content_dim", *(f"category_{name}" for name in features.categories),
             *(f"user_{name}" for name in features.users)]
    tags = len(catalogue.tag_rows) / max(1, len(catalogue.item_id_N) - 1)
    return Sizes(features, tags, dict.fromkeys(names, "run folder"))


def _of_numbers(config: Config, asked: Asked) -> Sizes:
    data, synth = config.data, config.data.synth
    sources = {"item": "given", "author": "assumed", "tag": "assumed", "content_dim": "assumed"}
    items, authors, tags, tags_per_item, content_dim = asked.items, None, TAGS, TAGS_AN_ITEM, 0
    users, users_from = asked.users, "given"
    if items is None and data.logs is None and synth is not None:
        items, authors = synth.items, -(-synth.items // 20)
        tags, tags_per_item, content_dim = min(WorldSpec.tags_count, items), 2.0, WorldSpec.content_dim
        sources = dict.fromkeys(sources, "synthetic world")
        if users is None:
            users, users_from = synth.users, "synthetic world"
    if items is None:
        raise InputError(f"nothing says how many items there are: {config.run_dir} holds no sequences; give --items N "
                         "(and --users N where data.user_categories has user_id)")
    categories, of_users = dict.fromkeys(data.item_categories, CATEGORY_ROWS + 1), {}
    for name in data.user_categories:
        if name == "user_id" and users is None:
            raise InputError("data.user_categories has user_id, a row for every user: give --users N")
        of_users[name] = users + 1 if name == "user_id" else CATEGORY_ROWS + 1
        sources[f"user_{name}"] = users_from if name == "user_id" else "assumed"
    sources |= {f"category_{name}": "assumed" for name in categories}
    authors = max(1, items // ITEMS_AN_AUTHOR) if authors is None else authors
    return Sizes(FeatureSizes(items + 1, authors + 1, tags + 1, DURATION_BUCKETS, content_dim, categories, of_users),
                 tags_per_item, sources)


# --- what to change ---------------------------------------------------------------------------------------------------

def first_change(planner: Planner, plan: Plan) -> str | None:
    """The first change that makes it fit, of those that lie nearest to what takes the room; None where none does."""
    for words, asked in _changes(plan):
        try:
            if planner.plan(asked).fits:
                return words
        except InputError:  # a batch that the devices do not divide, and the like
            continue
    return None


def _changes(plan: Plan) -> Iterator[tuple[str, Asked]]:
    asked, config = plan.asked, plan.config
    short = plan.shortest()
    if short is None:
        part = next(part for part in plan.parts if part.tables is None)
        order = [f"tables of {part.name}"]
    else:
        needed = short.memory if short.left <= short.epoch_end_left else short.epoch_end
        order = [name for name, _ in sorted(needed.items(), key=lambda entry: -entry[1])]

    def with_keys(words: str, *keys: str) -> tuple[str, Asked]:
        return words, replace(asked, overrides=(*asked.overrides, *keys))

    def wide() -> Iterator[tuple[str, Asked]]:
        for section in ("crm", "router"):
            if getattr(config, section).tables.sharding == "table_wise":
                yield with_keys(f"{section}.tables.sharding=auto, so that rows are split over the devices",
                                f"{section}.tables.sharding=auto")

    def more() -> Iterator[tuple[str, Asked]]:
        for factor in (2, 4, 8, 16):
            yield f"--devices {asked.devices * factor}", replace(asked, devices=asked.devices * factor)

    def narrow(section: str, key: str, dim: int) -> Iterator[tuple[str, Asked]]:
        while dim > 16:
            dim //= 2
            yield with_keys(f"{section}.{key}={dim}", f"{section}.{key}={dim}")

    def towers() -> Iterator[tuple[str, Asked]]:
        stage = zero_stage(config, torch.device(asked.device.kind))
        for higher in range(max(stage + 1, 1), 4):
            yield with_keys(f"train.zero_stage={higher}", f"train.zero_stage={higher}")

    def low() -> Iterator[tuple[str, Asked]]:
        if asked.device.kind == "cuda" and config.train.precision == "fp32":
            stage = max(1, config.train.zero_stage or 1)
            yield with_keys("train.precision=bf16", "train.precision=bf16", f"train.zero_stage={stage}")

    def smaller() -> Iterator[tuple[str, Asked]]:
        rows = config.train.batch_rows
        while rows // 2 >= asked.devices:
            rows //= 2
            yield with_keys(f"train.batch_rows={rows}", f"train.batch_rows={rows}")

    def apart() -> Iterator[tuple[str, Asked]]:
        groups = config.crm.negative_groups
        while groups < asked.devices:
            groups = min(2 * groups, asked.devices)
            yield with_keys(f"crm.negative_groups={groups}", f"crm.negative_groups={groups}")

    def on_host() -> Iterator[tuple[str, Asked]]:
        if plan.index_on_gpu:
            yield with_keys("index.device=cpu", "index.device=cpu")

    def tables() -> Iterator[tuple[str, Asked]]:
        yield from wide()
        yield from more()
        for section in ("crm", "router"):
            yield from narrow(section, "tables.dim", getattr(config, section).tables.dim)

    remedies: dict[str, list[Callable[[], Iterator[tuple[str, Asked]]]]] = {
        "tables": [tables], "table_optimizer": [tables], "lookups": [wide, smaller], "towers": [towers, low],
        "activations": [low, smaller, apart], "index": [on_host],
        "item_vectors": [on_host, lambda: narrow("crm", "tower.dim", config.crm.tower.dim)]}
    tried: set[str] = set()
    for name in [*(name.split(" ")[0] for name in order), *remedies]:
        for remedy in remedies.get(name, []):
            for words, change in remedy():
                if words not in tried:
                    tried.add(words)
                    yield words, change


def slowest_part(plan: Plan) -> str:
    """What takes most of a step of the slowest model, in words."""
    model, sizing = max(((name, sizing) for part in plan.parts for name, sizing in part.models.items()),
                        key=lambda entry: entry[1].step_s)
    name, seconds = max(sizing.seconds.items(), key=lambda entry: entry[1])
    return f"{name} takes {seconds / sizing.step_s:.0%} of a step of {model}"


# --- showing it -------------------------------------------------------------------------------------------------------

def as_json(plan: Plan, change: str | None) -> dict[str, Any]:
    """The plan with stable keys; memory in GiB, times in milliseconds, traffic in bytes."""
    asked, features = plan.asked, plan.sizes.features
    rows = {"item": features.item, "author": features.author, "tag": features.tag}
    rows |= {f"category_{name}": count for name, count in features.categories.items()}
    rows |= {f"user_{name}": count for name, count in features.users.items()}
    return {
        "fits": plan.fits, "change_first": change, "devices": asked.devices, "per_node": asked.per_node,
        "device": {**asdict(asked.device), "memory_gib": asked.device.memory_bytes / GIB},
        "batch_rows": plan.config.train.batch_rows,
        "zero_stage": zero_stage(plan.config, torch.device(asked.device.kind)),
        "precision": precision(plan.config, torch.device(asked.device.kind)),
        "rows": rows, "content_dim": features.content_dim, "tags_per_item": plan.sizes.tags_per_item,
        "sources": plan.sizes.sources, "assumptions": assumptions(Training.shares),
        "index": {"factory": plan.config.index.factory, "gib": plan.index / GIB, "on_gpu": plan.index_on_gpu},
        "parts": {part.name: {
            "no_place": part.no_place,
            "tables": None if part.tables is None else [_table_json(table, asked.devices) for table in part.tables],
            "models": {name: sizing.as_json() for name, sizing in part.models.items()}} for part in plan.parts}}


def _table_json(table: PlacedTable, devices: int) -> dict[str, Any]:
    return {"name": table.name, "rows": table.rows, "dim": table.dim, "sharding": table.sharding,
            "devices": len(table.ranks), "first_device": table.ranks[0],
            "most_rows_on_a_device": max(table.rows_per_rank),
            "most_gib_on_a_device": float(table.weight_bytes(devices).max() + table.state_bytes(devices).max()) / GIB}


def terminal_lines(plan: Plan) -> list[str]:
    """The plan as tables of at most 118 columns."""
    asked, config = plan.asked, plan.config
    kind = torch.device(asked.device.kind)
    lines = [f"{asked.devices} x {asked.device.name}, {asked.per_node} a machine, "
             f"{asked.device.memory_bytes / GIB:.1f} GiB each · ZeRO {zero_stage(config, kind)}, "
             f"{precision(config, kind)} · {config.train.batch_rows:,} windows a step, "
             f"{-(-config.train.batch_rows // asked.devices):,} a device"]
    for part in plan.parts:
        lines += ["", f"{part.name}: tables", _row(["table", "rows", "dim", "where", "GiB on a device"], TABLE_WIDTHS)]
        if part.tables is None:
            lines.append(f"  {part.no_place}")
            continue
        for table in part.tables:
            told = _table_json(table, asked.devices)
            split = table.sharding == "row_wise"
            where = f"row-wise over {told['devices']:,}" if split else f"whole on device {told['first_device']}"
            source = plan.sizes.sources.get(table.name, "")
            assumed = " (assumed)" if source == "assumed" else ""
            lines.append(_row([table.name, f"{table.rows:,}{assumed}", str(table.dim), where,
                               f"{told['most_gib_on_a_device']:.3f}"], TABLE_WIDTHS))
        lines += _model_lines(part)
    where = "on the first device" if plan.index_on_gpu else "in the host's memory"
    index = [f"index {config.index.factory}: {plan.index / GIB:.2f} GiB {where}; the first machine needs "
             f"{sizing.host / GIB:.1f} GiB for it and its vectors" for part in plan.parts if part.name == "crm"
             for sizing in list(part.models.values())[:1]]
    return [*lines, "", *index]


TABLE_WIDTHS = (30, 26, 6, 30, 16)


def _model_lines(part: Part) -> list[str]:
    first = next(iter(part.models.values()))
    head = ["model", *(name.replace("table_optimizer", "optimizer") for name in first.memory), "left", "epoch end"]
    widths = [34, *(max(len(name) + 1, 8) for name in head[1:])]
    lines = ["", f"{part.name}: GiB of the fullest device in a step; what is left, and left at an epoch's end",
             _row(head, widths)]
    for name, sizing in part.models.items():
        numbers = [*sizing.memory.values(), sizing.left, sizing.epoch_end_left]
        lines.append(_row([name, *(f"{number / GIB:.2f}" for number in numbers)], widths))
    head = ["model", *first.seconds, "step", "rows/s", "MiB sent"]
    widths = [34, *(max(len(name) + 1, 8) for name in head[1:-2]), 11, 10]
    lines += ["", f"{part.name}: milliseconds of a step (estimates); bytes that a device sends in its all-to-alls",
              _row(head, widths)]
    for name, sizing in part.models.items():
        numbers = [*sizing.seconds.values(), sizing.step_s]
        lines.append(_row([name, *(f"{number * 1e3:.2f}" for number in numbers), f"{sizing.rows / sizing.step_s:,.0f}",
                           f"{sizing.all_to_all_bytes / 2**20:,.1f}"], widths))
    return lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell to the left, the others to the right."""
    return "".join([f"{cells[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(
        cells[1:], widths[1:], strict=True))]).rstrip()


# --- the command ------------------------------------------------------------------------------------------------------

def run(arguments: Any) -> None:
    """The command line's `plan`.

    Raises:
        InputError: wrong arguments, config or sizes.
        QualityGateError: it does not fit; the message says what to change first.
    """
    asked = _asked(arguments)
    planner = Planner()
    plan = planner.plan(asked)
    change = None if plan.fits else first_change(planner, plan)
    print("\n".join(terminal_lines(plan)))
    told = as_json(plan, change)
    if arguments.json is not None:
        _write(arguments.json, json.dumps(told, indent=1) + "\n", "--json")
    if arguments.picture is not None:
        _write(arguments.picture, picture(told), "--picture")
    if plan.fits:
        print(f"it fits; {slowest_part(plan)}")
        return
    needs = f"the first thing to change: {change}" if change else "no single change makes it fit: change several"
    raise QualityGateError(f"it does not fit on {asked.devices} x {asked.device.name}; {needs}")


def _asked(arguments: Any) -> Asked:
    device = DEVICES[arguments.device]
    for name in ("devices", "per_node", "items", "users", "memory"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if arguments.content_dim is not None and arguments.content_dim < 0:
        raise InputError(f"--content-dim {arguments.content_dim}: must be 0 or more")
    if arguments.memory is not None:
        device = replace(device, memory_bytes=int(arguments.memory * GIB))
    rows = []
    for text in arguments.rows or []:
        name, _, count = text.partition("=")
        if not count.isdigit() or int(count) < 1:
            raise InputError(f"--rows {text}: write TABLE=N, such as author=2000000")
        rows.append((name, int(count)))
    return Asked(config=arguments.config, overrides=tuple(arguments.overrides), devices=arguments.devices,
                 device=device, per_node=min(arguments.per_node or device.per_node, arguments.devices),
                 items=arguments.items, users=arguments.users, content_dim=arguments.content_dim, rows=tuple(rows))


def _write(path: str, text: str, option: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror or error})") from error
