"""Observe: what a graph's layers are given, and the gradients of its weights, on batches of data.

The model is looked at as it is without adapters, in eval mode, one batch at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, rebind, share
from lorafx.passes.activate import deactivate
from lorafx.variants.inits import leading_singular

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
"""Inputs of a model: keyword arguments, positional ones, or the only one."""

Loss = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, batch)``."""

#: Subspace iterations for singular vectors, as in the codes of EVA's and LoRA-GA's authors.
ITERATIONS = 4


@contextmanager
def without_adapters(gm: CapturedModule) -> Iterator[CapturedModule]:
    """The model without adapters, in eval mode; what it shares with ``gm`` has its modes back afterwards."""
    bare = share(gm)
    deactivate(bare)
    bare.recompile()
    modes = {module: module.training for module in bare.modules()}
    try:
        yield bare.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def see_rows(
    bare: CapturedModule, nodes: Collection[Node], batches: Iterable[Batch], see: Callable[[Node, Tensor], None]
) -> int:
    """Run batches and show the values of nodes, as rows ``[n, features]``; returns the number of batches.

    Rows that an ``attention_mask`` among the inputs hides are left out.
    """

    class Observer(Interpreter):
        mask: Tensor | None = None

        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                rows = value.reshape(-1, value.shape[-1])
                if self.mask is not None and self.mask.numel() == rows.shape[0]:
                    rows = rows[self.mask.reshape(-1).bool().to(rows.device)]
                see(n, rows)
            return value

    observer, count = Observer(bare), 0
    for batch in batches:
        count += 1
        observer.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        with torch.no_grad():
            observer.run(*_flat(bare, batch), enable_io_processing=False)
    return count


def sum_gradients(
    bare: CapturedModule, weights: Iterable[str], batches: Iterable[Batch], loss_fn: Loss | None
) -> tuple[dict[str, Tensor], int]:
    """The gradients of the loss by these weights, in float32 or better, summed over batches; and the number of batches.

    Takes memory for one gradient a weight. A weight that no loss depends on has none.

    Args:
        loss_fn: None: the loss among the outputs. Otherwise a dict may hold what only the loss needs (labels that
            the graph does not take); it is left out of the call.

    Raises:
        AdapterError: the outputs have no loss, and no ``loss_fn`` is given.
    """
    gradients: dict[str, Tensor] = {}

    def watch(name: str, weight: Tensor) -> None:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = gradients.get(name, 0) + _wide(parameter.grad)
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]

    count = 0
    with torch.inference_mode(False), torch.enable_grad():
        for name in dict.fromkeys(weights):
            base = get_path(bare, name)
            watch(name, rebind(bare, base, base.detach()).requires_grad_())
        for batch in batches:
            count += 1
            outputs = _call(bare, batch, loss_fn is not None)
            loss = getattr(outputs, "loss", None) if loss_fn is None else loss_fn(outputs, batch)
            if not isinstance(loss, Tensor):
                raise AdapterError(
                    "the gradient needs a loss, and the outputs have none: put the labels into the batches, or give "
                    "loss_fn(outputs, batch)"
                )
            loss.backward()  # type: ignore[no-untyped-call]
    return gradients, count


class Directions:
    """The leading principal directions of rows that come in parts: the incremental decomposition that EVA uses.

    ``factor [k, in]`` has the scatter of all rows so far, ``factor^T factor``, as far as k directions hold it
    (Ross et al. 2008, "Incremental learning for robust visual tracking", section 3.1); ``scatter`` is all of its
    trace.
    """

    def __init__(self, count: int) -> None:
        self.kept = 2 * count + 8
        self.rows = 0
        self.scatter = 0.0
        self.mean = torch.zeros(0)
        self.factor = torch.zeros(0, 0)

    def add(self, rows: Tensor) -> None:
        """Take account of ``rows [n, in]``."""
        if rows.shape[0] == 0:
            return
        rows = _wide(rows)
        mean, new = rows.mean(0), rows.shape[0]
        parts = [rows - mean]
        if self.rows:
            parts.append(math.sqrt(self.rows * new / (self.rows + new)) * (self.mean - mean).unsqueeze(0))
            mean = (self.rows * self.mean + new * mean) / (self.rows + new)
        self.scatter += sum(float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for p in parts)
        stacked = torch.cat([*parts, self.factor.to(rows)] if self.rows else parts)
        _, s, vh = leading_singular(stacked, self.kept, ITERATIONS, torch.Generator().manual_seed(0))
        self.rows, self.mean, self.factor = self.rows + new, mean, s.unsqueeze(1) * vh

    def leading(self, count: int) -> Tensor | None:
        """The first ``count`` directions ``[count, in]``, of length 1; None if the rows have not so many."""
        lengths = torch.linalg.vector_norm(self.factor, dim=-1)
        if self.rows == 0 or int((lengths > 1e-6 * lengths[0]).sum()) < count:
            return None
        found: Tensor = self.factor[:count] / lengths[:count].unsqueeze(1)
        return found

    def explained(self, count: int) -> list[float]:
        """The share of the rows' variance along each of the first ``count`` directions; 0 for those there are not."""
        squares = self.factor[:count].double().square().sum(-1).tolist()
        shares = [square / self.scatter if self.scatter > 0.0 else 0.0 for square in squares]
        return shares + [0.0] * (count - len(shares))


def _call(gm: CapturedModule, batch: Batch, own_loss: bool) -> Any:
    if isinstance(batch, Mapping):
        taken = {a.name for a in gm.signature.arguments}
        return gm(**{n: v for n, v in batch.items() if n in taken or not own_loss})
    return gm(batch) if isinstance(batch, Tensor) else gm(*batch)


def _flat(gm: CapturedModule, batch: Batch) -> list[Any]:
    signature = gm.signature
    if isinstance(batch, Mapping):
        return signature.flatten(**batch)
    return signature.flatten(batch) if isinstance(batch, Tensor) else signature.flatten(*batch)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
