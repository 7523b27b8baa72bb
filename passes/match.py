"""Match: which layers of a captured graph the specs mean. Changes nothing; the result is data.

A *candidate* is every call of a layer on a parameter. Calls of one module are one candidate; a
functional call on a bare parameter is named after the parameter.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from lorafx.checks import did_you_mean
from lorafx.errors import FrozenHeadWarning, MatchError
from lorafx.graph import CapturedModule, get_path, named_tensors, notes
from lorafx.ir import Site, base_modules, same_memory
from lorafx.ops import LAYERS, STORAGE
from lorafx.passes.layers import find_operands, readers
from lorafx.spec import ALL_LINEAR, LoraSpec, matches
from lorafx.variants import VARIANTS

aten = torch.ops.aten

#: Operators that move or cast values and compute nothing: a layer behind them makes the output.
_SHAPE_ONLY_NAMES = """
    view reshape slice select squeeze unsqueeze transpose permute t flatten unflatten expand contiguous
    clone alias detach to _to_copy float double half bfloat16 getitem split chunk unbind
"""
_SHAPE_ONLY = frozenset(_SHAPE_ONLY_NAMES.split())


#: The kinds that "all-linear" means.
LINEAR = ("linear", "addmm")


@dataclass(frozen=True)
class Candidate:
    """A layer of the graph that could be adapted.

    ``elsewhere`` lists the other uses of its weight; ``module`` says whether a linear layer makes the call,
    rather than other code with a parameter; ``is_output`` whether it makes an output of the model.
    """

    name: str
    path: str
    kind: str
    nodes: tuple[Node, ...]
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: bool
    is_output: bool
    elsewhere: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What becomes of a candidate: its site and spec, or the reason why it is left out."""

    candidate: Candidate
    site: Site | None
    spec: LoraSpec | None
    reason: str


def candidates(gm: CapturedModule) -> tuple[Candidate, ...]:
    """Every layer of the graph that could be adapted, in order of first call."""
    found: dict[str, Candidate] = {}
    heads = tuple(gm.meta.get("output_layers", ()))
    makers = _output_makers(gm)
    for node in gm.graph.nodes:
        operands = find_operands(node)
        if operands is None:
            continue
        weight_name = str(operands.source.target)
        weight = get_path(gm, weight_name)
        if not isinstance(weight, nn.Parameter):
            continue
        matrix = STORAGE[operands.kind].matrix(weight)
        if matrix.dim() != 2:
            continue
        # A layer's weight used by other code (nn.MultiheadAttention's out_proj) is the layer's site still.
        owner = weight_name.removesuffix(".weight")
        layer = owner != weight_name and getattr(get_path(gm, owner), "kind", "") == "linear"
        owned = layer or weight_name == f"{notes(node).get('scope', '')}.weight"
        name = owner if owned else weight_name
        if name in found:
            known = found[name]
            found[name] = replace(known, nodes=(*known.nodes, node), is_output=known.is_output or node in makers)
            continue
        output = node in makers or any(name == h or name.startswith(h + ".") for h in heads)
        found[name] = Candidate(
            name=name,
            path=name if owned else f"{name}_adapter",
            kind=operands.kind,
            nodes=(node,),
            weight=weight_name,
            bias=_name_of_parameter(operands.bias),
            shape=tuple(matrix.shape),
            dtype=weight.dtype,
            module=layer,
            is_output=output,
            elsewhere=(),
        )
    uses = _WeightUses(gm)
    return tuple(replace(c, elsewhere=uses.beside(c)) for c in found.values())


def match(gm: CapturedModule, specs: Sequence[LoraSpec], adapter: str = "default") -> tuple[Choice, ...]:
    """Decide for every candidate. Where several specs mean a layer, the first in the list has it.

    Raises:
        MatchError: a target names no layer, nothing is matched at all, or a matched weight has other
            uses that a fold would change (``tied="refuse"``).
    """
    found = candidates(gm)
    choices: dict[str, Choice] = {}
    for spec in specs:
        _check_entries(gm, found, spec)
        taken = 0
        for candidate in found:
            reason = _why_not(candidate, spec)
            known = choices.get(candidate.name)
            if known is not None and known.site is not None:
                taken += reason is None
                continue
            site = None if reason is not None else _site(candidate, spec, adapter)
            taken += site is not None
            choices[candidate.name] = Choice(candidate, site, spec if site else None, reason or "")
        if taken == 0:
            raise MatchError(_nothing_matched(found, spec))
    _refuse_shared(choices.values())
    _refuse_misfits(choices.values())
    return tuple(choices.values())


