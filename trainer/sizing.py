"""What a training needs of devices that are not there: memory of each, bytes between them, and the time of a step.

    memory    tables (float32 rows, 4 dim) and their optimizer (row-wise Adagrad: one float a row), where the plan puts
              them · towers: parameters, gradients, AdamW's two moments, masters, shared out by the ZeRO stage ·
              activations and lookups of one step · the index on the first device · what CUDA and NCCL take
    step      the sum of its parts, as if nothing overlapped: rows read and written in the tables, ids and rows between
              the devices (all-to-all), the towers' products, the softmax, the gathered targets, the towers' gradients
              (all-reduce), and the latency of all collectives

Peaks are those of data sheets, and a share of each is taken for granted (`Shares`). Memory is arithmetic; time is an
estimate to compare plans by. No time here was measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from embeddings.plan import FLOAT_BYTES, PlacedTable
from trainer.step_trace import StepTrace

GIB = 2**30
ID_BYTES = 8
ZERO_BUCKET = 50_000_000  # elements, as in trainer/engine.py
COLLECTIVES_A_SHARDING = 5  # of a lookup, forward and backward
OTHER_COLLECTIVES = 4  # targets gathered, their gradient scattered, the loss and the towers' gradients reduced
SOFTMAX_PASSES = 10  # times that the (R, G) float32 logits are read or written: product, mask, softmax, both backward


@dataclass(frozen=True)
class Device:
    """A kind of device. Bandwidths are bytes a second in one direction, rates floating-point operations a second.

    Attributes:
        memory_bytes: what torch sees of it. runtime_bytes: of that, what CUDA's context, NCCL and the allocator's gaps
            take (an assumption).
        low_flops, flops: peak of bfloat16 matrix products without sparsity, and of float32 ones.
        node_bandwidth, network_bandwidth: to devices of the same machine, and of others.
        per_node: devices of a machine. latency_s, peer_s: of a collective, and more for each peer of an all-to-all.
    """

    name: str
    kind: str
    memory_bytes: int
    runtime_bytes: int
    memory_bandwidth: float
    low_flops: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float
    per_node: int
    latency_s: float
    peer_s: float


# Sources. h100: NVIDIA H100 data sheet (SXM: 80 GB HBM3, 3.35 TB/s, BF16 1,979 TFLOPS with sparsity, FP32 67 TFLOPS,
# NVLink 900 GB/s both ways) and DGX H100 data sheet (one 400 Gb/s adapter a GPU). h200: NVIDIA H200 data sheet (141 GB
# HBM3e, 4.8 TB/s, the rest as H100). a100: NVIDIA A100 data sheet (SXM 80 GB, 2,039 GB/s, BF16 312, FP32 19.5 TFLOPS,
# NVLink 600 GB/s) and DGX A100 data sheet (200 Gb/s a GPU). Memory: the part of it that torch reports as total memory.
# cpu: one worker; 128 GiB and 51 GiB/s are TorchRec's own constants (planner/constants.py), which plan a CPU training
# too; 100 GFLOP/s is a few cores, 1.25 GB/s a 10 Gb/s network: assumptions. Latencies are assumptions everywhere.
DEVICES = {device.name: device for device in (
    Device("h100", "cuda", int(79.1 * GIB), 2 * GIB, 3.35e12, 989e12, 67e12, 450e9, 50e9, 8, 30e-6, 1e-6),
    Device("h200", "cuda", int(139.8 * GIB), 2 * GIB, 4.8e12, 989e12, 67e12, 450e9, 50e9, 8, 30e-6, 1e-6),
    Device("a100", "cuda", int(79.1 * GIB), 2 * GIB, 2.039e12, 312e12, 19.5e12, 300e9, 25e9, 8, 30e-6, 1e-6),
    Device("cpu", "cpu", 128 * GIB, 2 * GIB, 51 * GIB, 0.1e12, 0.1e12, 2e9, 1.25e9, 1, 300e-6, 50e-6),
)}


@dataclass(frozen=True)
class Shares:
    """Of each peak, the share that is counted on: assumptions."""

    matrix_products: float = 0.4
    random_rows: float = 0.3
    softmax: float = 0.6
    network: float = 0.7


@dataclass(frozen=True)
class Training:
    """What is asked of the devices.

    Attributes:
        device, devices, per_node: what there would be.
        rows: of the global batch. zero_stage, low (bfloat16 towers), adam (else SGD): of `train`.
        index_bytes: of the FAISS index; on_gpu: whether it lies in the first device's memory.
        items: of the catalogue. vector_width: of an index vector; 0 for a model without an index. negative_groups: that
            the rows of the global batch are dealt into for the softmax.
        shares: what is counted on.
    """

    device: Device
    devices: int
    per_node: int
    rows: int
    zero_stage: int
    low: bool
    adam: bool
    index_bytes: int
    index_on_gpu: bool
    items: int
    vector_width: int
    negative_groups: int = 1
    shares: Shares = Shares()

    @property
    def rows_a_device(self) -> int:
        return -(-self.rows // self.devices)

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)


@dataclass(frozen=True)
class Sizing:
    """One model on these devices.

    Attributes:
        fullest: the device with the least left. memory: bytes of its parts in a step. left: of its memory; below 0
            where it does not fit.
        epoch_end: bytes on the first device while it collects the item vectors. epoch_end_left: what is left then.
        host: bytes in the memory of the first device's machine, of the index and its vectors.
        seconds: of the parts of a step. all_to_all_bytes: sent by the device that sends most, in a step.
        rows: of the global batch.
    """

    fullest: int
    memory: dict[str, float]
    left: float
    epoch_end: dict[str, float]
    epoch_end_left: float
    host: float
    seconds: dict[str, float]
    all_to_all_bytes: float
    rows: int

    @property
    def fits(self) -> bool:
        return self.left >= 0 and self.epoch_end_left >= 0

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict:
        return {"fits": self.fits, "fullest_device": self.fullest,
                "memory_gib": {name: size / GIB for name, size in self.memory.items()}, "left_gib": self.left / GIB,
                "epoch_end_gib": {name: size / GIB for name, size in self.epoch_end.items()},
                "epoch_end_left_gib": self.epoch_end_left / GIB, "first_host_gib": self.host / GIB,
                "all_to_all_bytes": self.all_to_all_bytes,
                "step_ms": {name: seconds * 1e3 for name, seconds in self.seconds.items()} | {
                    "total": self.step_s * 1e3},
                "rows_per_s": self.rows / self.step_s}


def tower_bytes(parameters: int, zero_stage: int, low: bool, adam: bool, devices: int) -> float:
    """Of towers on one device, with P parameters of w bytes (2 bfloat16, 4 float32), N devices:

        stage 0      w P + w P gradients + 8 P moments, and as much as the gradients for their all-reduce
        stage 1      w P + w P + (4 P masters + 8 P moments) / N, and a bucket of w min(P, 50 million)
        stage 2      w P + w P / N + (12 P) / N and the bucket
        stage 3      w P / N + w P gathered in a step + w P / N + (12 P) / N and the bucket
    """
    width = 2 if low else 4
    moments = 8 * parameters if adam else 0
    whole = width * parameters
    if zero_stage == 0:
        return 2 * whole + moments + (whole if devices > 1 else 0)
    bucket = width * min(parameters, ZERO_BUCKET)
    shared = (4 * parameters + moments) / devices
    gradients = whole if zero_stage == 1 else whole / devices
    return whole + gradients + shared + bucket + (whole / devices if zero_stage == 3 else 0)


def size_up(training: Training, trace: StepTrace, tables: Sequence[PlacedTable]) -> Sizing:
    """Memory and time of one model's training."""
    devices, rows = training.devices, training.rows_a_device
    ids = {name: count * rows for name, count in trace.ids_per_row.items()}
    targets = trace.targets_per_row * rows
    # A column is a distinct item. How many are distinct the log decides; all of them, up to the catalogue, is the most.
    columns = min(targets * devices / training.negative_groups, float(training.items + 1))
    logits = targets * columns
    served_D = _served(tables, ids, devices)  # floats
    asked = sum(ids[table.name] * table.dim for table in tables)
    # Rows are dealt to devices and to groups in turn, so a device has rows of so many groups, and the columns of each.
    groups = training.negative_groups / math.gcd(training.negative_groups, devices)
    gathered = columns * groups * trace.gathered_width * FLOAT_BYTES
    memory_D = {
        "tables": sum(table.weight_bytes(devices) for table in tables).astype(float),
        "table_optimizer": sum(table.state_bytes(devices) for table in tables).astype(float),
        "towers": np.full(devices, tower_bytes(trace.parameters, training.zero_stage, training.low, training.adam,
                                               devices)),
        # Of the logits, backward makes two more matrices: their gradient, and that of the softmax.
        "activations": np.full(devices, trace.saved_bytes(rows, logits, training.low) + 2 * FLOAT_BYTES * logits
                               + 2 * gathered),
        # Rows where they lie and where they are used, and the gradients on the way back.
        "lookups": 2 * FLOAT_BYTES * (served_D + asked),
        "index": np.zeros(devices),
        "runtime": np.full(devices, float(training.device.runtime_bytes)),
    }
    if training.index_on_gpu:
        memory_D["index"][0] = training.index_bytes
    used_D = sum(memory_D.values())
    fullest = int(np.argmax(used_D))
    vectors = float(training.items * training.vector_width * FLOAT_BYTES)
    standing = ("tables", "table_optimizer", "towers", "index", "runtime")
    # The vectors as they arrive from the workers, and joined.
    epoch_end = {name: float(memory_D[name][0]) for name in standing} | {"item_vectors": 2 * vectors}
    seconds, sent = _step_seconds(training, trace, tables, ids, served_D, asked, logits, gathered)
    return Sizing(
        fullest=fullest, memory={name: float(sizes_D[fullest]) for name, sizes_D in memory_D.items()},
        left=training.device.memory_bytes - float(used_D[fullest]), epoch_end=epoch_end,
        epoch_end_left=training.device.memory_bytes - sum(epoch_end.values()),
        # The vectors, once more for exact search, the index, and its bytes while it is written.
        host=2 * vectors + 2 * training.index_bytes, seconds=seconds, all_to_all_bytes=sent, rows=training.rows)


