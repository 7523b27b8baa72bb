"""Which initializer of an ONNX graph is which tensor of the model it came from.

Exporters keep a parameter's name where they store the parameter as it is. Where they fold a transpose into it they give
it another (``val_92``, ``onnx::MatMul_317``), and what tells is the module that its reader belongs to: in the node's
metadata (torch's exporter) or in its name (``/encoder/layer.0/attention/self/query/MatMul``: torch's older exporter,
and so optimum's and Olive's). A graph without either is matched by shape and order, if that leaves one way only.

onnxruntime-genai's model builder (and Olive, by it) writes nodes of its own: ``/model/layers.0/attn/q_proj/MatMul``
reads ``model.layers.0.attn.q_proj.MatMul.weight [in, out]`` for the model's ``model.layers.0.self_attn.q_proj``.

How a matrix is stored is decided by the operator that reads it, never by its shape: ``MatMul(x, W)`` means
``[in, out]``, and so does ``Gemm`` unless it has ``transB``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lorafx.checks import did_you_mean
from lorafx.export.onnx_parts import Absent, Unmatched, align, listed
from lorafx.export.onnx_uses import Use, added_to, scope_of, uses_of

#: What follows the name of a parameter whose transpose is stored (:mod:`lorafx.export.weights`).
_TRANSPOSED = ".T"
#: Operators that read weights in fewer bits than they were trained in.
_QUANTIZED = frozenset(
    {
        "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "QLinearMatMul", "QLinearConv", "MatMulInteger", "ConvInteger",
        "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "DequantizeLinear", "GatherBlockQuantized", "QMoE",
    }
)  # fmt: skip
#: Operators that hold the weights of several layers as one matrix.
_PACKED = frozenset({"Attention", "PackedAttention", "QAttention", "DecoderMaskedSelfAttention", "LongformerAttention"})
#: Operators that scale by a vector of which a file may hold 1 + the model's weight.
RMS_NORMS = frozenset({"RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"})
#: What onnxruntime-genai's model builder calls ``attn``, in ``make_attention``; its MLPs have the model's own names.
_GENAI = re.compile(r"((?:.*\.)?layers\.\d+)\.self_attn\.([qkvo]_proj)")
_LEAVES = (".weight", ".bias")


@dataclass(frozen=True)
class Target:
    """Where a tensor of an adapter goes: an initializer, how it is stored, and by what it was found.

    ``kind`` is a key of :data:`lorafx.ops.STORAGE`, or empty for what is no matrix. ``as_named`` says that the
    parameter is stored as it is in torch.
    """

    initializer: str
    kind: str
    how: str
    as_named: bool = True


@dataclass(frozen=True)
class Wanted:
    """A layer to find: its path in the model, and the sizes of its matrix ``[out, in]`` as far as they are known."""

    path: str
    out_features: int | None
    in_features: int | None

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether a matrix of this size can be it."""
        mine = (self.out_features, self.in_features)
        return all(m is None or m == s for m, s in zip(mine, size, strict=True))

    def __str__(self) -> str:
        known = (("?" if n is None else str(n)) for n in (self.out_features, self.in_features))
        return f"[{', '.join(known)}]"


