"""The graph that lorafx works on: a ``torch.fx.GraphModule`` that behaves as the model it came from.

What it adds to a GraphModule:

- calls take the original's arguments and return its output classes (:mod:`lorafx.signature`);
- ``train()``/``eval()`` mean what they mean on the original: what depends on the mode is a
  :func:`by_mode` node that reads the ``training`` flag of the module it came from;
- its state dict has the original's names, and loading one never writes into the original's storage;
- ``copy.deepcopy``, ``pickle`` and ``torch.save`` keep the graph itself, metadata included.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from lorafx.bases.tensor import QuantizedTensor
from lorafx.checkpointing import Checkpointing, checkpointed
from lorafx.errors import AdapterError, PassError, QuantizationError
from lorafx.serialize import GraphRecord
from lorafx.signature import Call, Signature, SignatureCodeGen

#: The child whose mode stands for the root's own (a graph cannot refer to its root).
ROOT_MODE = "_mode"


class Scope(nn.Module):
    """A module of the original as the graph sees it: a holder of parameters, buffers and a mode.

    ``origin`` is the original's class. ``kind`` says what sort of layer that is, if it matters to what is adapted:
    ``"linear"``, ``"attention"`` (nn.MultiheadAttention) or ``"transposed convolution"``. ``is_transposed`` (so
    called by transformers and PEFT) says that its stacks of weights are ``[experts, in, out]``.
    """

    def __init__(self, origin: str = "", kind: str = "", is_transposed: bool = False) -> None:
        super().__init__()
        self.origin = origin
        self.kind = kind
        self.is_transposed = is_transposed

    def extra_repr(self) -> str:
        return self.origin


def by_mode(scope: nn.Module, if_train: Any, if_eval: Any) -> Any:
    """The value an operator gets in the mode that ``scope`` is in."""
    return if_train if scope.training else if_eval


def batch_rows(rows: Tensor, x: Tensor) -> Tensor:
    """The adapters of the rows of a batch, ``rows [batch]``, where ``x [batch, ...]`` is an input with as many.

    Raises:
        AdapterError: the batch has another size.
    """
    if x.shape[0] != rows.shape[0]:
        raise AdapterError(
            f"adapter_names has {rows.shape[0]} names, and the batch {x.shape[0]} rows: give one name (or None) a row"
        )
    return rows


class CapturedModule(GraphModule):
    """A captured model. Built by :func:`lorafx.passes.capture.capture`; see the module's docstring.

    ``root`` holds the whole module tree (parameters, buffers, modes) under the original's names.
    """

    accepts_loss_kwargs = False  # for the HF Trainer: losses are averaged by the graph itself

    def __init__(
        self,
        root: nn.Module,
        graph: Graph,
        class_name: str = "CapturedModule",
        meta: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(nn.Module(), Graph(), class_name)
        adopt(root, self)
        self.meta = meta or {}
        self.graph = graph

    @property
    def signature(self) -> Signature:
        """How the graph is called."""
        codegen = self.graph._codegen
        assert isinstance(codegen, SignatureCodeGen)
        return codegen.signature

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel does not send to other processes: quantized weights, which it could not."""
        return [name for name, tensor in named_tensors(self) if isinstance(tensor, QuantizedTensor)]

    def recompile(self) -> Any:
        """Regenerate ``forward`` after an edit of the graph.

        What runs is derived from the graph: lowered (:mod:`lorafx.passes.lower`), then with layers that run again in
        backward (:mod:`lorafx.checkpointing`). The graph itself stays the one that passes work on.
        """
        flat, meta = self._graph, getattr(self, "meta", {})
        try:
            if (lowering := meta.get("lowering")) is not None:
                self._graph = lowering.derive(self, flat)
            if (choice := meta.get("checkpointing")) is not None:
                self._graph = self._checkpointed(choice)
            ran = self._graph
            code = super().recompile()
        finally:
            self._graph = flat
        if ran is not flat:  # torch.compile looks up the nodes of the graph by the lines of the code
            index = {node.name: i for i, node in enumerate(flat.nodes)}
            lines = [index.get(node.name) for node in ran.nodes]
            self._lineno_map = {line: None if i is None else lines[i] for line, i in self._lineno_map.items()}
        if isinstance(self.graph._codegen, SignatureCodeGen):
            self._call, self._out_spec = Call(self.signature), self.signature.out_spec
            type(self).forward.__signature__ = self.signature.python_signature()  # type: ignore[attr-defined]
        return code

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in backward instead of keeping their activations (:mod:`lorafx.checkpointing`).

        Named and called as on Hugging Face models. The keyword arguments go to
        :func:`torch.utils.checkpoint.checkpoint`. In eval mode, and without gradients, nothing changes.

        Raises:
            ValueError: ``offload``, or another option that is not supported.
            PassError: the graph has no numbered layers that may run twice.
        """
        if offload:
            raise ValueError("offload=True is not supported: leave it out, and activations are recomputed")
        self._set_checkpointing(Checkpointing(every_n_layers, activation_checkpointing_kwargs or {}))

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._set_checkpointing(None)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The older name of :meth:`activation_checkpointing_enable`, which trainers still call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _set_checkpointing(self, choice: Checkpointing | None) -> None:
        if choice is not None:
            self._checkpointed(choice)  # raises before anything is changed
        self.meta["checkpointing"] = choice
        self.recompile()

    def _checkpointed(self, choice: Checkpointing) -> Graph:
        scopes = {n: notes(n)["scope"] for n in self.graph.nodes if "scope" in notes(n)}
        return checkpointed(self.graph, scopes, ROOT_MODE, choice)

    def check(self) -> None:
        """Lint the graph. fx warns of ``get_attr`` nodes it doesn't expect; ours are all deliberate."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.graph.lint()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        """Load values as ``nn.Module`` does, but never into storage shared with the user's model.

        A base tensor whose value differs gets storage of its own first; equal ones stay shared. The
        graph's own parameters (adapters, ``modules_to_save``) are written in place, so that an
        optimizer that holds them goes on working. A quantized weight takes one of its own format only. Called
        for this module before its children, also where it is a part of another one that is loaded.
        """
        if (folded := self.meta.get("folded", ())) and not all(f"{prefix}_folded.{n}" in state_dict for n in folded):
            raise PassError(
                f"{', '.join(self.meta['merged'])} is merged in place, and would stay as it was merged: call "
                "unmerge(gm), load, and merge again"
            )
        if not local_metadata.get("assign_to_params_buffers", False):
            for name, tensor in named_tensors(self):
                if isinstance(tensor, QuantizedTensor) and not tensor.is_like(state_dict.get(prefix + name, tensor)):
                    raise QuantizationError(
                        f"'{name}' is stored as {tensor.packed.format}, and what is to be loaded into it is not: to "
                        "bring an adapter here that was trained on another base, use save_adapter and load_adapter"
                    )
            for name, tensor in list(named_tensors(self)):
                new = state_dict.get(prefix + name)
                if not isinstance(new, Tensor) or new.shape != tensor.shape or is_own(tensor):
                    continue
                if not torch.equal(new.to(tensor), tensor):
                    rebind(self, tensor, tensor.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CapturedModule:
        """What ``to``, ``cuda`` and the like do; the devices that the trace wrote into the graph move along.

        Adapters may change their dtype.

        Raises:
            PassError: that of the base would change, which the captured casts would not follow.
        """
        tensors = [t for _, t in named_tensors(self)]
        adapters = self.meta.get("adapters", {}).values()
        of_adapters = {id(get_path(self, name)) for adapter in adapters for name in adapter.parameter_names}
        for tensor in self.parameters():
            probe = torch.empty(0, dtype=tensor.dtype, device="cpu" if tensor.is_meta else tensor.device)
            if tensor.is_floating_point() and id(tensor) not in of_adapters and fn(probe).dtype != tensor.dtype:
                raise PassError(
                    f"the graph was captured in {tensor.dtype} and holds casts to it: convert the model "
                    "(model.to(dtype)) and apply again, or train under torch.autocast"
                )
        before = {t.device for t in tensors}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = {t.device for _, t in named_tensors(self)}
        if before != after and len(after) == 1:
            (new,) = after
            for graph_module in (m for m in self.modules() if isinstance(m, GraphModule)):
                _move_literals(graph_module.graph, before, new)
                graph_module.recompile()
            if (text := self.meta.get("captured")) is not None:
                for old in before:
                    text = text.replace(repr(old), repr(new))
                self.meta["captured"] = text
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        root = copy.deepcopy(adopt(self, Scope()), memo)
        for (_, old), (_, new) in zip(named_tensors(self), named_tensors(root), strict=True):
            mark_own(new, is_own(old))
        graph = copy.deepcopy(self.graph)
        result = _restore(root, graph, copy.copy(self.meta), self.__class__.__name__)
        memo[id(self)] = result
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        own = frozenset(name for name, tensor in named_tensors(self) if is_own(tensor))
        record = GraphRecord.from_graph(self.graph)
        root = adopt(self, Scope())
        return _unpickle, (root, record, self.signature, dict(self.meta), self.__class__.__name__, own)


def _restore(root: nn.Module, graph: Graph, meta: dict[str, Any], name: str) -> CapturedModule:
    return CapturedModule(root, graph, name, meta)


def _unpickle(
    root: nn.Module,
    record: GraphRecord,
    signature: Signature,
    meta: dict[str, Any],
    name: str,
    own: frozenset[str],
) -> CapturedModule:
    graph = record.to_graph()
    graph.set_codegen(SignatureCodeGen(signature))
    result = _restore(root, graph, meta, name)
    for fqn, tensor in named_tensors(result):
        mark_own(tensor, fqn in own)
    return result


def share(gm: CapturedModule) -> CapturedModule:
    """A graph and module tree of its own over the same tensors: edits of the one don't show in the other."""
    copies: dict[int, nn.Module] = {}

    def visit(source: nn.Module) -> nn.Module:
        if id(source) not in copies:
            if isinstance(source, GraphModule):
                copies[id(source)] = source  # a subgraph; passes don't edit those
                return source
            target = copies[id(source)] = copy.copy(source)
            for store in ("_parameters", "_buffers", "_modules"):
                setattr(target, store, dict(getattr(source, store)))
            target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
            target._modules = {n: None if c is None else visit(c) for n, c in source._modules.items()}
        return copies[id(source)]

    root = visit(adopt(gm, Scope()))
    return _restore(root, copy.deepcopy(gm.graph), dict(gm.meta), type(gm).__name__)


