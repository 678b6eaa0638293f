"""The towers under DeepSpeed, and their checkpoint. The only file that imports deepspeed.

The engine holds the dense half of a model: every rank has the same towers (or its ZeRO share of them), gradients are
averaged over ranks, and AdamW or SGD steps. The tables are the other half and live elsewhere: their output is an input
of the towers that requires a gradient, so `backward` flows on into the tables' own optimizer, which steps right there.

A checkpoint of the towers is one safetensors file with every parameter and every optimizer moment whole, in float32,
and one JSON with the rest. It does not know how many ranks or which ZeRO stage wrote it:

    dense.safetensors   parameter/<name>, buffer/<name>, exp_avg/<name>, exp_avg_sq/<name>
    dense.json          format, optimizer, optimizer_step, written_by, counters (the caller's)

Loading has an order, because DeepSpeed copies parameters when it starts and its own setters do not reach that copy:

    load_dense_parameters(module, folder)        before DenseEngine(module, ...)
    counters = load_dense_optimizer(engine, folder)     after, into the fresh engine

`import trainer.engine` does not import deepspeed; making an engine does (2 s).
"""

import gc
import inspect
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import InputError
from embeddings.untrusted import read_json

_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CLIP_EPS = 1e-6  # what torch adds to a norm before it clips to it


