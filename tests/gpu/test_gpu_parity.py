"""One GPU worker (TorchRec's tables and a DeepSpeed engine over NCCL) against one plain-PyTorch process on a CPU.

Without dropout, as a GPU draws its masks itself, and with masks by row. Products of a GPU add up in another order, so
losses and weights may be further apart than those of two CPU workers.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_parity import OPTIMIZERS, TOWERS, WITHOUT_GRADIENT, batches, differences, plain_run, sharded_run

from trainer import dropout

STEPS = 30
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-5, 2e-4
CASES = [(TOWERS[(stage + (name == "real")) % 2], stage, name) for stage in (0, 1, 2, 3) for name in OPTIMIZERS]


@pytest.fixture(scope="module", autouse=True)
def group(gpu):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=gpu)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made():
    return batches(0, 1, STEPS)


@pytest.fixture(scope="module")
def plain():
    return {(tower, name): plain_run(tower, name, STEPS, dropout=0.0) for tower in TOWERS for name in OPTIMIZERS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_gpu_equals_a_plain_process(gpu, made, plain, case):
    tower, stage, name = case
    found = sharded_run(made, tower, stage, "table_wise", name, device=gpu, dropout=0.0)
    loss, weight = differences(found, plain[tower, name], WITHOUT_GRADIENT if name == "real" else ())
    print(f"loss {loss:.1e}, weights {weight:.1e}")
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE


@pytest.fixture
def rows_everywhere():
    dropout.by_row(on_gpus=True)
    yield
    dropout.by_row(on_gpus=False)


@pytest.mark.usefixtures("rows_everywhere")
def test_masks_by_row_are_those_of_a_cpu(gpu):
    keys, masks = torch.randint(-2**62, 2**62, (999,)), []
    for device in ("cpu", gpu):
        torch.manual_seed(5)
        masks.append(dropout.Dropout(0.3)(torch.ones(999, 70, device=device), keys.to(device)).cpu())
    assert torch.equal(*masks)


@pytest.mark.usefixtures("rows_everywhere")
@pytest.mark.parametrize("tower", TOWERS)
def test_with_masks_by_row_a_gpu_equals_a_plain_process_with_dropout_too(gpu, made, tower):
    found = sharded_run(made, tower, 1, "table_wise", "real", device=gpu)
    loss, weight = differences(found, plain_run(tower, "real", STEPS), WITHOUT_GRADIENT)
    print(f"loss {loss:.1e}, weights {weight:.1e}")
    assert loss <= LOSS_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bfloat16_learns_as_single_precision_does(gpu, made, plain, tower, stage):
    losses, _ = sharded_run(made, tower, stage, "table_wise", "real", device=gpu, precision="bf16", dropout=0.0)
    expected, _ = plain[tower, "real"]
    off = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"loss {off:.1e} of {np.mean(expected):.2f}")
    assert 0 < off < 0.15
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def test_the_same_run_twice(gpu, made):
    """Bit for bit but for what atomic additions of the tables' gradients leave open."""
    first, second = (sharded_run(made, TOWERS[1], 1, "table_wise", "real", device=gpu, precision="bf16")
                     for _ in range(2))
    assert differences(second, first)[0] < 1e-2
    assert torch.cuda.max_memory_allocated(gpu) > 0
