"""Models that hold bitsandbytes' quantized layers, which no tracer can see into: ours take their places.

    before:  q = bitsandbytes.nn.Linear4bit     packed bytes, a state that says what they mean, and a CUDA or C kernel
    after:   q = PackedLinear                   a :class:`~lorafx.bases.tensor.QuantizedTensor` over the same bytes

Nothing is dequantised or copied, and the user's model stays as it is. The layers are told by the names of their
classes: bitsandbytes is not imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from lorafx.bases import FORMATS
from lorafx.bases.base import Packed
from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import CaptureError, QuantizationError
from lorafx.graph import CapturedModule, erase, get_path, mark_own, rebind
from lorafx.shards import main_dtype

aten = torch.ops.aten

#: What a layer's hooks are stored in: they go along to the layer that takes its place.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class PackedLinear(nn.Linear):
    """A linear layer on a packed weight ``[out, in]``.

    It computes in ``compute_dtype``, the weight's, whatever dtype ``x [..., in]`` has, and gives back that one; None:
    in the dtype of ``x`` (:func:`settle_dtypes`). The symbolic tracer, which knows no dtypes, takes ``x`` for one of
    the weight's dtype.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, compute_dtype: torch.dtype | None, training: bool
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)
        self.compute_dtype = compute_dtype
        self.training = training

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        given = input.dtype
        if self.compute_dtype is None:
            weight, bias = (t if t is None or t.dtype == given else t.to(given) for t in (self.weight, self.bias))
            assert weight is not None
            return F.linear(input, weight, bias)
        output = super().forward(input if given == self.compute_dtype else input.to(self.compute_dtype))
        return output if output.dtype == given else output.to(given)


def with_packed_layers(model: nn.Module) -> nn.Module:
    """The model with a :class:`PackedLinear` for each ``Linear4bit`` and ``Linear8bitLt``; itself if it has none.

    Modules are copied shallowly, so that the copy has the user's own tensors. What a layer computes is what
    bitsandbytes computes with the weight that it stores; ``Linear8bitLt`` quantises its input as well when it predicts,
    which is left out: it computes as it does in training on the CPU.

    Raises:
        CaptureError: a layer is not quantised yet, is quantised in another way (fp4, an embedding), or was repacked
            for the kernel that bitsandbytes has for CPUs.
        QuantizationError: a layer's state is damaged, or belongs to a weight of another shape.
    """
    kinds = {name: kind for name, module in model.named_modules() if (kind := _kind(module)) is not None}
    if not kinds:
        return model
    dense = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] not in kinds}
    default = main_dtype(dense)  # int8 layers do not tell theirs
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    copies: dict[int, nn.Module] = {}

    def visit(source: nn.Module, path: str) -> nn.Module:
        if id(source) in copies:
            return copies[id(source)]
        if _kind(source) is not None:
            copies[id(source)] = _packed_layer(source, path, default, weights)
            return copies[id(source)]
        target = copies[id(source)] = copy.copy(source)
        for store in ("_parameters", "_buffers"):
            setattr(target, store, dict(getattr(source, store)))
        target._modules = {
            n: None if c is None else visit(c, f"{path}.{n}" if path else n) for n, c in source._modules.items()
        }
        return target

    return visit(model, "")


