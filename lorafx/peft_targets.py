"""What PEFT wraps for the sites of an adapter: modules, parameters of modules, whole attentions, rows of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch.fx import Node

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, named_tensors, notes
from lorafx.ir import Adapter, Site, base_modules, layer_nodes
from lorafx.ops import FLAT, PARAMETERS, STORAGE, adapted_weight

Form = Literal["module", "parameter", "attention", "tied", "tokens"]


@dataclass(frozen=True)
class Target:
    """One thing that PEFT wraps, and the sites that it stands for.

    ``name`` is what a config finds it by: that of the ``module``, or of the ``parameter`` in it. An attention is
    adapted as a whole; ``modules`` are all that share a tied weight, the embedding first. ``depth`` counts the
    module's wrappers around this one: PEFT nests one for each parameter.
    """

    form: Form
    name: str
    module: str
    sites: tuple[Site, ...]
    parameter: str = ""
    modules: tuple[str, ...] = ()
    depth: int = 0


def targets(gm: CapturedModule, adapter: Adapter) -> tuple[Target, ...]:
    """What PEFT wraps for the sites of an adapter, in their order.

    Raises:
        AdapterError: PEFT could not wrap it, or not to any effect.
    """
    modules = frozenset(base_modules(gm))
    attentions: dict[str, tuple[Site, ...]] = {}
    found: list[Target] = []
    for site in adapter.sites:
        if site.variant == "tokens":
            found.append(Target("tokens", site.name, site.name, (site,)))
        elif attention := _attention(gm, site):
            attentions[attention] = (*attentions.get(attention, ()), site)
        elif site.kind in PARAMETERS and site.name != site.weight:
            found.append(_tied(gm, site))
        elif site.name in modules and _is_layer(gm, site):
            found.append(Target("module", site.name, site.name, (site,)))
        else:
            module, _, leaf = site.weight.rpartition(".")
            _check_read_inside(gm, site, module, modules)
            found.append(Target("parameter", site.weight, module, (site,), parameter=leaf))
    found += [Target("attention", module, module, members) for module, members in attentions.items()]
    return tuple(replace(t, depth=_depth(gm, t, found)) for t in found)


class Wrapped:
    """Paths in a model in which PEFT has wrapped these targets."""

    def __init__(self, found: Sequence[Target]) -> None:
        self._wrappers: Counter[str] = Counter()
        for target in found:
            if target.form != "tokens":
                self._wrappers.update(target.modules or (target.module,))
            if target.form == "attention":
                self._wrappers[f"{target.module}.out_proj"] = 1

    def inside(self, path: str) -> str:
        """Where a module or tensor of the base lies: within all its wrappers."""
        atoms = path.split(".")
        written = []
        for i, atom in enumerate(atoms):
            written += [atom, *["base_layer"] * self._wrappers[".".join(atoms[: i + 1])]]
        return ".".join(written)

    def wrapper(self, module: str) -> str:
        """Where the outermost wrapper of a module lies."""
        holder, _, name = module.rpartition(".")
        return f"{self.inside(holder)}.{name}" if holder else name


def _depth(gm: CapturedModule, target: Target, found: Sequence[Target]) -> int:
    """PEFT wraps a module for one parameter after the other, in the order in which the module has them."""
    if target.form != "parameter":
        return 0
    order = list(get_path(gm, target.module)._parameters)
    later = order[order.index(target.parameter) + 1 :]
    return sum(t.module == target.module and t.parameter in later for t in found)


def _is_layer(gm: CapturedModule, site: Site) -> bool:
    """Whether the module of a site is a layer to PEFT too, and not code of its own with a weight."""
    return site.kind not in ("linear", "addmm") or getattr(get_path(gm, site.name), "kind", "") == "linear"


def _attention(gm: CapturedModule, site: Site) -> str | None:
    """The attention with a fused input projection that a site belongs to."""
    for suffix in (".in_proj_weight", ".out_proj.weight"):
        module = site.weight.removesuffix(suffix)
        if module == site.weight or getattr(get_path(gm, module), "kind", "") != "attention":
            continue
        if get_path(gm, module)._parameters.get("in_proj_weight") is None:
            return None
        if site.variant != "lora":
            raise _no_place(site, f"PEFT adapts '{module}' (nn.MultiheadAttention) by LoRA only, not by {site.variant}")
        return module
    return None


def _tied(gm: CapturedModule, site: Site) -> Target:
    """All modules of a weight that is adapted in all its uses: to PEFT an embedding, and layers that follow it."""
    weight = get_path(gm, site.weight)
    modules = [name.rpartition(".")[0] for name, tensor in named_tensors(gm) if tensor is weight]
    linear = [m for m in modules if getattr(get_path(gm, m), "kind", "") == "linear"]
    embeddings = [m for m in modules if m not in linear]
    if len(embeddings) != 1 or site.variant != "lora":
        raise _no_place(
            site,
            f"PEFT ties the LoRA of one embedding to that of linear layers, and this is {site.variant} of {modules}",
        )
    return Target("tied", embeddings[0], embeddings[0], (site,), modules=(embeddings[0], *linear))


def _check_read_inside(gm: CapturedModule, site: Site, module: str, modules: Collection[str]) -> None:
    """PEFT changes a parameter while the forward of its module runs, and for nothing that reads it elsewhere."""
    scopes = {str(notes(n).get("scope", "")) for node in layer_nodes(gm).get(site.layer, ()) for n in _readers(node)}
    outside = sorted(s for s in scopes if s != module and not s.startswith(f"{module}."))
    if outside or not module:
        where = f"'{outside[0]}'" if outside and outside[0] else "the model's own forward"
        raise _no_place(
            site, f"PEFT adapts a parameter for the module that holds it, and {where} computes with this one"
        )
    if module not in modules:
        raise _no_place(site, f"'{module}' is another name of a module that PEFT knows by its first one only")
    if STORAGE[site.kind] is FLAT:
        raise _no_place(site, "PEFT adapts no convolution's kernel that is a bare parameter")


def _readers(node: Node) -> list[Node]:
    """The calls that compute with what a node is: itself, or where it is the read of a parameter, its users."""
    if node.op != "get_attr" and node.target is not adapted_weight:
        return [node]
    return [reader for user in node.users for reader in _readers(user)]


def _no_place(site: Site, why: str) -> AdapterError:
    return AdapterError(
        f"site '{site.name}' has no place in PEFT's format: {why}. Leave it out (exclude_modules=['{site.name}']), or "
        "keep this adapter by save_checkpoint, or as safetensors.torch.save_file(adapter_state_dict(gm), path)"
    )
