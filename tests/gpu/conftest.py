"""The GPU lane (`make test-gpu`): the same towers, tables, index and run on one GPU as on a CPU."""

import sys
from pathlib import Path

import pytest
import torch

# The plain process and the batches of the parity tests are the reference here too.
sys.path.append(str(Path(__file__).parent.parent / "two_process"))


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
