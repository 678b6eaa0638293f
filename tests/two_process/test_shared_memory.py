"""The backend of CPU workers against what its collectives mean, spelled out over all ranks' inputs.

Every rank draws the same random calls, with the inputs of all ranks, so each knows what must come of it.
"""

import contextlib
import json
import os
import time

import numpy as np
import pytest
from spawn import run_ranks

TYPES = ("float32", "float64", "bfloat16", "int64", "int32", "uint8")


def calls(seed, world, count):
    """(kind, type, inputs by rank, splits[sender][receiver]), lengths from none to some that need more memory."""
    import torch

    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for number in range(count):
        kind = rng.choice(["all_to_all", "all_to_all_equal", "all_gather", "reduce_scatter", "all_reduce", "barrier"])
        dtype = getattr(torch, rng.choice(TYPES))
        length = int(rng.choice([0, 1, 3, 17, 1000, 30_000, 300_000])) if number != 7 else 5_000_000
        if kind == "all_to_all" and length > 300_000:
            length = 300_000
        splits = rng.multinomial(length, rng.dirichlet(np.ones(world)), size=world)
        width = (int(rng.integers(1, 4)),) if rng.random() < 0.4 else ()
        rows = {"all_to_all": length, "all_gather": length // 10, "all_reduce": length}.get(kind, world * (length // 9))
        inputs = [torch.randint(0, 9, (rows, *width), generator=generator).to(dtype) for _ in range(world)]
        yield kind, inputs, splits, rng.random() < 0.5


def begin(kind, rank, inputs, splits):
    """Begins the collective: (work, where the result will be, what it must be)."""
    import torch
    import torch.distributed as dist

    mine, world = inputs[rank].clone(), len(inputs)
    if kind == "all_to_all":
        out = mine.new_full((int(splits[:, rank].sum()), *mine.shape[1:]), 77)
        expected = torch.cat([whole.split(splits[sender].tolist())[rank] for sender, whole in enumerate(inputs)])
        work = dist.all_to_all_single(out, mine, splits[:, rank].tolist(), splits[rank].tolist(), async_op=True)
    elif kind == "all_to_all_equal":
        out, expected = torch.empty_like(mine), torch.cat([whole.chunk(world)[rank] if len(whole) else whole
                                                           for whole in inputs])
        work = dist.all_to_all_single(out, mine, async_op=True)
    elif kind == "all_gather":
        out, expected = mine.new_empty(world * len(mine), *mine.shape[1:]), torch.cat(inputs)
        work = _named("all_gather")(out, mine, async_op=True)
    elif kind == "reduce_scatter":
        out, total = mine.new_empty(len(mine) // world, *mine.shape[1:]), in_order(inputs)
        expected = total.chunk(world)[rank] if len(total) else total
        work = _named("reduce_scatter")(out, mine, async_op=True)
    elif kind == "all_reduce":
        out, expected = mine.clone(), in_order(inputs)
        work = dist.all_reduce(out, async_op=True)
    else:
        out = expected = mine
        work = dist.barrier(async_op=True)
    mine.fill_(5)  # what was handed over may be written to at once
    return work, out, expected


def _named(name):
    import torch.distributed as dist

    return getattr(dist, f"{name}_single", None) or getattr(dist, {"all_gather": "all_gather_into_tensor"}.get(
        name, "reduce_scatter_tensor"))


def in_order(inputs):
    total = inputs[0].clone()
    for other in inputs[1:]:
        total += other
    return total


def well(rank, world, seed):
    """Calls one by one and several at once, waited for in another order than they began; the rest that is gloo's."""
    import torch
    import torch.distributed as dist

    from trainer.shared_memory import SharedMemoryGroup

    assert isinstance(dist.group.WORLD, SharedMemoryGroup) and dist.get_backend() == "watchtower"
    pending, wrong, kinds = [], [], set()

    def look():
        for at in np.random.default_rng(len(wrong)).permutation(len(pending)):
            kind, work, out, expected = pending[at]
            work.wait()
            assert work.is_completed()
            kinds.add(kind)
            if not torch.equal(out, expected):
                wrong.append((kind, out.dtype, tuple(out.shape)))
        pending.clear()

    for kind, inputs, splits, at_once in calls(seed, world, 120):
        pending.append((kind, *begin(kind, rank, inputs, splits)))
        if at_once or len(pending) == 9:
            look()
    look()

    # Real numbers: the same bits on every rank, whatever the length.
    bits = []
    for length in (3, 5_000, 100_001, 9_000_000):
        x = torch.randn(length, generator=torch.Generator().manual_seed(rank))
        dist.all_reduce(x)
        bits.append(x.double().sum().item())
        strided = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).t()
        dist.all_reduce(strided)
        bits.append(strided.double().sum().item())

    told = [None] * world
    dist.all_gather_object(told, {"rank": rank})
    box = [f"from {rank}"]
    dist.broadcast_object_list(box, src=world - 1)
    most = torch.tensor([rank, -rank])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    part = dist.new_group(list(range(1, world)))
    if rank:
        inside = torch.ones(3)
        dist.all_reduce(inside, group=part)
        assert inside.tolist() == [world - 1] * 3
    # What was begun ends while it is asked after, and in whatever mode.
    with torch.inference_mode():
        x = torch.ones(70_000)
        work = dist.all_reduce(x, async_op=True)
        while not work.is_completed():
            time.sleep(0.001)
        assert x.eq(world).all()
    for _ in range(5):
        x = torch.ones(70_000)
        dist.all_reduce(x)
        assert x.eq(world).all()

    several = [torch.zeros(world * length) for length in (3, 40_000, 1)]
    with dist._coalescing_manager(group=dist.group.WORLD):
        for out in several:
            _named("all_gather")(out, torch.full((len(out) // world,), float(rank)))
    assert all(torch.equal(out, torch.arange(world).repeat_interleave(len(out) // world).float()) for out in several)
    for op, sums in ((dist.ReduceOp.SUM, sum(range(world))), (dist.ReduceOp.MAX, world - 1)):
        several = [torch.zeros(length) for length in (2, 30_000, 5)]
        with dist._coalescing_manager(group=dist.group.WORLD):
            for out in several:
                _named("reduce_scatter")(out, torch.full((world * len(out),), float(rank)), op=op)
        assert all(out.eq(sums).all() for out in several), op

    for output, given in ((torch.zeros(2), torch.zeros(2 * world, dtype=torch.int32)),
                          (torch.zeros(9), torch.zeros(3))):
        with pytest.raises(ValueError, match="cannot take what comes of"):
            _named("reduce_scatter")(output, given)
    with pytest.raises(ValueError, match="cannot take what comes of"):
        _named("all_gather")(torch.zeros(world + 1), torch.zeros(1))
    with pytest.raises(ValueError, match="contiguous"):
        dist.all_to_all_single(torch.zeros(world, 2), torch.zeros(2, world).t())
    with pytest.raises(ValueError, match=r"3 rows are not as many|of a tensor with 3|rows for"):
        dist.all_to_all_single(torch.zeros(3), torch.zeros(3), [1] * world, [5] * world)
    dist.barrier()
    return wrong, sorted(kinds), bits, told, box, most.tolist()


@pytest.mark.parametrize(("world", "seed"), [(2, 0), (3, 1)])
def test_every_collective_is_what_it_means(world, seed):
    results = run_ranks(world, well, seed, timeout_s=120)
    for wrong, kinds, _, told, box, most in results:
        assert wrong == []
        assert len(kinds) == 6
        assert told == [{"rank": rank} for rank in range(world)]
        assert box == [f"from {world - 1}"] and most == [world - 1, 0]
    assert all(result[2] == results[0][2] for result in results)


def badly(rank, world, folder):
    """What a rank hears when the other calls something else, is late, has no file left, or is gone."""
    import resource
    import signal
    import tempfile
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from trainer.workers import limit_collectives

    tempfile.tempdir = folder
    told = {}

    def hear(what, act):
        began = time.monotonic()
        try:
            act()
            told[what] = None
        except RuntimeError as error:
            told[what] = str(error)
        told[f"{what}, seconds"] = time.monotonic() - began

    def group():
        return dist.new_group(timeout=timedelta(seconds=60))

    def uneven(within):
        size = [3, 4][rank]
        dist.all_to_all_single(torch.zeros(8), torch.zeros(8), [4, 4], [size, 8 - size], group=within)

    within = group()
    hear("uneven", lambda: uneven(within))
    hear("after it", lambda: dist.all_reduce(torch.zeros(1), group=within))
    within = group()
    hear("another length", lambda: dist.all_reduce(torch.zeros(3 - 2 * rank), group=within))
    within = group()
    hear("another type", lambda: dist.all_reduce(torch.zeros(2, dtype=[torch.int32, torch.float32][rank]),
                                                 group=within))
    within = group()
    calls = [lambda: _named("all_gather")(torch.zeros(2), torch.zeros(1), group=within),
             lambda: dist.all_reduce(torch.zeros(1), group=within)]
    hear("another collective", calls[rank])

    # Only one is out of numbers for open files, as the other hands over more memory.
    within = group()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for _ in range(5):  # what is small has its memory
        dist.all_reduce(torch.zeros(2), group=within)
    dist.barrier()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
        full = []
        with contextlib.suppress(OSError):
            while True:
                full.append(os.open("/dev/null", os.O_RDONLY))
        hear("no file", lambda: dist.all_to_all_single(torch.zeros(200_000), torch.zeros(4), [200_000 - 2, 2], [2, 2],
                                                       group=within))
        for file in full:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    else:
        hear("no file", lambda: dist.all_to_all_single(torch.zeros(4), torch.zeros(200_000), [2, 2],
                                                       [2, 200_000 - 2], group=within))

    within = group()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1.0), within)
    if rank:
        time.sleep(2.5)
    hear("late", lambda: dist.all_reduce(torch.zeros(1), group=within))
    limit_collectives(60.0)
    within = group()
    dist.barrier()
    held = [name for name in os.listdir(folder) if name.startswith("watchtower")]
    if rank:
        with open(f"{folder}/told", "w") as file:
            json.dump(told, file)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    hear("gone", lambda: dist.all_reduce(torch.zeros(1), group=within))
    hear("gone, once more", lambda: dist.all_reduce(torch.zeros(1), group=within))
    with open(f"{folder}/first", "w") as file:
        json.dump([told, held], file)


def test_what_is_wrong_is_said_and_ends_the_group(tmp_path):
    with pytest.raises(RuntimeError, match="rank 1 of 2: died with exit code -9"):
        run_ranks(2, badly, str(tmp_path), timeout_s=90)
    second = json.loads((tmp_path / "told").read_text())
    first, held = json.loads((tmp_path / "first").read_text())
    assert "rank 0 sends 12 bytes, 16 are expected of it" in first["uneven"]
    assert "rank 0 sends 20 bytes, 16 are expected of it" in second["uneven"] or "rank 0 is gone" in second["uneven"]
    assert first["after it"] == first["uneven"]
    assert "rank 1 adds 4 bytes, 12 are expected of it" in first["another length"] or "gone" in first["another length"]
    assert "rank 0 adds 12 bytes, 4 are expected" in second["another length"] or "gone" in second["another length"]
    for what in ("another type", "another collective"):
        heard = [first[what], second[what]]
        assert all(one and ("is at its collective 0 (" in one or "is gone" in one) for one in heard), heard
        assert any("is at its collective 0 (" in one for one in heard), heard
    assert "no open file is left for memory of rank 0; raise ulimit -n" in second["no file"]
    assert second["no file, seconds"] < 5
    assert "has not come to the collective for 1 s" in first["late"]
    assert 0.9 < first["late, seconds"] < 2.3
    assert "rank 0 is gone" in second["late"]  # whose time was over hears so at once, not after its own
    assert "rank 1 is gone" in first["gone"] and 0.3 < first["gone, seconds"] < 5
    assert first["gone, once more"] == first["gone"]
    assert held == []  # nothing has a name


def apart(rank, world, folder):
    """Ranks of which one has no socket, or cannot reach the other's, train over gloo."""
    import socket
    import tempfile

    import torch
    import torch.distributed as dist

    from trainer.shared_memory import SharedMemoryGroup

    def kind():
        group, x = dist.new_group(), torch.ones(3)
        dist.all_reduce(x, group=group)
        assert x.tolist() == [2.0] * 3
        return isinstance(group, SharedMemoryGroup)

    if rank == 1:
        tempfile.tempdir = folder  # a socket's path has no room for it
    kinds = [kind()]
    tempfile.tempdir = None
    if rank == 1:
        reach = socket.socket.connect
        socket.socket.connect = lambda bell, place: reach(bell, f"{place} of another file system")
    kinds.append(kind())
    if rank == 1:
        socket.socket.connect = reach
    return [*kinds, kind()]


def test_workers_that_do_not_reach_each_other_train_over_gloo(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    assert run_ranks(2, apart, str(folder), timeout_s=60) == [[False, False, True]] * 2
    assert list(folder.iterdir()) == []