class Targets:
    """Finds tensors in one graph.

    ``paths`` are those of all modules that will be asked for. ``part`` is the path of a module, if the graph is the
    export of a part of the model that may lack others.
    """

    def __init__(self, model: ir.Model, paths: Collection[str], part: str | None = None) -> None:
        self._part = part
        self._initializers = model.graph.initializers
        self._model = model
        self._uses = {name: tuple(uses_of(value, len(value.shape or ()))) for name, value in self._initializers.items()}
        self._named: dict[str, list[str]] = defaultdict(list)
        self._scoped: dict[str, list[str]] = defaultdict(list)
        for name, uses in self._uses.items():
            self._named[re.sub(rf"{re.escape(_TRANSPOSED)}(\.\d+)?$", "", name)].append(name)
            for scope in {use.scope for use in uses if use.kind and use.scope is not None}:
                self._scoped[scope].append(name)
        known = {p.rpartition(".")[0] for p in self._named if p.endswith(_LEAVES)} | self._scoped.keys()
        self._strip, self._prefix = align(paths, known, part)

    def uses(self, initializer: str) -> tuple[Use, ...]:
        """All that read it."""
        return self._uses[initializer]

    def size(self, initializer: str, kind: str) -> tuple[int, int]:
        """``(out, in)`` of a matrix that is stored like this."""
        value = self._initializers[initializer].const_value
        assert value is not None
        first, *others = value.shape.numpy()
        rest = math.prod(others)
        return (rest, first) if kind in ("addmm", "embedding") else (first, rest)

    def layers(self, wanted: Sequence[Wanted], shared: Collection[str] = ()) -> dict[str, Target | Unmatched]:
        """The weight of each layer, by its path, or why there is none.

        The readers of the layers in ``shared`` may be those of other modules too.
        """
        found: dict[str, Target | Unmatched] = {}
        nameless = []
        for layer in wanted:
            try:
                target = self._by_name(layer, layer.path in shared) or self._by_scope(layer, layer.path in shared)
            except Unmatched as why:
                found[layer.path] = why
                continue
            if target is None:
                nameless.append(layer)
            else:
                found[layer.path] = target
        if self._part is not None:  # what is left has no order that a part of it need keep
            found |= {layer.path: self._missing(layer) for layer in nameless}
        elif nameless:
            taken = {t.initializer for t in found.values() if isinstance(t, Target)}
            found |= self._by_order(nameless, taken)
        return found

    def tensor(self, name: str) -> Target:
        """Where a tensor that is trained whole goes: any parameter or buffer, by its name in the model.

        Raises:
            Unmatched: there is no one place for it.
        """
        path, _, leaf = name.rpartition(".")
        names = self._named.get(self._local(name), [])
        if not names and leaf == "weight" and self._scoped.get(self._scope(path)):
            target = self._by_scope(Wanted(path, None, None))
            assert target is not None
            return target
        if not names:
            self._refuse_copy(self._local(name))
            if leaf == "bias" and (
                self._named.get(self._local(f"{path}.weight")) or self._scoped.get(self._scope(path))
            ):
                raise Unmatched(
                    f"the graph has no initializer '{self._local(name)}', though its module is there: torch's "
                    "optimizer leaves a bias of zeros out. Export the base without it "
                    "(torch.onnx.export(..., optimize=False)), or by lorafx.export_base"
                )
            raise self._absent(f"initializer '{self._local(name)}'", path)
        return self._chosen(names, self._local(path), layer=False)

    def bias(self, path: str, weight: Target) -> Target:
        """The bias of a layer whose weight is known: by name, or by what is added to the weight's product.

        Raises:
            Unmatched: it has none.
        """
        name = self._local(f"{path}.bias")
        if name in self._named:
            return self._chosen(self._named[name], self._local(path), layer=False)
        self._refuse_copy(name)
        (use, *others) = self._uses[weight.initializer]
        added = None if others else added_to(use.node)
        if added is None or added.name not in self._uses:
            raise Unmatched(f"the graph has no bias of '{path}' ('{name}', or an initializer added to its product)")
        (_, *more) = added.uses()
        if more:
            raise Unmatched(_shared(str(added.name), self._uses[str(added.name)]))
        return Target(str(added.name), "", "added to the product")

    def _by_name(self, layer: Wanted, shared: bool) -> Target | None:
        names = self._named.get(self._local(f"{layer.path}.weight"))
        if not names:
            return None
        return self._fitting(layer, self._chosen(names, self._local(layer.path), layer=True, shared=shared))

    def _by_scope(self, layer: Wanted, shared: bool = False) -> Target | None:
        scope = self._scope(layer.path)
        names = self._scoped.get(scope, [])
        candidates = [(n, next(u.kind for u in self._uses[n] if u.kind and u.scope == scope)) for n in names]
        fitting = [(n, k) for n, k in candidates if layer.fits(self.size(n, k))]
        if not candidates:
            return None
        if len(fitting) > 1:
            several = listed(n for n, _ in fitting)
            raise Unmatched(f"module '{scope}' reads several weights that could be it: {several}")
        name, kind = fitting[0] if fitting else candidates[0]
        uses = self._uses[name]
        if kind.startswith("conv"):
            raise Unmatched(
                f"'{name}', which {uses[0]} reads, is no parameter as it was: exporters rename a kernel when they fold "
                "a normalisation into it. Export the base without that (older torch: "
                "training=TrainingMode.PRESERVE, do_constant_folding=False)"
            )
        if not shared and any(use.scope != scope or not use.kind for use in uses):
            raise Unmatched(_shared(name, uses))
        # What has lost its name and is read as [in, out] was a linear layer's; where it was so before, names are kept.
        return self._fitting(layer, Target(name, kind, "module scope", as_named=kind != "addmm"))

    def _by_order(self, wanted: Sequence[Wanted], taken: Collection[str]) -> Mapping[str, Target | Unmatched]:
        """Match what has neither name nor scope, where numbers and shapes leave one way only."""
        candidates: dict[tuple[int, int], list[tuple[str, str]]] = defaultdict(list)
        order = {node: i for i, node in enumerate(self._model.graph.all_nodes())}
        for name, uses in self._uses.items():
            nameless = not name.removesuffix(_TRANSPOSED).endswith(_LEAVES)
            if nameless and name not in taken and uses and all(u.kind and u.scope is None for u in uses):
                candidates[self.size(name, uses[0].kind)].append((name, uses[0].kind))
        found: dict[str, Target | Unmatched] = {}
        groups: dict[tuple[int | None, int | None], list[Wanted]] = defaultdict(list)
        for layer in wanted:
            groups[layer.out_features, layer.in_features].append(layer)
        for (out_features, in_features), layers in groups.items():
            if out_features is None or in_features is None:
                found |= {layer.path: self._missing(layer) for layer in layers}
                continue
            there = sorted(
                candidates[out_features, in_features], key=lambda c: min(order[u.node] for u in self._uses[c[0]])
            )
            templates = {re.sub(r"(?<![^.])\d+(?![^.])", "#", layer.path) for layer in layers}
            if not there:
                found |= {layer.path: self._missing(layer) for layer in layers}
            elif len(templates) > 1 or len(there) != len(layers):
                why = (
                    f"the graph has neither its name nor its module, and {len(there)} nameless weights of its shape "
                    f"{layers[0]} ({listed(n for n, _ in there)}) for {len(layers)} layers of the adapter "
                    f"({listed(sorted(templates))}). Export the base with names of nodes or parameters"
                )
                found |= {layer.path: Unmatched(why) for layer in layers}
            else:
                shared = {n: self._uses[n] for n, _ in there if len(self._uses[n]) > 1}
                for layer, (name, kind) in zip(layers, there, strict=True):
                    target = Target(name, kind, f"shape and order (one of {len(there)})", as_named=False)
                    found[layer.path] = Unmatched(_shared(name, shared[name])) if name in shared else target
        return found

    def _chosen(self, names: Sequence[str], scope: str, *, layer: bool, shared: bool = False) -> Target:
        """The one of the initializers that have a parameter's name (as it is, or transposed) that the module reads."""
        mine = {n: [u for u in self._uses[n] if u.scope in (scope, None) and (u.kind or not layer)] for n in names}
        held = [n for n in names if mine[n]] or list(names[:1])
        if len(held) > 1:
            raise Unmatched(f"the graph has it more than once: {listed(held)}")
        (name,) = held
        uses, own = self._uses[name], mine[name]
        if not own and not (shared and uses):
            readers = listed(map(str, uses)) or "nothing"
            quantized = any(u.node.op_type in _QUANTIZED for u in uses)
            raise Unmatched(
                _advice(listed(map(str, uses)))
                if quantized
                else f"initializer '{name}' is read by {readers}, and not by a layer of module '{scope}': it is tied, "
                "or the exporter folded something else into it (a normalisation), so that the adapter does not fit it"
            )
        known = all(u.scope is not None for u in own)
        if not shared and (len(own) < len(uses) or (len(own) > 1 and not known)):
            raise Unmatched(_shared(name, uses))
        kinds = {u.kind for u in (uses if shared else own)}
        if layer and len(kinds) > 1 and not shared:
            raise Unmatched(f"initializer '{name}' is read in several ways: {listed(map(str, own))}")
        kind = own[0].kind if own else uses[0].kind
        as_named = not re.search(rf"{re.escape(_TRANSPOSED)}(\.\d+)?$", name)
        return Target(name, kind, "name" if as_named else "name, transposed", as_named)

    def _fitting(self, layer: Wanted, target: Target) -> Target:
        size = self.size(target.initializer, target.kind)
        if not layer.fits(size):
            raise Unmatched(
                f"initializer '{target.initializer}' (found by {target.how}) is a matrix [out, in] of {list(size)}, "
                f"and the adapter is for one of {layer}: it is an adapter of another model"
            )
        return target

    def _missing(self, layer: Wanted) -> Unmatched:
        path = self._local(layer.path)
        quantized = [n for n in self._model.graph.all_nodes() if n.op_type in _QUANTIZED]
        mine = [n for n in quantized if path in (scope_of(n), *(str(v.name).rpartition(".")[0] for v in n.inputs if v))]
        if found := mine or quantized:
            more = "" if mine else f"no weight of '{path}' is in the graph, of which parts are quantized: "
            return Unmatched(more + _advice(listed(f"{n.op_type} '{n.name}'" for n in found)))
        return self._absent(f"weight of '{path}'", layer.path)

    def _absent(self, what: str, path: str) -> Unmatched:
        """That the graph lacks something of a module; and why, if queries, keys and values are one matrix in it."""
        packed = self._packed(self._local(path))
        text = f"the graph has no {what}{self._hint(self._local(path))}{packed}"
        return Unmatched(text) if packed else Absent(text)

    def _packed(self, path: str) -> str:
        fused = [n for n in self._model.graph.all_nodes() if n.op_type in _PACKED]
        place = _GENAI.sub(r"\1.attn.\2", path).rpartition(".")[0]
        ours = [scope for scope in (f"{place}.qkv_proj",) if scope in self._scoped]
        if not fused and not ours:
            return ""
        what = f"'{ours[0]}'" if ours else listed(f"{n.op_type} '{n.name}'" for n in fused)
        instead = "build the base with fuse_qkv=false" if ours else "merge into the file before it was optimized so"
        return f"; in {what} queries, keys and values are one matrix: {instead}"

    def _refuse_copy(self, name: str) -> None:
        """Refuse a parameter that has another's values, of which the older exporter stores one and copies the other."""
        for node in self._model.graph.all_nodes():
            if node.op_type == "Identity" and node.outputs[0].name == name and node.inputs[0] is not None:
                source = str(node.inputs[0].name)
                if source in self._uses:
                    raise Unmatched(f"'{name}' is a copy of another parameter: {_shared(source, self._uses[source])}")

    def _hint(self, name: str) -> str:
        known = [*self._named, *self._scoped]
        return did_you_mean(name, [n for n in known if "." in n])

    def _scope(self, path: str) -> str:
        """The scope of a module's nodes."""
        local = self._local(path)
        renamed = _GENAI.sub(r"\1.attn.\2", local)
        theirs = any(name.endswith(".MatMul.weight") for name in self._scoped.get(renamed, ()))
        return renamed if local not in self._scoped and theirs else local

    def _local(self, path: str) -> str:
        """A path of the adapter's model in the graph, which may hold the model inside another or a part of it."""
        return self._prefix + path.removeprefix(self._strip)


def _shared(name: str, uses: Iterable[Use]) -> str:
    readers = listed(dict.fromkeys(map(str, uses)))
    return (
        f"initializer '{name}' is shared: {readers} read it, and a change for the one would change the other. Export "
        "the base so that each has its own (untie the weights; without torch's optimizer, which shares equal tensors)"
    )


def _advice(nodes: str) -> str:
    return (
        f"its weight is quantized ({nodes}), which takes no update without being rounded again. Merge into the "
        "floating-point file and quantize the result, or keep the adapter beside the model at run time"
    )
