"""The typed schema of a run: every key, its unit, its default and its limits.

A run is one complete named config. Words are those of docs/architecture.md. `None` is off; there is no magic -1 or 0.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(min_length=1)]


# Keys that say how a run is done and cannot change its numbers: a run may go on elsewhere with other ones.
HOW_TRAINED = frozenset({"workers", "device", "threads_per_worker", "checkpoint_every_steps", "keep_checkpoints",
                         "prefetch", "log_every_steps", "max_restarts", "timeout_s", "watchdog_s", "wait_s",
                         "grace_s", "cpus_per_worker", "gpus_per_worker", "placement"})
HOW_INDEXED = frozenset({"device", "threads"})
# Keys of `index` that decide what is published, not what is trained: a run goes on under a lower gate.
INDEX_GATES = frozenset({"min_recall", "min_validation_recall", "max_nan_share"})
# Keys of `evaluate` that decide about the best epoch.
SEEN_IN_TRAINING = frozenset({"validation_queries", "future", "seed"})


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values are checked when they are set."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ViewRule(Section):
    """Which rows count: at least `min_watch_s` seconds (or the whole video), or a flag column of the log."""

    min_watch_s: PositiveFloat | None = Field(None, description="seconds; a view this long, or the whole video, counts")
    column: str | None = Field(None, description="name of a boolean column of the log; true counts")

    @model_validator(mode="after")
    def _one_rule(self):
        if (self.min_watch_s is None) == (self.column is None):
            raise ValueError("give exactly one of min_watch_s (seconds) and column (a flag of the log), the other null")
        return self


class SynthConfig(Section):
    """The synthetic world that stands in where no logs are named (docs/synthetic-world.md has the model)."""

    users: Positive = Field(2000, description="number of users")
    items: Positive = Field(2000, description="number of items in the catalogue")
    views_per_user: PositiveFloat = Field(40.0, description="mean number of views a user has over all days")
    days: Positive = Field(14, description="length of the log, days")
    seed: Seed = Field(0, description="seed of the world; the same seed gives the same rows")
    user_item_affinity: Annotated[float, Field(ge=0, le=3)] = Field(
        0.6, description="how much the watch time depends on the pair of user and item, log seconds; 0: on each alone")
    watch_persistence: Annotated[float, Field(ge=0, le=3)] = Field(
        0.3, description="spread of the users' own watch levels, log seconds; 0: a user's average says nothing")
    mood_scale: Annotated[float, Field(ge=0, le=3)] = Field(
        0.25, description="spread of the moods that a session's watch times share, log seconds")
    views_spread: Annotated[float, Field(ge=0, le=3)] = Field(
        0.9, description="standard deviation of the log of a user's number of views")
    exploration: Share = Field(0.15, description="share of the feed drawn by popularity alone")
    passing_interest: Share = Field(0.25, description="share of the feed drawn from a session's passing interest")
    author_loyalty: Share = Field(0.10, description="share of the feed drawn from favourite authors")
    interest_drift: Share = Field(0.5, description="chance that a session has a new passing interest")
    popularity_spread: Annotated[float, Field(ge=0, le=4)] = Field(
        1.54, description="standard deviation of the log of an item's popularity; 0: all alike")
    watch_time: Literal["natural", "independent", "permuted"] = Field(
        "natural", description="independent, permuted: null worlds, where watch time says nothing of the item")


class DataConfig(Section):
    logs: str | None = Field(None, description="Parquet file or folder of logs; overrides synth")
    items: str | None = Field(None, description="Parquet file or folder of the catalogue")
    users: str | None = Field(None, description="Parquet file or folder of user features")
    format: Literal["parquet", "kuairand_csv"] = Field("parquet", description="layout of logs, items and users")
    synth: SynthConfig | None = Field(default_factory=SynthConfig, description="the synthetic world, when logs is null")
    columns: dict[str, str] = Field(default_factory=dict, description="our log column: the name it has in the files")
    item_columns: dict[str, str] = Field(default_factory=dict, description="our item column: its name in the files")
    user_columns: dict[str, str] = Field(default_factory=dict, description="our user column: its name in the files")
    effective_view: ViewRule = Field(default_factory=lambda: ViewRule(min_watch_s=3.0),
                                     description="which rows are effective views")
    target: ViewRule | None = Field(None, description="which rows CRM predicts; null: the effective views")
    feedback: list[str] = Field(default_factory=list, description="feedback columns of the log, kept in the sequences")
    session: str | None = Field(None, description="name of the log's session column")
    ordinal_time: str | None = Field(None, description="flag column: rows whose times only order (no clock, no gap)")
    utc_offset_h: Annotated[float, Field(ge=-14, le=14)] = Field(0.0, description="hours; where a day begins")
    max_watch_s: PositiveFloat = Field(86_400.0, description="seconds; a longer watch time is a bad row")
    max_bad_share: Share = Field(0.01, description="share of quarantined rows that stops the run")
    missing_items: Literal["quarantine", "keep"] = Field(
        "quarantine",
        description="rows whose item the catalogue lacks: set aside, or kept on rows of their own without features")
    item_categories: list[str] = Field(default_factory=list, description="categorical columns of the catalogue")
    user_categories: list[str] = Field(default_factory=list, description="categorical columns of the users table")
    shards: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="sequence shards; null: one per 2 million rows, at least 8")

    @field_validator("item_categories", "user_categories")
    @classmethod
    def _name_files(cls, value: list[str]) -> list[str]:
        if any(not name or "/" in name or "\\" in name or not name.isprintable() for name in value):
            raise ValueError("a category's name is not empty and has no / or \\ in it, for it names a file of its own; "
                             "give another name and map it with data.item_columns or data.user_columns")
        return value


class TestUsers(Section):
    share: Share = Field(0.1, description="share of users held out")
    seed: Seed = Field(0, description="seed of the hash that picks them")


class RoutingTestUsers(TestUsers):
    share: Share = Field(0.3, description="share of users held out")


class SplitConfig(Section):
    """Days are cut at `data.utc_offset_h`. Training is all before `validation_start`."""

    validation_start: date | None = Field(None, description="first validation day; null: counted back from the end")
    test_start: date | None = Field(None, description="first test day; null: counted back from the end")
    test_end: date | None = Field(None, description="first day after the test; null: the end of the log")
    validation_days: PositiveFloat = Field(1.0, description="days, where validation_start is null")
    test_days: PositiveFloat = Field(1.0, description="days, where test_start is null")
    test_users: str | TestUsers | None = Field(
        None, description="Parquet file of user_id, or a share and a seed: only they are evaluated, never trained on")

    @model_validator(mode="after")
    def _days_in_order(self):
        named = [(n, getattr(self, n)) for n in ("validation_start", "test_start", "test_end") if getattr(self, n)]
        for (earlier, first), (later, second) in zip(named, named[1:], strict=False):
            if first >= second:
                raise ValueError(f"{earlier} ({first}) must be a day before {later} ({second})")
        return self


class TableConfig(Section):
    dim: Positive = Field(64, description="width of an embedding row, floats")
    sharding: Literal["auto", "table_wise", "row_wise"] = Field("auto", description="how TorchRec places the tables")
    optimizer: Literal["rowwise_adagrad", "sgd"] = Field("rowwise_adagrad", description="the fused optimizer")
    learning_rate: PositiveFloat = Field(0.1, description="of the fused optimizer")
    init_std: PositiveFloat = Field(0.05, description="standard deviation of a row's first values")


class RouterTableConfig(TableConfig):
    dim: Positive = Field(32, description="width of an embedding row, floats")


class ConditionConfig(Section):
    buckets: Positive = Field(100, description="log-spaced buckets of watch time (log1p)")
    max_s: PositiveFloat = Field(3000.0, description="seconds; the upper end of the buckets")
    dropout: Share = Field(0.15, description="share of training conditions dropped to the unknown bucket")


def bayes_name(model: str) -> str:
    """Name in metrics.json of a model judged with the Bayes term: `dnn_unconditioned` gives `dnn_bayes`."""
    return model.removesuffix("_unconditioned") + "_bayes"


class ModelConfig(Section):
    """One tower to train. `condition: none` is the ablation every result is held against."""

    name: str = Field(description="name in run folders and metrics.json")
    tower: Literal["dnn", "decision_transformer"] = Field(description="the user tower")
    condition: Literal["next", "to_go", "prefix", "none"] = Field("next", description="what W_i is")
    loss_positions: Literal["all", "last"] = Field("all", description="positions of a window that the loss is taken at")
    permute_watch: bool = Field(False, description="train with watch times permuted among views (a null control)")
    bayes: bool = Field(False, description="also publish and judge this tower with the Bayes term in its index")
    epochs: Positive | None = Field(None, description="epochs of this model; null: train.epochs")
    batch_rows: Positive | None = Field(None, description="windows in a global batch of this model; null: train's")
    learning_rate: PositiveFloat | None = Field(None, description="of this model's towers; null: train's")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "_-" for c in value):
            raise ValueError("a model's name has letters, digits, _ and - alone: it names folders and metrics")
        return value


class TowerConfig(Section):
    dim: Positive = Field(64, description="width of user and item vectors, floats")
    history: Positive = Field(32, description="past views a user vector sees")
    layers: Positive = Field(2, description="transformer layers")
    heads: Positive = Field(2, description="attention heads")
    hidden: Positive = Field(256, description="width of the hidden layers of the MLPs")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout in both towers")
    clock: bool = Field(True, description="hour of day and gap since the last view as features of the request")
    past_path: bool = Field(
        False, description="the past also goes to the user vector beside the layers; for many views of each item")

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        return self


class CrmConfig(Section):
    models: list[ModelConfig] = Field(
        default_factory=lambda: [ModelConfig(name="dnn", tower="dnn"),
                                 ModelConfig(name="dnn_unconditioned", tower="dnn", condition="none", bayes=True)],
        min_length=1, description="the towers to train, each over every seed")
    publish: str | None = Field(None, description="name of the model that serves; null: the first of models")
    tower: TowerConfig = Field(default_factory=TowerConfig, description="sizes shared by all towers")
    tables: TableConfig = Field(default_factory=TableConfig, description="embedding tables")
    condition: ConditionConfig = Field(default_factory=ConditionConfig, description="how a watch time is encoded")
    similarity: Literal["dot", "cosine"] = Field("dot", description="score of a user and an item vector")
    temperature: PositiveFloat = Field(1.0, description="tau of the similarity")
    log_q: bool = Field(True, description="logQ correction of the in-batch softmax")
    negative_groups: Positive = Field(
        1, description="groups that the windows of a global batch are dealt into; the negatives of a target are the "
                       "targets of its group. 1: of the whole batch; as many as workers: no item vector travels, and "
                       "a step's cost does not grow with them. Results depend on it, not on the workers")
    item_bias: bool = Field(True, description="a learned item bias, started at log q")

    @model_validator(mode="after")
    def _names(self):
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError("two models have the same name")
        if self.publish is not None and self.publish not in names:
            raise ValueError(f"publish names no model; there are {', '.join(names)}")
        for model in self.models:
            if model.bayes and model.condition != "none":
                raise ValueError(f"model {model.name} has bayes: true, which is for a tower with condition: none")
        taken = {"popular", "ceiling", *(bayes_name(m.name) for m in self.models if m.bayes)}
        if taken & set(names):
            raise ValueError(f"{', '.join(sorted(taken & set(names)))}: this name is taken by a baseline; give the "
                             "model another one")
        return self

    @property
    def published(self) -> str:
        return self.publish or self.models[0].name


class WorkerRange(Section):
    """As many workers as the cluster has room for, between these."""

    min: Positive = Field(1, description="workers without which training does not begin")
    max: Positive = Field(2, description="workers at most")

    @model_validator(mode="after")
    def _in_order(self):
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class TrainConfig(Section):
    workers: Positive | WorkerRange = Field(
        2, description="Ray Train workers (processes); {min, max}: as many as the cluster has room for")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the towers and tables live")
    cpus_per_worker: PositiveFloat | None = Field(None, description="CPUs that Ray reserves for a worker; null: 1")
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="GPU that Ray reserves for a worker, where it trains on one; a part leaves the rest to other "
                         "jobs, for NCCL takes no two workers of one group on a GPU")
    placement: Literal["pack", "spread", "strict_spread"] = Field(
        "pack", description="workers over nodes: on few, on many, or one on each and no run without (a cluster)")
    threads_per_worker: Positive | None = Field(
        None, description="CPU threads a worker; null: whole cpus_per_worker, where it is null: cores / workers")
    epochs: Positive = Field(4, description="passes over each time slice")
    slices: Literal["daily"] | Literal[1] = Field(1, description="1: the whole period at once; daily: day by day")
    batch_rows: Positive = Field(64, description="windows in a global batch (all workers together)")
    stride: Positive | None = Field(None, description="events between two windows of one user; null: half a window")
    cuts_per_user: Positive = Field(4, description="windows drawn a user and epoch, where the loss is at the last")
    min_history: Annotated[int, Field(ge=0)] = Field(0, description="past views a target needs")
    learning_rate: PositiveFloat = Field(1e-3, description="of the towers (AdamW)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="of the towers (AdamW)")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of the towers")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(50, description="steps of linear warm-up")
    decay: Literal["none", "cosine", "linear"] = Field("cosine", description="learning rate after warm-up")
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="DeepSpeed ZeRO stage; null: 1 with bf16, else 0 (the fastest where towers are small)")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on the CPU")
    gradient_clip_norm: PositiveFloat | None = Field(1.0, description="norm that tower gradients are clipped to")
    dropout_by_row: bool = Field(
        False, description="dropout on a GPU as on a CPU, by row and not by worker: the losses do not depend on the "
                           "number of workers then; attention is not the fused one and slower, where crm.tower.dropout "
                           "is above 0")
    checkpoint_every_steps: Positive | None = Field(500, description="steps between checkpoints; null: epochs only")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept beside the best")
    patience: Positive | None = Field(None, description="epochs without a better validation that end a model")
    shuffle_shards: Positive = Field(8, description="shards held open and shuffled together")
    prefetch: Annotated[int, Field(ge=0)] = Field(2, description="batches prepared ahead, on a thread")
    log_every_steps: Positive = Field(20, description="steps between two log lines")
    max_restarts: Annotated[int, Field(ge=0)] = Field(2, description="times a lost worker group is restarted")
    timeout_s: PositiveFloat = Field(600.0, description="seconds a collective may take before it fails")
    watchdog_s: PositiveFloat | None = Field(
        1800.0,
        description="seconds in which nothing moves before all stacks are printed and the run ends (above timeout_s, "
        "a collective's own error comes first); null: off")
    wait_s: PositiveFloat = Field(
        600.0, description="seconds to wait for room for the (least) workers before the run ends")
    grace_s: PositiveFloat = Field(
        25.0, description="seconds that training has after a SIGTERM to save a checkpoint and end")

    @property
    def least_workers(self) -> int:
        """Workers that training needs to begin."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """Workers that training takes where there is room."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @model_validator(mode="after")
    def _placed(self):
        if self.placement == "strict_spread" and self.least_workers != self.most_workers:
            # Ray Train counts the room of all nodes together and then asks for more workers than there are nodes.
            raise ValueError("placement: strict_spread goes with a fixed number of workers; take spread, or give "
                             "workers one number")
        if self.gpus_per_worker <= 0.5 and self.most_workers > 1 and self.placement != "strict_spread":
            raise ValueError(f"gpus_per_worker ({self.gpus_per_worker:g}) would put two workers on one GPU, which NCCL "
                             "refuses: above 0.5, one worker, or placement: strict_spread (one worker on each node)")
        return self

    @model_validator(mode="after")
    def _batch_divides(self):
        if not isinstance(self.workers, int):
            # Whatever number there is takes rows rank, rank + workers, .. of the same global batches.
            if self.batch_rows < self.workers.max:
                raise ValueError(f"batch_rows ({self.batch_rows}) must be at least workers.max ({self.workers.max})")
            return self
        if self.batch_rows % self.workers:
            below = self.batch_rows // self.workers * self.workers
            near = " or ".join(str(n) for n in (below, below + self.workers) if n)
            raise ValueError(f"batch_rows ({self.batch_rows}) must be a multiple of workers ({self.workers}), "
                             f"so that every worker has as many rows: {near}")
        return self


