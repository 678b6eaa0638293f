"""CRM in plain PyTorch, one process: the same towers over nn.Embedding tables and torch.optim, and nothing else.

No TorchRec, no DeepSpeed, no Ray, no process group. The parity tests and the benchmark hold the real parts against it,
so it is written for speed as well: sparse gradients touch only the rows that were looked up. Dense ones, which
nn.Embedding has by default, are there for the benchmark.

    row-wise Adagrad, row r, summed gradient g_r (dim,):  m_r += mean(g_r^2),  w_r -= lr * g_r / (sqrt(m_r) + eps)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RowwiseAdagrad(torch.optim.Optimizer):
    """fbgemm's EXACT_ROWWISE_ADAGRAD for sparse gradients, where rows that occur several times are summed first, and
    for dense ones, which change no row without a gradient."""

    def __init__(self, parameters, lr: float, eps: float = 1e-8):
        super().__init__(parameters, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros(len(weight))
                if not weight.grad.is_sparse:
                    momentum_N = state["momentum"].add_(weight.grad.square().mean(dim=1))
                    weight.addcdiv_(weight.grad, (momentum_N.sqrt() + group["eps"])[:, None], value=-group["lr"])
                    continue
                gradient = weight.grad.coalesce()
                rows, gradient_RD = gradient.indices()[0], gradient.values()
                momentum_R = state["momentum"].index_select(0, rows) + gradient_RD.square().mean(dim=1)
                state["momentum"].index_copy_(0, rows, momentum_R)
                step_RD = gradient_RD * (-group["lr"] / (momentum_R.sqrt() + group["eps"]))[:, None]
                weight.index_add_(0, rows, step_RD)


class PlainCrm:
    """A CRM that trains in one process.

    Args:
        module: the towers, a `trainer.crm.CrmModel`; trained in place.
        weights: first values of the tables, {name: float32 (rows, dim)}; copied.
        optimizer, learning_rate, weight_decay, gradient_clip_norm: of the towers ("adamw" or "sgd"); matrices decay.
        table_optimizer, table_learning_rate: "rowwise_adagrad" or "sgd".
        sparse: gradients of the tables.
    """

    def __init__(self, module: nn.Module, weights: dict[str, Tensor], *, optimizer: str, learning_rate: float,
                 weight_decay: float = 0.0, gradient_clip_norm: float | None = None, table_optimizer: str,
                 table_learning_rate: float, sparse: bool = True):
        self.module, self.clip, self.sparse = module, gradient_clip_norm, sparse
        self.tables = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        vectors = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = (torch.optim.AdamW(groups, lr=learning_rate, fused=True) if optimizer == "adamw"
                          else torch.optim.SGD(groups, lr=learning_rate))
        self.table_optimizer = (RowwiseAdagrad(self.tables.values(), lr=table_learning_rate)
                                if table_optimizer == "rowwise_adagrad"
                                else torch.optim.SGD(self.tables.values(), lr=table_learning_rate))

    def step(self, batch) -> float:
        """One step on a `WindowBatch` that holds the whole global batch; its loss before the step."""
        features = batch.items.features
        rows = {name: F.embedding(features[name].values(), weight, sparse=self.sparse)
                for name, weight in self.tables.items()}
        loss, _ = self.module("loss", batch, rows)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.table_optimizer.step()
        self.optimizer.zero_grad()
        self.table_optimizer.zero_grad()
        return float(loss.detach())
