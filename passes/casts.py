"""Casts that do nothing, kept apart from what they are given while a model is traced.

``x.to(float32)`` of a float32 ``x`` is ``x`` itself, and so a tracer takes what is done with either for done with the
one it saw last. In another dtype, and under autocast, they differ:

    h = to(x, float32)                          h = to(x, float32)
    y = add(h, attention)   # residual     ->   y = add(x, attention)

So a model is traced as though its casts copied, and the copies are taken out of what was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_NAMED: Mapping[Any, torch.dtype] = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
#: The default, which nobody needs to say: it tells our copies from the model's own.
_OURS = {"copy": True, "memory_format": torch.preserve_format}
#: The operators that they come out as, and where each takes ``copy``; it may give it, and what follows, by name.
_OVERLOADS = {
    overload: [argument.name for argument in overload._schema.arguments].index("copy")
    for overload in (aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other)
}


class CastsApart(TorchFunctionMode):
    """While it is entered, ``Tensor.to`` and ``float``, ``half`` ... of floating tensors return new ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _NAMED and not options:
            func, args = Tensor.to, (args[0], _NAMED[func])
        if func is not Tensor.to or not args[0].is_floating_point():
            return func(*args, **options)
        if options.get("memory_format") is torch.preserve_format:
            del options["memory_format"]
        # The flags given by place are non_blocking and copy.
        own = options.get("copy") or "memory_format" in options or sum(isinstance(a, bool) for a in args[1:]) == 2
        return func(*args, **options) if own else func(*args, **{**options, **_OURS})


def without_copies(traced: nn.Module) -> None:
    """Take the copies that :class:`CastsApart` asked for out of traced graphs, in place."""
    for module in (m for m in traced.modules() if isinstance(m, GraphModule)):
        for node in module.graph.nodes:
            if node.target in _OVERLOADS and torch.preserve_format in (*node.args, *node.kwargs.values()):
                plain = node.args[: _OVERLOADS[node.target]]  # before copy, after non_blocking
                node.args = plain[:-1] if plain[-1] is False else plain
                node.kwargs = {name: value for name, value in node.kwargs.items() if name not in _OURS}
        module.recompile()