class IndexConfig(Section):
    factory: Text = Field("Flat", description="FAISS factory string")
    search: dict[str, float] = Field(default_factory=dict, description="FAISS search parameters: nprobe, efSearch, ..")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the index is built")
    threads: Positive | None = Field(None, description="FAISS threads; null: the worker's own")
    min_recall: Share = Field(0.95, description="gate: recall@100 against exact search, else not published")
    min_validation_recall: Share | None = Field(
        None, description="gate: recall@100 of the validation requests through each epoch's index, also the first, "
                          "else not published; null: off")
    max_nan_share: Share = Field(
        0.0, description="gate: share of items whose vector is not finite, else not published; up to it they are left "
                         "out of the index")
    recall_queries: Positive = Field(200, description="queries the recall is measured on")


class EvaluateConfig(Section):
    at: list[Positive] = Field(default_factory=lambda: [10, 50, 100, 500], min_length=1,
                               description="list lengths K of recall, NDCG and hit rate")
    queries: Positive | None = Field(5000, description="test views sampled; null: all")
    curve_queries: Positive = Field(1500, description="of these, the ones control curves are drawn from")
    validation_queries: Positive | None = Field(2000, description="validation views sampled; null: all")
    future: Positive = Field(1, description="next target views that count as relevant to a query")
    strategies: list[Literal["null", "average", "maximum", "multiplexed", "fixed", "oracle"]] = Field(
        default_factory=lambda: ["null", "average", "maximum", "multiplexed", "fixed", "oracle"],
        min_length=1, description="how the condition is chosen at inference (CRM, section 3.2)")
    fixed_s: list[PositiveFloat] = Field(default_factory=lambda: [60.0], description="seconds, of strategy fixed")
    multiplexed_p: Share = Field(0.5, description="share of requests that multiplexing gives the maximum")
    multiplexed_n: Positive = Field(32, description="latest watch times that multiplexing looks at")
    curve_s: list[PositiveFloat] = Field(default_factory=lambda: [10.0, 30.0, 60.0, 120.0, 300.0], min_length=2,
                                         description="seconds; conditions of the control curve")
    lift_edges_s: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [0.0, 7.0, 17.0, 42.0, 85.0, 190.0], min_length=2,
        description="seconds; lower edges of the lift's buckets")
    bayes_edges_s: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [0, 4, 6, 9, 14, 20, 30, 45, 65, 90, 130, 200], min_length=2,
        description="seconds; lower edges of the Bayes term's watch buckets")
    bayes_prior_views: PositiveFloat = Field(20.0, description="views of the duration bin as prior of the Bayes term")
    watch_prior_views: PositiveFloat = Field(10.0, description="views of the duration bin an item's mean is shrunk by")
    bootstrap: Positive = Field(1000, description="bootstrap samples of an interval")
    seed: Seed = Field(0, description="seed of the sampled queries and the bootstrap")
    split_users: bool = Field(True, description="bootstrap over users (true) or over queries")
    read_histories: bool = Field(False, description="on the synthetic world: also the ceilings of one who must read "
                                                    "the user from the log, about 50 ms of CPU a query, 2,000 at most")

    @field_validator("strategies", mode="before")
    @classmethod
    def _null_is_a_name(cls, value):
        """YAML reads the strategy `null` as nothing."""
        return ["null" if v is None else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _rising(self):
        for name in ("curve_s", "lift_edges_s", "bayes_edges_s"):
            values = getattr(self, name)
            if any(a >= b for a, b in zip(values, values[1:], strict=False)):
                raise ValueError(f"{name} must rise, each value above the one before: {values}")
        return self


class SwingConfig(Section):
    alpha: Annotated[float, Field(ge=0)] = Field(1.0, description="views; smooths the overlap of two users (alpha)")
    max_users_per_item: Positive | None = Field(1000, description="users of an item that are paired; more are sampled")
    max_items_per_user: Positive | None = Field(500, description="items of a user that count; of more, the latest")
    seed: Seed = Field(0, description="seed of the sampled users")


class EmbeddingChannelConfig(Section):
    source: Literal["crm", "svd"] = Field(
        "svd", description="crm: item vectors of an unconditioned tower trained on nothing after the watermark; "
                           "svd: of the shifted PPMI of co-views")
    dim: Positive = Field(64, description="width of the svd vectors, floats")
    shift: PositiveFloat = Field(1.0, description="k of the shifted PPMI: log k is taken off")
    window: Positive = Field(10, description="effective views around a view that count as co-viewed (svd)")
    epochs: Positive = Field(2, description="passes over each slice of the tower (crm)")
    tower: Literal["dnn", "decision_transformer"] = Field("dnn", description="the tower (crm)")
    seed: Seed = Field(0, description="seed of the tower or of the svd")


class ContentChannelConfig(Section):
    hashed_dim: Positive = Field(256, description="width of hashed author, tag and duration features, where the "
                                                  "catalogue has no content vectors")
    author_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="weight of the author among hashed features")
    duration_weight: Annotated[float, Field(ge=0)] = Field(0.3, description="weight of the duration among them")