def _why_not(candidate: Candidate, spec: LoraSpec) -> str | None:
    """The reason to leave a candidate out, or None to take it."""
    if spec.exclude_modules is not None and matches(candidate.name, spec.exclude_modules):
        return "excluded by exclude_modules"
    if any(_is_under(candidate.name, m) for m in spec.trained_modules):
        return "trained whole (modules_to_save)"
    if spec.target_modules != ALL_LINEAR:
        return None if matches(candidate.name, spec.target_modules) else "not in target_modules"
    if candidate.kind not in LINEAR:
        return "no linear layer (name it in target_modules to adapt it)"
    if candidate.is_output:
        return "output layer (name it in target_modules to adapt it)"
    if not candidate.module:
        return "functional call on a bare parameter (name it in target_modules to adapt it)"
    return None


def _site(candidate: Candidate, spec: LoraSpec, adapter: str) -> Site:
    return Site(
        name=candidate.name,
        path=candidate.path,
        adapter=adapter,
        variant=spec.variant,
        kind=candidate.kind,
        weight=candidate.weight,
        bias=candidate.bias,
        shape=candidate.shape,
        r=spec.rank_for(candidate.name),
        alpha=spec.alpha_for(candidate.name),
        scaling=spec.scaling_for(candidate.name),
        dropout=0.0 if LAYERS[candidate.kind].picks else spec.dropout,
        apart=bool(candidate.elsewhere) and spec.tied == "untie",
    )


def _check_entries(gm: CapturedModule, found: Sequence[Candidate], spec: LoraSpec) -> None:
    """Refuse the entries of a list that name no layer of the graph, all of them at once."""
    unmatched = []
    modules = base_modules(gm, aliases=True)
    names = [c.name for c in found]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        entries = getattr(spec, field)
        if entries is None or isinstance(entries, str):
            continue
        known = modules if field == "modules_to_save" else [*names, *modules]
        implied = spec.heads_of_task if field == "modules_to_save" else ()
        for entry in entries:
            if entry in implied or any(matches(n, (entry,)) for n in (names if field == "target_modules" else known)):
                continue
            unmatched.append(_unmatched(field, entry, names, modules))
    if unmatched:
        raise MatchError("; ".join(unmatched))


def _unmatched(field: str, entry: str, names: Sequence[str], modules: Sequence[str]) -> str:
    if field == "target_modules" and (held := [m for m in modules if matches(m, (entry,))]):
        inside = [n for n in names if any(n.startswith(m + ".") for m in held)]
        advice = f"; linear layers below it: {', '.join(inside[:4])}" if inside else ""
        return (
            f"target_modules names '{entry}', which is the module '{held[0]}' but no linear layer that this graph "
            f"calls (a layer these inputs never reach is not in the graph){advice}. Name linear layers, or remove "
            "the entry"
        )
    pool = names if field == "target_modules" else modules
    suffixes = {".".join(n.split(".")[i:]) for n in pool for i in range(n.count(".") + 1)}
    hint = did_you_mean(entry, sorted(suffixes))
    return f"{field} names '{entry}', and the model has no such layer{hint or ''}. Its layers end in: " + ", ".join(
        sorted({n.rpartition(".")[2] for n in names})[:12]
    )


def _nothing_matched(found: Sequence[Candidate], spec: LoraSpec) -> str:
    if not found:
        return "the graph has no linear layer on a parameter, so there is nothing to adapt"
    counts = Counter(_why_not(c, spec) for c in found)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    endings = sorted({c.name.rpartition(".")[2] for c in found})
    hint = did_you_mean(spec.target_modules, endings) if isinstance(spec.target_modules, str) else ""
    return (
        f"target_modules={spec.target_modules!r} leaves nothing to adapt among {len(found)} layers: {reasons}{hint}. "
        f"A string is a regex for the whole name, a list holds names or their dotted suffixes, such as {endings[:12]}"
    )


