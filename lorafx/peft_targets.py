"""What PEFT wraps for the sites of an adapter: modules, parameters of modules, attentions as a whole, rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorafx.errors import AdapterError
from lorafx.graph import CapturedModule, get_path, notes
from lorafx.ir import Adapter, Site, base_modules, layer_nodes
from lorafx.ops import FLAT, STORAGE


@dataclass(frozen=True)
class Target:
    """One thing that PEFT wraps, and the sites that it stands for.

    ``name`` is what a config finds it by: that of the ``module``, or of the ``parameter`` in it. An ``attention`` is
    adapted as a whole. ``depth`` counts the module's wrappers around this one: PEFT nests one for each parameter.
    """

    name: str
    module: str
    sites: tuple[Site, ...]
    parameter: str | None = None
    attention: bool = False
    depth: int = 0

    @property
    def tokens(self) -> bool:
        """Whether it is some rows of an embedding."""
        return self.sites[0].variant == "tokens"


def targets(gm: CapturedModule, adapter: Adapter) -> tuple[Target, ...]:
    """What PEFT wraps for the sites of an adapter, in their order.

    Raises:
        AdapterError: PEFT could not wrap it, or not to any effect.
    """
    modules = frozenset(base_modules(gm))
    attentions: dict[str, tuple[Site, ...]] = {}
    found: list[Target] = []
    for site in adapter.sites:
        attention = _attention(gm, site)
        if attention is not None:
            attentions[attention] = (*attentions.get(attention, ()), site)
        elif site.variant == "tokens" or (site.name in modules and _is_layer(gm, site)):
            found.append(Target(site.name, site.name, (site,)))
        else:
            module, _, leaf = site.weight.rpartition(".")
            _check_read_inside(gm, site, module)
            found.append(Target(site.weight, module, (site,), parameter=leaf))
    found += [Target(module, module, members, attention=True) for module, members in attentions.items()]
    return tuple(replace(t, depth=_depth(gm, t, found)) for t in found)


def path_in_file(found: Sequence[Target], path: str, *, inside: bool = True) -> str:
    """The path of a module or tensor of the base in a model that PEFT has wrapped; without ``inside``, of its wrapper."""
    wrappers: dict[str, int] = {}
    for target in found:
        if not target.tokens:
            wrappers[target.module] = wrappers.get(target.module, 0) + 1
        if target.attention:
            wrappers[f"{target.module}.out_proj"] = 1
    atoms = path.split(".")
    written = ""
    for i, atom in enumerate(atoms):
        written += f".{atom}"
        if inside or i < len(atoms) - 1:
            written += ".base_layer" * wrappers.get(".".join(atoms[: i + 1]), 0)
    return written[1:]


def _depth(gm: CapturedModule, target: Target, found: Sequence[Target]) -> int:
    """PEFT wraps a module for one parameter after the other, in the order in which the module has them."""
    if target.parameter is None:
        return 0
    order = list(get_path(gm, target.module)._parameters)
    later = order[order.index(target.parameter) + 1 :]
    return sum(t.module == target.module and t.parameter in later for t in found)


def _is_layer(gm: CapturedModule, site: Site) -> bool:
    """Whether the module of a site is a layer to PEFT too, and not code of its own with a weight."""
    return site.kind not in ("linear", "addmm") or getattr(get_path(gm, site.name), "kind", "") == "linear"


def _attention(gm: CapturedModule, site: Site) -> str | None:
    """The attention module that a site is a projection of, if PEFT adapts such a one (with a fused projection)."""
    for suffix in (".in_proj_weight", ".out_proj.weight"):
        module = site.weight.removesuffix(suffix)
        if module != site.weight and getattr(get_path(gm, module), "kind", "") == "attention":
            return module if get_path(gm, module)._parameters.get("in_proj_weight") is not None else None
    return None


def _check_read_inside(gm: CapturedModule, site: Site, module: str) -> None:
    """PEFT changes a parameter while the forward of its module runs, and for nothing that reads it elsewhere."""
    scopes = {str(notes(node).get("scope", "")) for node in layer_nodes(gm).get(site.layer, ())}
    outside = sorted(s for s in scopes if s != module and not s.startswith(f"{module}."))
    if module and not outside and STORAGE[site.kind] is not FLAT:
        return
    where = f"'{outside[0]}' computes with it" if outside and outside[0] else "the model's own forward computes with it"
    reason = "it is a bare kernel" if module and not outside else where
    raise AdapterError(
        f"site '{site.name}' has no place in PEFT's format, which has parameters for the code of the module that holds "
        f"them and no kernels: {reason}. Leave it out (exclude_modules=['{site.name}']), or keep this adapter by "
        "save_checkpoint, or as safetensors.torch.save_file(adapter_state_dict(gm), path)"
    )