class PairwiseLrConfig(Section):
    candidates: Positive = Field(200, description="most co-viewed items of an item that are scored")
    window: Positive = Field(20, description="effective views around a view that count as co-viewed")
    label_h: PositiveFloat = Field(24.0, description="hours before the watermark that the labels are taken from")
    pairs: Positive = Field(500_000, description="pairs the regression is fitted on, at most")
    seed: Seed = Field(0, description="seed of the sampled pairs")


class SessionChannelConfig(Section):
    decay_h: PositiveFloat = Field(12.0, description="hours in which the weight of a transition falls by e")
    max_gap: Positive = Field(5, description="views between the two of a transition, at most; its weight is 1 / gap")


ChannelName = Literal["swing", "embedding", "content", "pairwise-lr", "session"]


class ChannelsConfig(Section):
    """Item-to-item channels, published as snapshots with a watermark."""

    names: list[ChannelName] = Field(default_factory=lambda: ["swing", "embedding", "content"], min_length=1,
                                     description="the channels, in the order of the labels")
    top: Positive = Field(50, description="neighbours of an item that a snapshot keeps")
    window_h: PositiveFloat | None = Field(None, description="hours of logs before a watermark that count; null: all")
    min_items_with_list: Share = Field(
        0.0, description="gate: share of the items seen before the watermark that have neighbours, else the snapshot "
                         "is not published")
    rollback_min: Annotated[float, Field(ge=0)] = Field(
        20.0, description="minutes after its watermark from which a snapshot is in use")
    snapshots: Literal["requests", "daily"] | None = Field(
        None, description="requests: one for each of replay's cuts, its rollback before it; daily: one at the "
                          "beginning of each day; null: daily where train.slices is or requests are sampled views")
    before_first: Literal["error", "empty"] = Field(
        "error", description="a request before the first snapshot: an error, or empty lists")
    swing: SwingConfig = Field(default_factory=SwingConfig, description="co-viewing, damped for busy users")
    embedding: EmbeddingChannelConfig = Field(default_factory=EmbeddingChannelConfig, description="item vectors")
    content: ContentChannelConfig = Field(default_factory=ContentChannelConfig, description="the catalogue's features")
    pairwise_lr: PairwiseLrConfig = Field(default_factory=PairwiseLrConfig, description="regression on pair features")
    session: SessionChannelConfig = Field(default_factory=SessionChannelConfig, description="transitions in a session")

    @field_validator("names")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a channel stands there twice")
        return value