@dataclass(frozen=True)
class EngineSpec:
    """How the towers are trained.

    Raises:
        InputError: on a value or a combination that cannot be trained right; the message names both.
    """

    zero_stage: int = 0
    """0: all whole on every rank; 1: optimizer state shared out; 2: gradients too; 3: parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the towers compute in bfloat16 with float32 masters (ZeRO 1 to 3 only)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has no momentum; it is there for parity tests, which AdamW's scale-freeness would pass by itself."""
    learning_rate: float = 1e-3
    """Rate of the first step; the schedule sets `DenseEngine.learning_rate` afterwards."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors (biases, norms, scales) never decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay."""
    gradient_clip_norm: float | None = None
    """Global L2 norm of the towers' gradient to clip to; None does not clip. The tables are never clipped."""
    rows_per_rank_step: int = 1
    """Rows a rank trains on in a step; only DeepSpeed's own bookkeeping reads it."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise InputError(f"zero_stage is {self.zero_stage!r}; it must be 0, 1, 2 or 3")
        if self.precision not in ("fp32", "bf16"):
            # fp16 scales its loss, and the tables' fused optimizer would apply the scaled gradients.
            raise InputError(f"precision is {self.precision!r}; it must be fp32 or bf16 (fp16 cannot train the tables)")
        if self.precision == "bf16" and self.zero_stage == 0:
            # DeepSpeed hides the float32 masters of this combination, so a checkpoint would lose them.
            raise InputError("precision bf16 needs zero_stage 1, 2 or 3: set zero_stage to 1, or precision to fp32")
        if self.optimizer not in ("adamw", "sgd"):
            raise InputError(f"optimizer is {self.optimizer!r}; it must be adamw or sgd")
        if self.optimizer == "sgd" and self.weight_decay != 0.0:
            raise InputError("optimizer sgd takes no weight_decay: set it to 0, or use adamw")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0.0):
            raise InputError(f"learning_rate is {self.learning_rate}; it must be a finite number >= 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise InputError(f"weight_decay is {self.weight_decay}; it must be a finite number >= 0")
        if self.gradient_clip_norm is not None and not self.gradient_clip_norm > 0.0:
            raise InputError(f"gradient_clip_norm is {self.gradient_clip_norm}; it must be above 0, or null for none")
        if self.rows_per_rank_step < 1:
            raise InputError(f"rows_per_rank_step is {self.rows_per_rank_step}; it must be at least 1")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: matrices decay, vectors and frozen parameters do not. Frozen ones are in no group."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if weight_decay == 0.0:
        return [{"params": trained, "weight_decay": 0.0}]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class DenseEngine:
    """The towers under DeepSpeed: forward, backward (which flows on into the tables' fused optimizer), step.

    Calls are collective: every rank makes the same ones in the same order, `with torch.no_grad()` ones too (ZeRO 3
    gathers parameters in forward).

    Args:
        module: the towers in float32, without tables. The engine takes it over: it moves to the device, with bf16 its
            parameters become bfloat16, and with ZeRO 3 they are empty outside a forward.
        spec: how to train.
        device: where to train. torch.distributed must be initialised, with its timeout: DeepSpeed uses that group.

    Raises:
        InputError: if the module has nothing to train.
        RuntimeError: if torch.distributed is not initialised, or deepspeed already runs on another kind of device.
    """

    def __init__(self, module: nn.Module, spec: EngineSpec, *, device: torch.device | str):
        device = torch.device(device)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError("the towers have no parameter to train")
        if not dist.is_initialized():
            raise RuntimeError("initialise torch.distributed before making an engine")
        deepspeed = _import_deepspeed(device)
        self.spec = spec
        self.device = device
        self._module = module
        self._parameters = list(module.parameters())  # walking through the modules at every step takes its time
        self._norm: Tensor | float | None = None
        groups = parameter_groups(module, spec.weight_decay)
        if spec.optimizer == "adamw":
            # Fused: one pass over a parameter instead of ten. On a GPU DeepSpeed's flat parameters make it needless.
            optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, fused=device.type == "cpu")
        else:
            optimizer = torch.optim.SGD(groups, lr=spec.learning_rate)
        self._engine, *_ = deepspeed.initialize(
            # device_rank picks the GPU. LOCAL_RANK, DeepSpeed's other way, need not be the index of this one.
            args=SimpleNamespace(device_rank=device.index or 0),
            model=module,
            optimizer=optimizer,
            config=_deepspeed_config(spec, module),
            dist_init_required=False,
        )
        if spec.zero_stage == 0 and dist.get_world_size() == 1:
            # It would copy all gradients into one buffer and back to average them over one rank.
            self._engine.enable_backward_allreduce = False

    def __call__(self, *args, **kwargs):
        """The module's forward. With bf16, float tensors among the arguments (also inside dicts, lists and tuples) are
        cast first, with gradient: the tables' output stays float32 outside. Other objects go through untouched, so
        a typed batch keeps its seconds exact."""
        if self.spec.precision == "bf16":
            args, kwargs = _cast_floats(args, torch.bfloat16), _cast_floats(kwargs, torch.bfloat16)
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar loss, averaged over ranks. The tables' fused optimizer steps in here, so a loss that is
        not finite must be caught before this call, on all ranks."""
        self._engine.backward(loss)

    def is_gradient_finite(self) -> bool:
        """Whether the averaged gradient of the towers is finite, on all ranks; between `backward` and `step`.

        Exact at every stage: each rank looks at what it holds after reduction (ZeRO 0: all, else its share), and one
        scalar collective joins the answers. `step` makes the same decision at no extra cost; this is for who must
        know before.
        """
        flaws = torch.zeros((), dtype=torch.int32, device=self.device)
        for gradient in self._reduced_gradients():
            flaws += (~torch.isfinite(gradient).all()).int()
        if dist.get_world_size() > 1:
            dist.all_reduce(flaws)
        return flaws.item() == 0

    def step(self) -> bool:
        """One optimizer step on the averaged, clipped gradient.

        Returns:
            Whether it was taken. With a gradient that is not finite nothing changes, the gradient is dropped and the
            answer is False, on all ranks alike: all see one global norm. The tables have stepped by then; the run
            should stop and go back to its last checkpoint.
        """
        if self.spec.zero_stage > 0:
            # ZeRO computes the global norm anyway and refuses to step when it is not finite.
            self._engine.step()
            self._norm = self._engine.get_global_grad_norm()
            return self._engine.was_step_applied()
        gradients, most = list(self._reduced_gradients()), self.spec.gradient_clip_norm
        self._norm = torch.nn.utils.get_total_norm(gradients)
        norm = self._norm.item()
        if not math.isfinite(norm):
            self._engine.zero_grad()
            return False
        if most is not None and norm + _CLIP_EPS > most:  # below it torch would multiply by 1
            torch.nn.utils.clip_grads_with_norm_(self._parameters, most, self._norm)
        self._engine.step()
        return True

    def gradient_norm(self) -> float | None:
        """Global L2 norm of the last step's gradient before clipping, the same on all ranks; None before a step."""
        return None if self._norm is None else float(self._norm)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step. The schedule is the caller's: set it before each step."""
        return self._engine.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    @property
    def module(self) -> nn.Module:
        """The towers that were handed in. With ZeRO 3 their parameters are empty outside a forward."""
        return self._module

    def train(self, mode: bool = True) -> "DenseEngine":
        self._module.train(mode)
        return self

    def eval(self) -> "DenseEngine":
        return self.train(False)

    def close(self) -> None:
        """Frees the engine's buffers, hooks and optimizer state. Neither it nor the module of ZeRO 3 works after."""
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        engine.destroy()
        _forget_module(self._module)
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        self._module, self._parameters = None, []
        del engine
        # Engine, optimizer and parameters hold each other in cycles through bound methods.
        gc.collect()

    def __enter__(self) -> "DenseEngine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _reduced_gradients(self) -> Iterator[Tensor]:
        """What this rank holds of the averaged gradient after `backward`."""
        if self.spec.zero_stage == 0:
            yield from (parameter.grad for parameter in self._parameters if parameter.grad is not None)
            return
        for gradients in self._engine.optimizer.averaged_gradients.values():
            yield from (gradient for gradient in gradients or () if gradient is not None)


def gather_dense(engine: DenseEngine) -> tuple[dict[str, Tensor], int]:
    """The towers and their optimizer state whole, as `dense.safetensors` names them. Collective.

    Returns:
        On rank 0 float32 copies on the CPU (buffers keep their type), on other ranks an empty dict; and the number of
        optimizer steps taken, 0 for sgd. Training may go on while the copies are written.
    """
    step = _optimizer_step(engine)
    tensors: dict[str, Tensor] = {}
    keep = dist.get_rank() == 0
    if engine.spec.zero_stage == 0 and not keep:
        return tensors, step  # every rank has all, so there is nothing to gather
    if step > 0:
        _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        tensor = _whole_parameter(engine, parameter)
        if keep:
            tensors[f"parameter/{name}"] = _host_copy(tensor).float()
        if step == 0 or not parameter.requires_grad:
            continue
        for moment in _MOMENTS:
            tensor = _whole_moment(engine, parameter, moment)
            if keep:
                tensors[f"{moment}/{name}"] = _host_copy(tensor).float()
    if keep:
        tensors |= {f"buffer/{name}": _host_copy(buffer) for name, buffer in _saved_buffers(engine.module).items()}
    return tensors, step


def write_dense(
    folder: Path | str, tensors: dict[str, Tensor], optimizer_step: int, spec: EngineSpec, step_counters: dict[str, Any]
) -> None:
    """Writes what `gather_dense` returned; on rank 0 only. Each file appears whole; the JSON comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "dense.safetensors.partial"
    save_file(tensors, partial)
    _publish(partial, folder / "dense.safetensors")
    description = {
        "format": _FORMAT,
        "optimizer": spec.optimizer,
        "optimizer_step": optimizer_step,
        "written_by": {
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "zero_stage": spec.zero_stage,
            "precision": spec.precision,
        },
        "counters": step_counters,
    }
    partial = folder / "dense.json.partial"
    partial.write_text(json.dumps(description, indent=1) + "\n")
    _publish(partial, folder / "dense.json")


def save_dense(engine: DenseEngine, folder: Path | str, step_counters: dict[str, Any]) -> None:
    """Gathers and writes the towers' checkpoint into a folder. Collective; rank 0 writes, no one waits for it.

    Args:
        step_counters: JSON-able numbers of the caller (step, epoch, ..), returned by `load_dense_optimizer`.
    """
    tensors, optimizer_step = gather_dense(engine)
    if dist.get_rank() == 0:
        write_dense(folder, tensors, optimizer_step, engine.spec, step_counters)


def load_dense_parameters(module: nn.Module, folder: Path | str) -> None:
    """Fills a plain module's parameters and saved buffers from a checkpoint, before an engine takes it over.

    This alone is all that evaluating a kept checkpoint needs: build the module, load, use it without an engine.

    Raises:
        InputError: if the files are missing or damaged, or hold other towers than these.
    """
    _read_description(folder)
    targets = {f"parameter/{name}": parameter for name, parameter in module.named_parameters()}
    targets |= {f"buffer/{name}": buffer for name, buffer in _saved_buffers(module).items()}
    with _opened(folder) as stored, torch.no_grad():
        names = {name for name in stored.keys() if name.split("/", 1)[0] not in _MOMENTS}
        if names != set(targets):
            raise InputError(
                f"{Path(folder) / 'dense.safetensors'} holds other towers than the config describes: "
                f"missing {sorted(set(targets) - names)[:3]}, unexpected {sorted(names - set(targets))[:3]}"
            )
        for name, target in targets.items():
            target.copy_(_read_tensor(stored, name, target.shape, folder))


def load_dense_optimizer(engine: DenseEngine, folder: Path | str) -> dict[str, Any]:
    """Fills a fresh engine's optimizer state from a checkpoint of any number of ranks and any ZeRO stage.

    Every rank reads its own share of the one file. The learning rate is not part of it: the schedule sets it.

    Returns:
        The step counters that `save_dense` was given.

    Raises:
        InputError: if the files are missing or damaged, or belong to other towers or to another optimizer.
    """
    description = _read_description(folder)
    if description["optimizer"] != engine.spec.optimizer:
        raise InputError(
            f"{Path(folder) / 'dense.json'} was trained with the optimizer {description['optimizer']}, "
            f"and this run is set to {engine.spec.optimizer}"
        )
    moments = _MOMENTS if description["optimizer_step"] > 0 else ()
    if moments:
        _create_moments(engine, description["optimizer_step"])
    with _opened(folder) as stored, torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
            if engine.spec.precision == "bf16":
                # DeepSpeed made its float32 masters from parameters that it had already cut to bfloat16.
                _set_share(engine, parameter, None, _read_tensor(stored, f"parameter/{name}", shape, folder))
            for moment in moments:
                _set_share(engine, parameter, moment, _read_tensor(stored, f"{moment}/{name}", shape, folder))
    return description["counters"]


def _import_deepspeed(device: torch.device):
    """deepspeed, attached to the process group that exists, quiet, and not compiling anything."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups, logger

    if get_accelerator()._name != device.type:
        raise RuntimeError(
            f"deepspeed runs on {get_accelerator()._name} in this process, but the engine is asked for {device.type}: "
            f"set DS_ACCELERATOR={device.type} before the process starts"
        )
    logger.setLevel(logging.ERROR)
    # It calls collectives by names that torch 2.13 has renamed: one line for every call otherwise.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Its shared-memory collectives would be compiled with g++ for 35 to 86 s at the first start; the group's own serve.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False, verbose=False
    )
    # Its own copy of the world group would have a timeout of 30 minutes instead of the caller's.
    groups._WORLD_GROUP = dist.group.WORLD
    return deepspeed


