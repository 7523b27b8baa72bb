"""The intermediate representation: sites, stages, the text form of a graph, and the rules each stage keeps.

A *site* is an adapted layer. Each of its calls is one node,
``lorafx.<variant>(x, weight, bias, *parameters, scaling, dropout, training)``, whose parameters are
``get_attr`` nodes below the site's own path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from lorafx.errors import PassError, VerifyError
from lorafx.graph import CapturedModule, get_path, notes
from lorafx.variants import VARIANTS


class Stage(Enum):
    """How far a graph has come; kept in ``gm.meta["stage"]``."""

    CAPTURED = "captured"
    INSERTED = "adapted"
    MERGED = "merged"


@dataclass(frozen=True)
class Site:
    """An adapted layer.

    ``name`` is the module's dotted path (or the parameter's, for a functional call on a bare parameter),
    ``path`` the module path that holds its adapter, ``weight``/``bias`` the names of the base tensors.
    ``transposed`` says that the weight is stored ``[in, out]`` (GPT-2's Conv1D). ``apart`` says that the
    weight is used elsewhere too, so that a fold must write a weight of its own.
    """

    name: str
    path: str
    adapter: str
    variant: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    r: int
    alpha: float
    scaling: float
    dropout: float
    transposed: bool = False
    apart: bool = False

    def parameter_name(self, parameter: str) -> str:
        """The name in the state dict of one of the variant's parameters."""
        return f"{self.path}.{parameter}.{self.adapter}"

    @property
    def parameter_names(self) -> dict[str, str]:
        """The state dict names of the adapter's tensors, by the variant's names for them."""
        return {p: self.parameter_name(p) for p in VARIANTS[self.variant].parameters}

    def parameters(self, gm: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's tensors in ``gm``."""
        return {p: get_path(gm, name) for p, name in self.parameter_names.items()}

    def to_note(self) -> dict[str, Any]:
        """Plain data for a node's metadata."""
        return asdict(self)


def stage(gm: CapturedModule) -> Stage:
    """The stage a graph is in.

    Raises:
        PassError: it is no graph of lorafx's.
    """
    if not isinstance(gm, CapturedModule):
        raise PassError(
            f"expected a graph made by lorafx.apply, got {type(gm).__name__}; call lorafx.apply(model, spec)"
        )
    found: Stage = gm.meta.get("stage", Stage.CAPTURED)
    return found


def site_nodes(gm: CapturedModule) -> dict[Site, list[Node]]:
    """Every site and the nodes that call it, in graph order."""
    stage(gm)  # refuses what is no graph of lorafx's
    found: dict[Site, list[Node]] = {}
    for node in gm.graph.nodes:
        note: Mapping[str, Any] | None = notes(node).get("site")
        if note is not None:
            found.setdefault(Site(**note), []).append(node)
    return found


def sites(gm: CapturedModule) -> tuple[Site, ...]:
    """The adapted layers of a graph, in the order of their first call."""
    return tuple(site_nodes(gm))


def format_graph(gm: CapturedModule) -> str:
    """The graph as stable text: one line a node, signature first. Equal graphs give equal text."""
    arguments = ", ".join(a.name + ("?" if a.optional else "") for a in gm.signature.arguments)
    lines = [f"graph({arguments}) -> ({', '.join(gm.signature.outputs)})"]
    for node in gm.graph.nodes:
        given = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
        target = node.target if isinstance(node.target, str) else _function_name(node.target)
        if node.op == "output":
            lines.append(f"  return {', '.join(given)}")
        elif node.op in ("placeholder", "get_attr"):
            lines.append(f"  %{node.name} = {node.op}[{target}]")
        else:
            lines.append(f"  %{node.name} = {target}({', '.join(given)})")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v) for v in value)}]"
    return repr(value)


def _function_name(target: Any) -> str:
    return str(target) if hasattr(target, "_schema") else f"{target.__module__}.{target.__name__}"


#: The one table of legality: whether a stage allows lorafx's operators.
_ADAPTED: Mapping[Stage, bool] = {Stage.CAPTURED: False, Stage.INSERTED: True, Stage.MERGED: False}


def verify(gm: CapturedModule, expected: Stage) -> None:
    """Check that a graph keeps the rules of a stage.

    Every lorafx operator is a site's, its parameters are where the site says, and no site (nor any
    adapter tensor that a merged graph would carry along) exists where the stage allows none.

    Raises:
        VerifyError: names the node and the rule.
    """
    nodes = site_nodes(gm)
    called = {n for held in nodes.values() for n in held}
    for node in _lorafx_calls(gm.graph):
        if not _ADAPTED[expected]:
            raise VerifyError(f"node %{node.name} calls {node.target}, which no {expected.value} graph may hold")
        if node not in called:
            raise VerifyError(f"node %{node.name} calls {node.target} but belongs to no site")
    for site, held in nodes.items():
        if not _ADAPTED[expected]:
            raise VerifyError(f"node %{held[0].name} is a call of site {site.name} in a {expected.value} graph")
        variant = VARIANTS[site.variant]
        shapes = variant.shapes(site.out_features, site.in_features, site.r)
        for name, parameter in site.parameters(gm).items():
            if tuple(parameter.shape) != shapes[name]:
                raise VerifyError(
                    f"site {site.name}: {name} is {tuple(parameter.shape)}, its shape must be {shapes[name]}"
                )
        wanted = tuple(site.parameter_names.values())
        for node in held:
            given = tuple(a.target for a in node.args[3 : 3 + len(wanted)] if isinstance(a, Node))
            if node.target is variant.op and given != wanted:
                raise VerifyError(f"site {site.name}: node %{node.name} reads {given}, not {wanted}")


def _lorafx_calls(graph: Graph) -> Iterable[Node]:
    return (n for n in graph.nodes if n.op == "call_function" and getattr(n.target, "namespace", "") == "lorafx")


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors overlap in memory (also told of tensors without data, on the meta device)."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (a_low, a_high), (b_low, b_high) = _span(a), _span(b)
    return a_low < b_high and b_low < a_high


def _span(tensor: Tensor) -> tuple[int, int]:
    low = int(tensor.storage_offset())
    high = low + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return low * tensor.element_size(), high * tensor.element_size()