class Cut(Section):
    """One request for every user at one time."""

    at: datetime = Field(description="time of the requests, local at data.utc_offset_h")
    until: datetime | None = Field(None, description="end of their future; null: of all logs, for training requests "
                                                     "the first test request")

    @field_validator("at", "until", mode="before")
    @classmethod
    def _midnight(cls, value):
        """A date stands for its midnight."""
        return datetime(value.year, value.month, value.day) if type(value) is date else value

    @model_validator(mode="after")
    def _in_order(self):
        if any(t is not None and t.tzinfo is not None for t in (self.at, self.until)):
            raise ValueError("times are local at data.utc_offset_h; leave the time zone out")
        if self.until is not None and self.until <= self.at:
            raise ValueError(f"until ({self.until}) must be after at ({self.at})")
        return self


class RequestsConfig(Section):
    """Which requests are replayed: cuts (one request a user at given times), or sampled views."""

    train_cuts: list[Cut] | None = Field(None, description="times of the training requests; null: sampled views")
    test_cuts: list[Cut] | None = Field(None, description="times of the test requests; null: sampled views")
    every: Positive = Field(5, description="views: every k-th effective view of a user is a request")
    per_user: Positive = Field(4, description="views: requests a user on each side, at most, the latest ones")
    train_days: PositiveFloat = Field(3.0, description="views: days before split.test_start training requests are "
                                                       "from")
    triggers: Positive = Field(50, description="latest rows of a user that are triggers; repeats count once")
    triggers_from: Literal["rows", "effective"] = Field("rows", description="all rows, impressions included, or "
                                                                            "effective views only")
    min_triggers: Positive = Field(10, description="distinct triggers that a training request needs")
    min_future: Positive = Field(1, description="distinct later items that a training request needs")
    test_min_triggers: Positive = Field(20, description="distinct triggers that a test request needs")
    test_min_future: Positive = Field(3, description="distinct later items that a test request needs")
    future_min_watch_s: PositiveFloat | None = Field(
        None, description="seconds; views this long are the future; null: the effective views")

    @model_validator(mode="after")
    def _both(self):
        if (self.train_cuts is None) != (self.test_cuts is None):
            raise ValueError("give train_cuts and test_cuts, or neither")
        for name in ("train_cuts", "test_cuts"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} is empty; give one cut, or null for sampled views")
        if self.train_cuts:
            first = min(c.at for c in self.test_cuts)
            for cut in self.train_cuts:
                if (cut.until or cut.at) > first:
                    raise ValueError(f"train_cuts end at {cut.until or cut.at}, after the first test request ({first})")
        return self