def _forget_module(module: nn.Module) -> None:
    """Takes a module out of what ZeRO 3 keeps for the life of the process, and with it all its parameters and states: a
    stack of modules that never loses the outermost, and a cache of what to release after each module."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    # The cached function stands inside a wrapper that only names it for the profiler.
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()


def _deepspeed_config(spec: EngineSpec, module: nn.Module) -> dict[str, Any]:
    # ZeRO allocates buffers of this many elements; its default is 2 GB however small the towers are.
    bucket = min(50_000_000, max(1, sum(parameter.numel() for parameter in module.parameters())))
    return {
        "train_micro_batch_size_per_gpu": spec.rows_per_rank_step,
        "gradient_accumulation_steps": 1,
        # ZeRO 0 is clipped in `DenseEngine.step`, which needs the norm before DeepSpeed computes it.
        "gradient_clipping": spec.gradient_clip_norm or 0.0 if spec.zero_stage > 0 else 0.0,
        "bf16": {"enabled": spec.precision == "bf16"},
        "zero_optimization": {
            "stage": spec.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
    }


def _cast_floats(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _cast_floats(part, dtype) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast_floats(part, dtype) for part in value)
    return value


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and name not in parameters
    }


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares memory with nothing, so that training may go on."""
    return tensor.detach().to("cpu", copy=True).contiguous()