def settle_dtypes(gm: CapturedModule, model: nn.Module) -> None:
    """Let weights that layers read in the dtype of their input be rounded to that only, as bitsandbytes does; in place.

        t = to(<q.weight>, float32)     # of bfloat16
        y = linear(x, t)                                       ->    y = linear(x, <q.weight>)    # q.weight in float32

    Where the inputs have several dtypes, the weight is in float32, and each call reads it through a cast. So it is
    where a layer is called as a module (traced without inputs, with hooks of its own), which casts when it runs.

    Args:
        gm: ``model`` as it was captured.
        model: what :func:`with_packed_layers` returned.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, PackedLinear) and m.compute_dtype is None]
    reads: dict[int, list[tuple[Node, Node]]] = {}
    for read in gm.graph.find_nodes(op="get_attr") if layers else ():
        reads.setdefault(id(get_path(gm, str(read.target))), []).extend((read, user) for user in read.users)
    called = {node.target for node in gm.graph.find_nodes(op="call_module")}
    for name in layers:
        weight = get_path(gm, f"{name}.weight" if name else "weight")
        found = reads.get(id(weight), [])
        dtypes = {_cast_to(user) or weight.dtype for _, user in found} | ({torch.float32} if name in called else set())
        if dtypes <= {weight.dtype}:
            continue
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        exact = QuantizedTensor(replace(weight.packed, dtype=torch.float32), dtype=dtype)
        mark_own(rebind(gm, weight, exact), False)  # the bytes are the user's
        for read, user in found:
            wanted = _cast_to(user)
            if wanted == dtype:
                user.replace_all_uses_with(read)
                erase(gm.graph, user)
            elif wanted is None:
                with gm.graph.inserting_before(user):
                    cast = gm.graph.call_function(aten.to.dtype, (read, weight.dtype))
                cast.meta = dict(user.meta)
                user.replace_input_with(read, cast)
    if layers:
        gm.recompile()


def _cast_to(node: Node) -> torch.dtype | None:
    """The dtype that a call casts to; None if it is no cast."""
    if node.target is not aten.to.dtype:
        return None
    dtype = node.args[1]
    assert isinstance(dtype, torch.dtype)
    return dtype


def _packed_layer(
    layer: Any, path: str, default: torch.dtype, weights: dict[tuple[int, torch.dtype], nn.Parameter]
) -> nn.Module:
    """What takes the place of ``layer``; ``weights`` are those that there are, by what they were made of."""
    where = f"'{path}'" if path else "the model"
    packed = _READERS[str(_kind(layer))](layer, path, where, default)
    shape = (layer.out_features, layer.in_features)
    if packed.shape != shape:
        raise QuantizationError(
            f"{where} is a layer of shape {shape}, and its state says that the weight is of shape {packed.shape}: "
            "quantize the original weights again"
        )
    compute: torch.dtype | None = getattr(layer, "compute_dtype", None)
    if compute is not None:
        packed = replace(packed, dtype=compute)
    key = id(layer.weight), packed.dtype
    if key not in weights:
        weights[key] = nn.Parameter(QuantizedTensor(packed), requires_grad=False)
    bias: nn.Parameter | None = layer.bias
    if bias is not None and compute not in (None, bias.dtype):
        bias = nn.Parameter(bias.detach().to(compute), requires_grad=bias.requires_grad)
    made = PackedLinear(weights[key], bias, compute, layer.training)
    for hooks in _HOOKS:
        setattr(made, hooks, copy.copy(getattr(layer, hooks)))
    return made


def _four_bits(layer: Any, path: str, where: str, default: torch.dtype) -> Packed:
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        raise _unquantized(where)
    if state.quant_type != "nf4":
        raise CaptureError(
            f"{where} is stored as {state.quant_type}, which lorafx does not read: load the original weights with "
            "bnb_4bit_quant_type='nf4' (fp4 is what bitsandbytes takes unless told)"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise CaptureError(
            f"{where} was repacked by bitsandbytes for its own CPU kernel, with scales rounded to bfloat16, when the "
            "model ran in eval mode: load the model again, and call lorafx before it runs"
        )
    beside = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return _read("nf4", path, {"weight": layer.weight.data, **beside})


def _eight_bits(layer: Any, path: str, where: str, default: torch.dtype) -> Packed:
    if layer.state.has_fp16_weights:
        raise CaptureError(
            f"{where} keeps its weight dense and quantizes it whenever it runs (has_fp16_weights=True): make it with "
            "has_fp16_weights=False, or put an nn.Linear there"
        )
    # The scales start at the weight; the first call takes them to the layer's state.
    codes, scales = (
        next((t for t in found if t is not None), None)
        for found in ((layer.weight.CB, layer.state.CB, layer.weight.data), (layer.weight.SCB, layer.state.SCB))
    )
    if codes is None or scales is None:
        raise _unquantized(where)
    packed = _read("int8", path, {"weight": codes, "SCB": scales})
    floats = layer.bias is not None and layer.bias.is_floating_point()
    return replace(packed, dtype=layer.bias.dtype if floats else default)


def _read(name: str, path: str, tensors: Mapping[str, Tensor]) -> Packed:
    prefix = f"{path}." if path else ""
    return FORMATS[name].from_state_dict({prefix + key: tensor for key, tensor in tensors.items()}, prefix)


_READERS: Mapping[str, Callable[[Any, str, str, torch.dtype], Packed]] = {
    "Linear4bit": _four_bits,
    "Linear8bitLt": _eight_bits,
}


def _kind(module: nn.Module) -> str | None:
    """The name of the class of bitsandbytes that this is a layer of; None if it is none with a packed weight.

    Raises:
        CaptureError: it is one that has no adapters: an embedding.
    """
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.partition(".")[0] == "bitsandbytes"]
    found = next((name for name in names if name in _READERS), None)
    if found is None and any(type(p).__name__ in ("Params4bit", "Int8Params") for p in module._parameters.values()):
        raise CaptureError(
            f"the model holds a {names[0] if names else type(module).__name__} of bitsandbytes, and only linear layers "
            "can be read from it: leave embeddings dense"
        )
    return found


def _unquantized(where: str) -> CaptureError:
    return CaptureError(
        f"{where} is a layer of bitsandbytes whose weight is not quantized yet: that happens when the model moves to a "
        "device, so call model.to('cuda'), or model.to('cpu'), first"
    )