class ReplayConfig(Section):
    """Value attribution (VAM, CAPTS Eq. 3-5, 10-11)."""

    requests: RequestsConfig = Field(default_factory=RequestsConfig, description="the requests that are replayed")
    window: Positive = Field(100, description="W: next effective views that a trigger is credited with")
    null_watch_s: Annotated[float, Field(ge=0)] = Field(0.0, description="seconds; value of a view without watch time")
    scale_s: PositiveFloat | None = Field(None, description="s_c, seconds; null: the channel's mean positive value")
    cap: PositiveFloat = Field(5.0, description="k_c: highest intensity")
    tau_s: PositiveFloat | None = Field(3.0, description="tau_c, seconds; null: the tau_quantile of positive values")
    tau_quantile: Share = Field(0.5, description="quantile of a channel's positive values, where tau_s is null")
    eta: Share | None = Field(None, description="share of unique items from which a list is diverse; null: the median")
    shards_at_once: Positive | None = Field(None, description="shards in memory at once; null: the cores")


class RouterModelConfig(Section):
    """One router to train: the full model, or an ablation."""

    name: str = Field(description="name of its selector, in run folders and metrics.json")
    diversity: bool = Field(True, description="the uniqueness heads and their share of the score (Eq. 12-13, 15)")
    calibrator: bool = Field(True, description="the bounded correction and its loss (Eq. 7, 9)")
    window: Positive | None = Field(None, description="W of its labels; null: replay.window")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "_-" for c in value):
            raise ValueError("a router's name has letters, digits, _ and - alone: it names folders and metrics")
        return value