# What DeepSpeed calls the same thing at each stage. ZeRO 0: nothing is wrapped, the state is the torch optimizer's own.
# ZeRO 1, 2: each group's parameters lie in one flat tensor, shared out in equal parts. ZeRO 3: each parameter is shared
# out by itself, padded to a multiple of the ranks.


def _base_optimizer(engine: DenseEngine) -> torch.optim.Optimizer:
    return engine._engine.optimizer if engine.spec.zero_stage == 0 else engine._engine.optimizer.optimizer


def _state_tensors(engine: DenseEngine) -> list[Tensor]:
    """The tensors that the torch optimizer keeps state for on this rank."""
    wrapped = engine._engine.optimizer
    if engine.spec.zero_stage == 0:
        return [parameter for group in wrapped.param_groups for parameter in group["params"]]
    if engine.spec.zero_stage < 3:
        return wrapped.single_partition_of_fp32_groups
    return wrapped.fp32_partitioned_groups_flat


def _optimizer_step(engine: DenseEngine) -> int:
    """Optimizer steps taken; 0 for sgd, which has no state."""
    if engine.spec.optimizer == "sgd":
        return 0
    state = _base_optimizer(engine).state
    return max((int(state[tensor]["step"]) for tensor in _state_tensors(engine) if tensor in state), default=0)