def _served(tables: Sequence[PlacedTable], ids: dict[str, float], devices: int) -> np.ndarray:
    """float64 (devices,): floats that each device reads from its rows in a step of all devices."""
    served_D = np.zeros(devices)
    for table in tables:
        share = np.asarray(table.rows_per_rank) / table.rows
        served_D[list(table.ranks)] += share * ids[table.name] * devices * table.dim
    return served_D


def _step_seconds(training: Training, trace: StepTrace, tables: Sequence[PlacedTable], ids: dict[str, float],
                  served_D: np.ndarray, asked: float, logits: float, gathered: float
                  ) -> tuple[dict[str, float], float]:
    """The parts of a step in seconds, and the bytes that the busiest device sends in its all-to-alls."""
    device, devices, shares = training.device, training.devices, training.shares
    elsewhere = (devices - 1) / devices
    dim = tables[0].dim
    busiest = float(served_D.max())
    # Rows go out and come in, gradients the other way round; ids go once.
    one_way = max(busiest, asked) * FLOAT_BYTES * elsewhere
    id_bytes = max(busiest / dim, sum(ids.values())) * ID_BYTES * elsewhere
    bytes_sent = (busiest + asked) * FLOAT_BYTES * elsewhere + sum(ids.values()) * ID_BYTES * elsewhere
    low_peak = device.low_flops if training.low else device.flops
    loss_flops = trace.flops.per_logit * logits
    tower_flops = trace.flops.of(training.rows_a_device, logits) - loss_flops
    # Read; then read and written by the optimizer, with the gradient read and the state read and written.
    table_bytes = busiest * FLOAT_BYTES * 5 + busiest / dim * 2 * FLOAT_BYTES
    width = 2 if training.low else 4
    reduced = (3 if training.zero_stage == 3 else 2) * trace.parameters * width * elsewhere
    kinds = len({table.sharding for table in tables})
    latency = device.latency_s * (1 + math.log2(training.nodes))
    seconds = {
        "lookup": table_bytes / (device.memory_bandwidth * shares.random_rows),
        "all_to_all": _between(training, 2 * one_way + id_bytes),
        "towers": tower_flops / (low_peak * shares.matrix_products),
        "softmax": loss_flops / (device.flops * shares.matrix_products)
        + logits * FLOAT_BYTES * SOFTMAX_PASSES / (device.memory_bandwidth * shares.softmax),
        "gather": 2 * gathered * (1 - math.gcd(training.negative_groups, devices) / devices) / _ring(training),
        "all_reduce": reduced / _ring(training),
        "latency": 0.0 if devices == 1 else (
            (COLLECTIVES_A_SHARDING * kinds + OTHER_COLLECTIVES) * latency
            + COLLECTIVES_A_SHARDING * kinds * device.peer_s * (devices - 1)),
    }
    return seconds, bytes_sent


def _between(training: Training, total: float) -> float:
    """Seconds of an all-to-all of `total` bytes in one direction on the busiest device: both ways at once."""
    if training.devices == 1:
        return 0.0
    device, shares = training.device, training.shares
    near = (min(training.per_node, training.devices) - 1) / (training.devices - 1)
    return max(total * near / (device.node_bandwidth * shares.network),
               total * (1 - near) / (device.network_bandwidth * shares.network))


def _ring(training: Training) -> float:
    """Bytes a second of an all-gather or all-reduce: a machine's adapters carry its ring side by side."""
    device, shares = training.device, training.shares
    if training.nodes == 1:
        return device.node_bandwidth * shares.network
    return min(device.node_bandwidth, device.network_bandwidth * training.per_node) * shares.network


def assumptions(shares: Shares) -> dict[str, float]:
    """As JSON."""
    return {f"share_of_peak_{name}": value for name, value in asdict(shares).items()}