def _move_literals(graph: Graph, old: Collection[torch.device], new: torch.device) -> None:
    def moved(value: Any) -> Any:
        return new if isinstance(value, torch.device) and value in old else value

    for node in graph.nodes:
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)


def adopt(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give ``target`` the children, parameters, buffers and mode of ``source`` (the same objects)."""
    target.training = source.training
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    target._modules.update(source._modules)
    return target


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has (aliases included)."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def is_own(tensor: Tensor) -> bool:
    """Whether the graph owns this tensor's storage, so that it may be written in place."""
    return bool(getattr(tensor, "_lorafx_own", False))


def mark_own(tensor: Tensor, own: bool = True) -> None:
    """Record that the graph owns (or shares with the user's model) this tensor's storage."""
    tensor._lorafx_own = own  # type: ignore[attr-defined]


def rebind(root: nn.Module, old: Tensor, value: Tensor) -> Tensor:
    """Replace ``old`` by a tensor of the graph's own with ``value``, under every name it has (ties stay tied)."""
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
    mark_own(new)
    for module in root.modules():
        for store in (module._parameters, module._buffers):
            for key, held in store.items():
                if held is old:
                    store[key] = new  # type: ignore[assignment]
    return new


def erase(graph: Graph, node: Node) -> None:
    """Erase a node and free its name, which fx does not: the same rewrite, done again, would read otherwise."""
    graph.erase_node(node)
    names = graph._graph_namespace
    names._obj_to_name.pop(node, None)
    names._used_names.discard(node.name)
    names._base_count.pop(re.sub(r"_\d+$", "", node.name), None)


def get_path(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = root
    for atom in path.split(".") if path else []:
        value = getattr(value, atom)
    return value


def set_tensor(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a parameter or buffer at a dotted path, making the modules on the way."""
    *parents, name = path.split(".")
    module = root
    for atom in parents:
        if atom not in module._modules:
            module.add_module(atom, Scope())
        module = getattr(module, atom)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def delete_path(root: nn.Module, path: str) -> None:
    """Remove the parameter, buffer or module at a dotted path."""
    parent, _, name = path.rpartition(".")
    delattr(get_path(root, parent), name)


def notes(node: Node) -> Mapping[str, Any]:
    """lorafx's own notes on a node; they live where re-export and deepcopy keep them."""
    found: Mapping[str, Any] = node.meta.get("custom", {}).get("lorafx", {})
    return found


def annotate(node: Node, **new: Any) -> None:
    """Add notes to a node. Copies on write: a copied graph's nodes share their metadata's values."""
    custom = node.meta.get("custom", {})
    node.meta["custom"] = {**custom, "lorafx": {**custom.get("lorafx", {}), **new}}


def unannotate(node: Node, *names: str) -> None:
    """Remove notes from a node."""
    custom = node.meta.get("custom", {})
    left = {n: v for n, v in custom.get("lorafx", {}).items() if n not in names}
    node.meta["custom"] = {**custom, "lorafx": left}
