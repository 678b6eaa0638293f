"""Swing against recfarm (Rust), the same users and items on the same cores.

    python benchmarks/swing.py [--users N] [--items N] [--views N] [--rounds 5] [--json PATH]

Both begin with who watched what in memory, by user and by item (CSR), and end with scored neighbours of every item:
ours with the best 50 of each as published, recfarm with all of them in its own table. Each is a process of its own,
with a thread a core. recfarm leaves the item itself out of the intersection, so it is given alpha + 1; that the scores
agree is checked first, on a small world in which users of one item ask recfarm for single scores. Caps are off.

    rows: speed (recfarm's time / ours), memory (peak above the input / recfarm's)
"""

from __future__ import annotations

import sys
import tempfile
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rows import PEERS, PeakMemory, Process, alternating, cores, over, parser, report, row, serve

ALPHA, TOP = 1.0, 50
CACHED_PAIRS = 100_000_000  # recfarm's max_cache_num, at the default of LibRecommender, which it was made for
TOLERANCE = 2e-5  # relative: recfarm adds up in float32


# ---------------------------------------------------------------------------------------------------------- the sides

def ours(folder: Path, threads: int):
    """Answers with seconds and MiB of one build; a first, unmeasured one has compiled the kernels."""
    import numpy as np

    from configs.schema import ChannelsConfig
    from trainer.channels.channel import Given
    from trainer.channels.swing import Swing
    from trainer.co_views import CoViews

    user_V, item_V = (np.fromfile(folder / f"{name}.i32", np.int32) for name in ("user", "item"))
    views = CoViews.of_views(user_V, item_V, np.arange(len(item_V)), int(item_V.max()) + 1, len(item_V))
    config = ChannelsConfig.model_validate({
        "top": TOP, "swing": {"alpha": ALPHA, "max_users_per_item": None, "max_items_per_user": None}})
    small = CoViews.of_views(user_V[:99], item_V[:99], np.arange(99), views.rows, 99)
    Swing().build(small, Given(config, None, threads=threads))

    def answer(ask: str, pairs=()) -> dict[str, Any]:
        with PeakMemory() as memory:
            began = time.perf_counter()
            lists = Swing().build(views, Given(config, None, threads=threads)).lists
            seconds = time.perf_counter() - began
        if ask == "scores":
            return {"scores": [[int(item), int(other), float(score)] for item in range(views.rows)
                               for other, score in zip(lists.of(item), lists.score_L[lists.offset_N1[item]:],
                                                       strict=False)]}
        return {"seconds": seconds, "mib": memory.above, "scores": len(lists.score_L)}

    return answer


def recfarm(folder: Path, threads: int):
    import recfarm as peer

    def read(name: str, kind: str = "i") -> list[int]:
        values = array(kind)
        values.frombytes((folder / name).read_bytes())
        return values.tolist()

    users, items = read("shape.i32")

    def sparse(name: str) -> SimpleNamespace:
        indices = read(f"{name}.indices.i32")
        return SimpleNamespace(sparse_indices=indices, sparse_indptr=read(f"{name}.indptr.i64", "q"),
                               sparse_data=[1.0] * len(indices))

    by_user, by_item = sparse("by_user"), sparse("by_item")

    def answer(ask: str, pairs=()) -> dict[str, Any]:
        # Its top is only how many neighbours a prediction looks at.
        model = peer.Swing(items, ALPHA + 1, CACHED_PAIRS, users, items, by_user, by_item, {}, 0.0)
        with PeakMemory() as memory:
            began = time.perf_counter()
            model.compute_swing(threads)
            seconds = time.perf_counter() - began
        if ask == "scores":
            return {"scores": model.predict([user for user, _ in pairs], [item for _, item in pairs])}
        return {"seconds": seconds, "mib": memory.above, "scores": model.num_swing_elements()}

    return answer


SIDES = {"ours": (sys.executable, ours), "recfarm": (PEERS / "bin" / "python", recfarm)}


def started(name: str, folder: Path, threads: int) -> Process:
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])} if name == "ours" else {}
    return Process([SIDES[name][0], __file__, "--side", name, "--folder", folder, "--threads", threads], threads, path)


# ----------------------------------------------------------------------------------------------------------- the data