def _capts_and_ablations() -> list[RouterModelConfig]:
    return [RouterModelConfig(name="capts"), RouterModelConfig(name="capts-no-diversity", diversity=False),
            RouterModelConfig(name="capts-no-calibrator", calibrator=False)]


class RouterConfig(Section):
    """CATR, the router that learns which trigger seeds which channel (CAPTS Eq. 6-15)."""

    models: list[RouterModelConfig] = Field(default_factory=_capts_and_ablations, min_length=1,
                                            description="the routers to train, each over every seed")
    dim: Positive = Field(64, description="width of trigger and user vectors, floats")
    hidden: Positive = Field(128, description="width of the heads' hidden layers")
    history: Positive = Field(50, description="recent effective views that triggers attend to")
    heads: Positive = Field(2, description="heads of the target attention")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="dropout in the heads")
    features: Literal["all", "trigger"] = Field("all", description="all: list-side and past-replay features, too; "
                                                                   "trigger: what is known of the trigger alone")
    tables: RouterTableConfig = Field(default_factory=RouterTableConfig, description="embedding tables")
    from_crm: bool = Field(False, description="start the tables from the published CRM model; widths must be equal")
    epochs: Positive = Field(3, description="passes over the training labels")
    batch_requests: Positive = Field(64, description="requests in a global batch (all workers together)")
    learning_rate: PositiveFloat = Field(1e-3, description="of the towers (AdamW)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="of the towers (AdamW)")
    calibration_weight: Annotated[float, Field(ge=0)] = Field(0.5, description="l_cal of Eq. 14")
    diversity_weight: Annotated[float, Field(ge=0)] = Field(0.2, description="l_div of Eq. 14")
    listwise_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of a softmax loss over a request's triggers; not in the paper")
    correction: PositiveFloat = Field(0.1, description="a of Eq. 7: the bound of the calibrator's correction")
    validation_share: Share = Field(0.1, description="share of the training users whose requests choose the epoch")

    @model_validator(mode="after")
    def _names(self):
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError("two routers have the same name")
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        return self


SelectorName = Literal["recent", "watch-time-top", "tag-top", "ltv", "nic", "pdn", "lic", "random", "past-replay",
                       "item-value", "oracle", "popular"]


class RoutingConfig(Section):
    """Which triggers each channel takes (Eq. 15), and how selectors are judged."""

    assignment: Literal["independent", "joint"] = Field(
        "independent", description="what serves (routing/serving.json): top-B per channel, or a greedy pick under the "
                                   "shared quota; both are measured")
    joint_shift: Share = Field(0.2, description="joint: share of a channel's B that may go to other channels")
    beta: Annotated[float, Field(ge=0)] = Field(0.1, description="weight of the uniqueness in the score (Eq. 15)")
    overlap: Annotated[float, Field(ge=0)] | None = Field(
        0.0, description="independent: taken off a router's score, times the share of the list that the channel's "
                         "picks before bring; 0, as in the paper, takes nothing; null: chosen on validation requests")
    budgets: list[Positive] = Field(default_factory=lambda: [5, 10, 20], min_length=1,
                                    description="B: triggers that a channel may take for a request")
    selectors: list[SelectorName] = Field(
        default_factory=lambda: ["recent", "watch-time-top", "tag-top", "ltv", "nic", "pdn", "lic", "random",
                                 "past-replay", "item-value", "oracle", "popular"], min_length=1,
        description="baselines and controls that the routers are judged beside")
    at: list[Positive] = Field(default_factory=lambda: [10, 50, 100, 200, 500, 1000, 2000], min_length=1,
                               description="K: items of each channel's list that count; `all` stands beside them")
    windows: list[Positive] = Field(default_factory=lambda: [50, 100, 150, 200], min_length=1,
                                    description="W of the evaluation's sensitivity table, next effective views")
    test_users: RoutingTestUsers = Field(default_factory=RoutingTestUsers,
                                         description="users of the test requests, where split.test_users is null")
    test_requests: Positive | None = Field(None, description="test requests, at most; null: all")
    bootstrap: Positive = Field(1000, description="bootstrap samples of an interval")
    seed: Seed = Field(0, description="seed of the random selector, the item values and the bootstrap")


class GatesConfig(Section):
    """Thresholds that end a run with exit code 3. Keys are paths in metrics.json, values the least mean allowed."""

    at_least: dict[str, float] = Field(
        default_factory=dict, description="metric path: least value; below it serving.json keeps what served before")


class RayConfig(Section):
    address: str | None = Field(None, description="a running cluster; null: RAY_ADDRESS, else a local one")
    cpus: PositiveFloat | None = Field(None, description="CPUs a local Ray is told of; null: enough for all workers")
    ingest_tasks: Positive | None = Field(None, description="ingest tasks at once; null: the cores")
    ingest_cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for an ingest task; it has one thread")
    channels_cpus: PositiveFloat = Field(1.0, description="CPUs, and as many threads, of a task that makes a channel")
    replay_cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a replay task; it has one thread")
    routing_cpus: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for a routing task; it has one thread")


class MlflowConfig(Section):
    """Credentials come from MLflow's own variables (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_TOKEN, ..)."""

    tracking_uri: Text = Field(description="server (http://..), or a store: sqlite:///FILE")
    experiment: Text = Field("watchtower", description="name of the experiment; made if it is not there")

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, value: str) -> str:
        if "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError("a user or password in the address would be written into the run folder; give them in "
                             "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return value