def _whole_parameter(engine: DenseEngine, parameter: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.spec.zero_stage > 0 and parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    if engine.spec.zero_stage < 3:
        return parameter.detach()
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _whole_moment(engine: DenseEngine, parameter: nn.Parameter, moment: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.spec.zero_stage == 0:
        state = engine._engine.optimizer.state
        # A parameter that never had a gradient has no state yet; zeros are what the other stages keep for it.
        return state[parameter][moment] if parameter in state else torch.zeros_like(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


def _create_moments(engine: DenseEngine, step: int) -> None:
    """AdamW makes its state in its first step; loading needs it before."""
    state = _base_optimizer(engine).state
    for tensor in _state_tensors(engine):
        state[tensor] = {"step": torch.tensor(float(step)), **{name: torch.zeros_like(tensor) for name in _MOMENTS}}
    _link_moments(engine)


def _link_moments(engine: DenseEngine) -> None:
    """Lets parameters find their moments in the flat tensors of ZeRO 1 and 2. DeepSpeed does so once, after the first
    group's first step, when the other groups have no state yet; so it is done anew."""
    if engine.spec.zero_stage in (1, 2):
        engine._engine.optimizer._hp_optimizer_states_linked = False
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_share(engine: DenseEngine, parameter: nn.Parameter, moment: str | None, whole: Tensor) -> None:
    """Sets this rank's share of a parameter's moment, or of its float32 master where there is one (None)."""
    whole = whole.to(engine.device)
    if engine.spec.zero_stage == 0:
        engine._engine.optimizer.state[parameter][moment].copy_(whole)
    elif engine.spec.zero_stage < 3:
        # This one method of DeepSpeed sets both.
        parameter.set_full_hp_param(whole, moment)
    else:
        # The setter for whole tensors raises on the last rank where the ranks do not divide the size.
        share = parameter.ds_tensor.numel()
        start = dist.get_rank() * share
        mine = torch.zeros(share, dtype=whole.dtype, device=whole.device)
        part = whole.flatten()[start : start + share]
        mine[: part.numel()] = part
        parameter._z3_optimizer.set_local_hp_param(mine, parameter, moment)


def _read_description(folder: Path | str) -> dict[str, Any]:
    path = Path(folder) / "dense.json"
    try:
        description = read_json(path)
        known = {"optimizer": str, "optimizer_step": int, "counters": dict}
        if not all(isinstance(description[key], kind) for key, kind in known.items()):
            raise ValueError("a field has the wrong type")
        version = description["format"]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); is this the folder of a checkpoint?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); use an earlier checkpoint") from error
    if version != _FORMAT:
        raise InputError(f"{path} has the format {version}, and this version reads {_FORMAT}")
    return description


def _opened(folder: Path | str):
    path = Path(folder) / "dense.safetensors"
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); use an earlier checkpoint") from error


def _read_tensor(stored, name: str, shape: torch.Size, folder: Path | str) -> Tensor:
    path = Path(folder) / "dense.safetensors"
    try:
        tensor = stored.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{path} does not hold {name} ({error})") from error
    if tensor.shape != shape:
        raise InputError(f"{path}: {name} has the shape {tuple(tensor.shape)}, and the towers want {tuple(shape)}")
    return tensor


def _publish(partial: Path, path: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