def write_pairs(folder: Path, users: int, items: int, views: float, probes: bool = False) -> dict[str, int]:
    """Distinct effective (user, item) pairs of a world as files that both sides read.

    Args:
        probes: add a user for each item who watched it alone: such a user changes no score, and recfarm predicts for
            them by the scores of that one item.
    """
    import numpy as np
    from worlds import make_sequences, make_world, world_config

    from trainer.co_views import CoViews

    with tempfile.TemporaryDirectory(prefix="swing-world-") as name:
        make_world(Path(name), users=users, items=items, views_per_user=views, seed=0)
        store = make_sequences(Path(name), world_config(Path(name)))
        views = CoViews.build(store, store.manifest["watermark_ms"], None)
    user_P = np.repeat(np.arange(len(views.user_id_U), dtype=np.int32), views.items_U)
    item_P = views.item_P.astype(np.int32)
    if probes:
        more = np.arange(views.rows, dtype=np.int32)
        user_P, item_P = np.append(user_P, len(views.user_id_U) + more), np.append(item_P, more)
    user_P, item_P = (values[np.lexsort((item_P, user_P))].astype(np.int32) for values in (user_P, item_P))
    shape = int(user_P.max()) + 1, views.rows
    user_P.tofile(folder / "user.i32")
    item_P.tofile(folder / "item.i32")
    np.array(shape, np.int32).tofile(folder / "shape.i32")
    turned = np.lexsort((user_P, item_P))
    for side, key_P, value_P, size in (("by_user", user_P, item_P, shape[0]),
                                       ("by_item", item_P[turned], user_P[turned], shape[1])):
        value_P.tofile(folder / f"{side}.indices.i32")
        np.searchsorted(key_P, np.arange(size + 1)).astype(np.int64).tofile(folder / f"{side}.indptr.i64")
    return {"pairs": len(user_P), "users": len(views.user_id_U), "items": shape[1] - 1}


def check_scores(folder: Path, threads: int) -> int:
    """How many scores of ours recfarm gives too.

    Raises:
        AssertionError: one that differs.
    """
    facts = write_pairs(folder, users=300, items=150, views=20, probes=True)
    with started("ours", folder, threads) as side:
        found = side.ask(ask="scores")["scores"]
    with started("recfarm", folder, threads) as side:
        theirs = side.ask(ask="scores", pairs=[[facts["users"] + item, other] for item, other, _ in found])["scores"]
    wrong = [(one, other) for one, other in zip(found, theirs, strict=True)
             if abs(one[2] - other) > TOLERANCE * one[2]]
    assert found and not wrong, f"{len(wrong)} of {len(found)} scores differ: {wrong[:5]}"
    return len(found)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--users", type=int, default=6000)
    made.add_argument("--items", type=int, default=7500)
    made.add_argument("--views", type=float, default=60, help="views of a user, mean; about half are effective")
    made.add_argument("--side", choices=SIDES, help="be this side (the benchmark starts them itself)")
    made.add_argument("--folder", type=Path)
    made.add_argument("--threads", type=int, default=len(cores()))
    arguments = made.parse_args()
    if arguments.side:
        serve(SIDES[arguments.side][1](arguments.folder, arguments.threads))
        return 0
    with tempfile.TemporaryDirectory(prefix="swing-") as name:
        folder = Path(name)
        agreed = check_scores(folder, arguments.threads)
        facts = write_pairs(folder, arguments.users, arguments.items, arguments.views)
        with (started("ours", folder, arguments.threads) as one, started("recfarm", folder, arguments.threads) as two):
            found = alternating(arguments.rounds, {"ours": lambda: one.ask(ask="time"),
                                                   "recfarm": lambda: two.ask(ask="time")})
    seconds, mib = ({side: [answer[key] for answer in answers] for side, answers in found.items()}
                    for key in ("seconds", "mib"))
    sizes = (f"{facts['pairs']:,} pairs of {facts['users']:,} users and {facts['items']:,} items, "
             f"{arguments.threads} threads")
    rows = [row("swing: recfarm's time / ours", over(seconds["recfarm"], seconds["ours"]), 50, sizes=sizes,
                seconds=seconds, scores_checked=agreed),
            row("swing: peak memory / recfarm's", over(mib["ours"], mib["recfarm"]), 1.0, "lower", sizes=sizes,
                mib=mib)]
    return report(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