class StorageConfig(Section):
    """A run folder behind a URL (docs/cluster.md, Storage). None of it can change a result."""

    work_dir: Text | None = Field(
        None, description="folder of the driver's node that a run whose run_dir is a URL works in; "
                          "null: one in the user's cache (XDG_CACHE_HOME, ~/.cache)")
    every_s: Annotated[float, Field(gt=0, le=600)] = Field(
        5.0, description="seconds between two looks for what was published and is carried to the URL")
    attempts: Positive = Field(6, description="tries of an operation on the store, each after a longer wait")


class ObserveConfig(Section):
    """Seeing a run from outside (docs/observing.md). It cannot change a result, and no stage is done again for it."""

    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="port at which the driver serves Prometheus metrics; null: off")
    prometheus_address: Text = Field("127.0.0.1", description="address it binds; 0.0.0.0: all, with no password")
    textfile: str | None = Field(
        None, description="file that holds the same metrics for node_exporter; its name ends in .prom; null: off")
    textfile_every_s: PositiveFloat = Field(15.0, description="seconds between two writes of that file")
    mlflow: MlflowConfig | None = Field(None, description="MLflow tracking; null: off")

    @field_validator("textfile")
    @classmethod
    def _read_by_node_exporter(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".prom"):
            raise ValueError("node_exporter reads only files whose name ends in .prom")
        return value