def _refuse_shared(choices: Iterable[Choice]) -> None:
    for choice in choices:
        site, candidate = choice.site, choice.candidate
        if site is None or not candidate.elsewhere or site.apart:
            continue
        raise MatchError(
            f"site '{site.name}' multiplies by '{site.weight}', which the graph also uses elsewhere: "
            f"{'; '.join(candidate.elsewhere[:3])}. Folding the adapter into it would change that use as well. "
            f"Exclude the layer (exclude_modules=['{site.name}']), or set tied=\"untie\": the adapted call then gets "
            "a weight of its own when it is merged"
        )


def _refuse_misfits(choices: Iterable[Choice]) -> None:
    """Refuse a layer that the initialisation asked for cannot start."""
    for choice in choices:
        site, spec = choice.site, choice.spec
        if site is None or spec is None:
            continue
        why = VARIANTS[site.variant].misfit(spec.init, site.kind, site.shape, site.r, site.apart)
        if why is not None:
            raise MatchError(f"site '{site.name}': {why}")


class _WeightUses:
    """Who reads each weight's memory: under its own name, an alias, or from a subgraph."""

    def __init__(self, gm: CapturedModule) -> None:
        self.readers: dict[int, list[tuple[Tensor, Node]]] = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            value = get_path(gm, str(node.target))
            if isinstance(value, Tensor):
                self.readers.setdefault(value.untyped_storage()._cdata, []).append((value, node))
        self.gm = gm

    def beside(self, candidate: Candidate) -> tuple[str, ...]:
        """Descriptions of the uses of a candidate's weight other than its own calls."""
        weight = get_path(self.gm, candidate.weight)
        own = set(candidate.nodes)
        found = []
        for value, node in self.readers.get(weight.untyped_storage()._cdata, []):
            if not same_memory(weight, value):
                continue
            found += [_describe(n, str(node.target)) for n in readers(node) if n not in own]
        return tuple(dict.fromkeys(found))


def _describe(node: Node, weight: str) -> str:
    scope = notes(node).get("scope") or "the model's own forward"
    return f"{node.target} in '{scope}' (as '{weight}')"


def _output_makers(gm: CapturedModule) -> set[Node]:
    """Nodes that make an output of the graph with nothing but shape changes and casts after them."""
    makers: set[Node] = set()
    pending = list(gm.graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if find_operands(node) is not None:
            makers.add(node)
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", getattr(node.target, "__name__", ""))
        if name in _SHAPE_ONLY or (node.op == "call_method" and node.target in _SHAPE_ONLY):
            pending += [a for a in node.args[:1] if isinstance(a, Node)]
    return makers


def _name_of_parameter(node: Node | None) -> str | None:
    return str(node.target) if node is not None and node.op == "get_attr" else None


def _is_under(name: str, module: str) -> bool:
    atoms = name.split(".")
    return any(matches(".".join(atoms[: i + 1]), (module,)) for i in range(len(atoms)))


def warn_of_frozen_heads(gm: CapturedModule, choices: Sequence[Choice]) -> None:
    """Warn of output layers that look freshly initialised and would stay as they are."""
    initializer = float(gm.meta.get("initializer_range", math.nan))
    tensors = dict(named_tensors(gm))
    for choice in choices:
        candidate = choice.candidate
        if choice.site is not None or not candidate.is_output or "modules_to_save" in choice.reason:
            continue
        weight, bias = tensors[candidate.weight], tensors.get(candidate.bias or "")
        if not weight.is_meta and _looks_untrained(weight, bias, initializer):
            warnings.warn(
                f"'{candidate.name}' is the model's head, looks freshly initialised, and gets no adapter: it will "
                f"not train. Add modules_to_save=['{candidate.name.rpartition('.')[2]}'] to the spec, or load its "
                "trained weights first",
                FrozenHeadWarning,
                stacklevel=3,
            )


def _looks_untrained(weight: Tensor, bias: Tensor | None, initializer: float) -> bool:
    """Whether values are as transformers (normal, zero bias) or nn.Linear (uniform) initialise them."""
    std = float(weight.detach().float().std())
    if abs(std - initializer) < 0.1 * initializer and (bias is None or not bool(bias.detach().any())):
        return True
    bound = 1.0 / math.sqrt(weight.shape[1])
    uniform = abs(std - bound / math.sqrt(3.0)) < 0.1 * bound
    return uniform and bool(weight.detach().abs().max() <= bound)
