"""Two workers that stop at the same step, that hear of a rank which failed, and that do not wait for one that hangs."""

import json
import time

import pytest
from spawn import run_ranks

from embeddings.attempts import begin_driver, begin_group


def agreeing(rank, world_size):
    """Everything that ends well, in one start."""
    import torch
    import torch.distributed as dist

    from configs.errors import WatchtowerError
    from trainer import workers as workers_module
    from trainer.watchdog import moved
    from trainer.workers import Workers, limit_collectives

    told = {}
    workers = Workers.joined(torch.device("cpu"))
    for step in range(1, 9):
        if rank == 1 and step == 4:
            workers.stop.ask("SIGTERM to a worker")
            workers.stop.ask("another reason, too late")
        told["mean"] = workers.mean(torch.tensor(float(rank + step)))
        if workers.stop.agreed:
            break
    told |= {"stopped": step, "reason": workers.stop_reason()}

    # A group that is made later, and the one that is there, have the limit of the config.
    limit_collectives(77.0)
    groups = (dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0, 1], backend="gloo"))
    told["limits"] = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    # What the first worker does alone may take longer than a collective: the others hear that it goes on.
    signs = []
    workers_module.SIGN_OF_LIFE_S = 0.05
    workers_module.moved = lambda *_, **how: signs.append(how)

    def gets_on():
        for _ in range(40):
            time.sleep(0.05)
            moved("a file")
        return "done"

    told["alone"] = workers.on_first(gets_on)
    told["signs"] = len(signs)
    for name, error in (("ours", WatchtowerError("no room")), ("not ours", ValueError("a bug"))):
        def fails(error=error):
            raise error
        try:
            workers.on_first(fails)
        except Exception as failed:
            told[name] = (type(failed).__name__, str(failed))
    workers.barrier()  # they are still in step
    return told


def test_two_workers_agree():
    first, second = run_ranks(2, agreeing)
    assert first["stopped"] == second["stopped"] == 4
    assert first["mean"] == second["mean"] == 4.5
    assert first["reason"] == second["reason"] == "SIGTERM to a worker"
    assert first["limits"] == second["limits"] == [77.0] * 3
    assert (first["alone"], second["alone"]) == ("done", None) and min(first["signs"], second["signs"]) > 4
    assert first["ours"] == second["ours"] == ("WatchtowerError", "no room")
    assert first["not ours"] == ("ValueError", "a bug")
    assert second["not ours"] == ("WatchtowerError", "the first worker failed: ValueError('a bug')")


def left_alone(rank, world_size, attempt, fault):
    """Rank 1 fails, or hangs, outside of any collective; rank 0 waits for it in one. Both processes live on, as a
    worker of Ray does after its function has failed."""
    import torch

    from trainer.watchdog import Watch, moved
    from trainer.workers import Workers

    workers = Workers.joined(torch.device("cpu"))
    limit_s = 10.0 if fault == "hangs" else None
    with Watch(attempt, f"rank-{rank}", limit_s, patience_s=2.0) as watch:
        for step in range(5):
            if rank == 1 and step == 3:
                if fault == "raises":
                    watch.fail(ValueError("the cause"))
                time.sleep(600)
            workers.mean(torch.zeros(()))
            moved(f"step {step}", in_step=True)


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_nobody_waits_for_a_rank_that_is_gone(tmp_path, fault, capfd):
    attempt = begin_group(begin_driver(tmp_path), "crm")
    with pytest.raises(RuntimeError, match="died with exit code 1"):  # and not by the collectives' limit
        run_ranks(2, left_alone, attempt, fault, timeout_s=200)
    told, said = json.loads((attempt.folder / "failed.json").read_text()), capfd.readouterr().err
    if fault == "raises":
        assert (told["who"], told["error"]) == ("rank-1", "ValueError: the cause")
        assert "rank-0: rank-1 has failed: ValueError: the cause" in said
    else:
        assert told["stuck"] and "nothing has moved" in told["error"] and "since step 2" in told["error"]
        for rank, where in enumerate(("all_reduce", "time.sleep(600)")):
            stacks = (attempt.folder / f"stacks-rank-{rank}.txt").read_text()
            assert where in stacks and "last move: step 2" in stacks and where in said