StageName = Literal["ingest", "crm", "channels", "replay", "router", "evaluate", "report"]


class Config(Section):
    name: str = Field("watchtower", description="name of the run, in reports")
    run_dir: Text = Field("runs/watchtower", description="the run folder: a path, or a URL of s3://, gs:// or hdfs://")
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1, description="seeds each model is trained with")
    stages: list[StageName] = Field(
        default_factory=lambda: list(get_args(StageName)), min_length=1,
        description="stages asked for; what they need and is not there yet runs before them")
    data: DataConfig = Field(default_factory=DataConfig, description="logs, catalogue, users")
    split: SplitConfig = Field(default_factory=SplitConfig, description="training, validation and test")
    crm: CrmConfig = Field(default_factory=CrmConfig, description="the towers")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the training loop")
    index: IndexConfig = Field(default_factory=IndexConfig, description="the index rebuilt after every epoch")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="what is measured of CRM")
    channels: ChannelsConfig = Field(default_factory=ChannelsConfig, description="item-to-item channels")
    replay: ReplayConfig = Field(default_factory=ReplayConfig, description="look-ahead value attribution (VAM)")
    router: RouterConfig = Field(default_factory=RouterConfig, description="the router (CATR)")
    routing: RoutingConfig = Field(default_factory=RoutingConfig, description="routing and its judgement")
    gates: GatesConfig = Field(default_factory=GatesConfig, description="quality gates")
    ray: RayConfig = Field(default_factory=RayConfig, description="the cluster")
    storage: StorageConfig = Field(default_factory=StorageConfig, description="a run folder behind a URL")
    observe: ObserveConfig = Field(default_factory=ObserveConfig, description="metrics for Prometheus and MLflow")

    @model_validator(mode="after")
    def _batches_divide(self):
        for at, model in enumerate(self.crm.models):
            if isinstance(self.train.workers, int) and (model.batch_rows or 0) % self.train.workers:
                raise ValueError(f"crm.models.{at}.batch_rows ({model.batch_rows}) must be a multiple of train.workers "
                                 f"({self.train.workers}), so that every worker has as many rows")
            rows = model.batch_rows or self.train.batch_rows
            if self.crm.negative_groups > 1 and 2 * self.crm.negative_groups > rows:
                raise ValueError(f"crm.negative_groups ({self.crm.negative_groups}) leaves groups of one window, whose "
                                 f"targets have hardly a negative: at most half of the {rows} windows of a global "
                                 f"batch of model {model.name}, {rows // 2}")
        return self

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("a seed stands there twice")
        return value


__all__ = [name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, BaseModel)]
