"""Insert: an adapter's parameters at each matched layer, and the layers' calls through them (:mod:`.activate`).

What trains beside them is a copy: of ``modules_to_save`` and of the biases asked for, below
``_adapters.<name>`` under their names in the base, which stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafx.bases.tensor import QuantizedTensor
from lorafx.errors import MatchError
from lorafx.graph import CapturedModule, annotate, get_path, mark_own, named_tensors, notes, set_tensor
from lorafx.ir import ADAPTERS, FOLDED, Adapter, Loftq, Site, Stage, adapters, base_modules
from lorafx.passes.activate import activate, deactivate
from lorafx.passes.base import Pass, PassResult
from lorafx.passes.match import Choice
from lorafx.passes.residual import keep_residual
from lorafx.passes.samples import refuse_changed, sample
from lorafx.spec import LoraSpec, matches
from lorafx.variants import VARIANTS
from lorafx.variants.base import Start, StartRequest
from lorafx.variants.inits import find_init


@dataclass(frozen=True)
class Insert(Pass):
    """Add an adapter to the chosen layers of a graph, in place.

    Options: ``choices`` from :func:`~lorafx.passes.match.match`; ``specs`` they were made with;
    ``generator`` for the initial values (None: torch's global one); ``adapter``, its name; ``factors``, A and B of the
    sites, by name, that :func:`~lorafx.passes.loftq.loftq` has told. With ``alone`` it is the
    active one afterwards, and nothing else requires gradients; otherwise what is active and what trains stays.
    """

    choices: tuple[Choice, ...]
    specs: tuple[LoraSpec, ...]
    generator: torch.Generator | None = None
    adapter: str = "default"
    alone: bool = True
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    name: ClassVar[str] = "insert"
    requires: ClassVar[frozenset[Stage]] = frozenset(Stage)
    ensures: ClassVar[Stage] = Stage.INSERTED

    def run(self, gm: CapturedModule) -> PassResult:
        trained = trained_base(gm, self.choices, self.specs)
        chosen = [(c, self._told(c.site, c.spec), c.spec) for c in self.choices if c.site and c.spec]
        adapter = Adapter(self.adapter, self.specs, tuple(site for _, site, _ in chosen), trained)
        for site in adapter.sites:
            refuse_changed(gm, site)
        _refuse_untold((site, spec) for _, site, spec in chosen if site.name not in self.factors)
        starts = [start_values(gm, site, spec, self.generator, self.factors.get(site.name)) for _, site, spec in chosen]
        shared = _shared(gm, [(site, spec) for _, site, spec in chosen], adapter)
        active, by_row = gm.meta.get("active", ()), gm.meta.get("by_row", False)
        deactivate(gm)  # from here on nothing raises
        residual = []
        for (_, site, _), start in zip(chosen, starts, strict=True):
            for name, value in start.parameters.items():
                _own(gm, site.parameter_name(name), nn.Parameter(value, requires_grad=False))
            if keep_residual(gm, adapter, site, start):
                residual.append(site.weight)
        _mark_layers(gm, [choice for choice, _, _ in chosen])
        for name, value in shared.items():
            _own(gm, name, value, persistent=False)
        _add_indices(gm, adapter)
        _copy_trained(gm, adapter)
        adapter = replace(adapter, residual=tuple(dict.fromkeys(residual)))
        gm.meta["adapters"] = {**adapters(gm), self.adapter: adapter}
        new = {s.weight: sample(get_path(gm, s.weight)) for s in adapter.sites}
        gm.meta["samples"] = {**new, **gm.meta.get("samples", {})}
        if self.alone:
            activate(gm, (self.adapter,))
            train_only(gm, (self.adapter,))
        else:
            activate(gm, active, by_row)
        skipped = tuple((c.candidate.name, c.reason) for c in self.choices if c.site is None)
        return PassResult(gm, len(chosen), skipped)

    def _told(self, site: Site, spec: LoraSpec) -> Site:
        """The site, which knows it if its factors make up for what the base lost."""
        if site.name not in self.factors:
            return site
        settings = str(spec.base), spec.block_size, spec.double_quant
        return replace(site, loftq=Loftq(spec.init, *settings, site.r, site.scaling))


def _refuse_untold(chosen: Iterable[tuple[Site, LoraSpec]]) -> None:
    for site, spec in chosen:
        init = find_init(spec.init)
        if init is not None and init.rounds:
            raise MatchError(
                f"site '{site.name}': init={spec.init!r} stores the dense weight anew, as only lorafx.apply does, "
                "before there are adapters. Start this one otherwise, or apply the spec to the model"
            )


def put_adapter(gm: CapturedModule, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter with these values, by state dict name, to a graph without active adapters, in place.

    They are those of its sites' parameters, and of what it trains whole where that is not as in the base. For
    layers that some adapter of the graph adapts already; shapes and names are the caller's to get right.
    """
    _add_indices(gm, adapter)
    _copy_trained(gm, adapter)
    whole = {adapter.own_name(name) for name in adapter.trained}
    for name, value in tensors.items():
        if name in whole:
            with torch.no_grad():
                get_path(gm, name).copy_(value)
        else:
            _own(gm, name, nn.Parameter(value))
    for name in adapter.parameter_names:
        get_path(gm, name).requires_grad_(False)
    gm.meta["adapters"] = {**adapters(gm), adapter.name: adapter}


def train_only(gm: CapturedModule, names: Sequence[str]) -> None:
    """Let the parameters of these adapters require gradients, and those of no others."""
    wanted = {n for name in names for n in adapters(gm)[name].parameter_names}
    for adapter in adapters(gm).values():
        for name in adapter.parameter_names:
            tensor = get_path(gm, name)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(name in wanted and tensor.numel() > 0)  # without a rank there is nothing to train


def _mark_layers(gm: CapturedModule, choices: Sequence[Choice]) -> None:
    """Note on layers' calls whose they are, for :mod:`.activate` to find them by."""
    wanted: dict[str, list[str]] = {}
    for choice in choices:
        assert choice.site is not None
        for node in choice.candidate.nodes:
            wanted.setdefault(node.name, []).append(choice.site.layer)
    for node in gm.graph.nodes:
        if node.name in wanted:
            annotate(node, layers=tuple(dict.fromkeys((*notes(node).get("layers", ()), *wanted[node.name]))))


def start_values(
    gm: CapturedModule,
    site: Site,
    spec: LoraSpec,
    generator: torch.Generator | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Start:
    """First values of a site, by the spec's initialisation or from given factors A and B.

    For a stack of weights they are those of each one, stacked.
    """
    weight = get_path(gm, site.weight).detach()
    variant, dtype = VARIANTS[site.variant], spec.dtype_for(weight.dtype)

    def start(matrix: Tensor, *factors: Tensor) -> Start:
        request = StartRequest(
            matrix,
            site.r,
            site.scaling,
            spec.init,
            dtype,
            generator,
            spec.options,
            sparse=site.kind == "embedding",
            factors=(factors[0], factors[1]) if factors else None,
        )
        return variant.start(request)

    matrix = site.matrix(weight)
    if matrix.dim() == 2:
        return start(matrix, *(factors or ()))
    several = [start(*one) for one in zip(matrix, *(factors or ()), strict=True)]
    bases = [s.base for s in several if s.base is not None]
    parameters = {n: torch.stack([s.parameters[n] for s in several]) for n in several[0].parameters}
    return Start(parameters, torch.stack(bases) if bases else None)


def _own(gm: CapturedModule, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Give the graph a tensor of its own; one that is not persistent is in no state dict."""
    mark_own(tensor)
    set_tensor(gm, name, tensor)
    if not persistent:
        holder, _, leaf = name.rpartition(".")
        get_path(gm, holder)._non_persistent_buffers_set.add(leaf)


def _add_indices(gm: CapturedModule, adapter: Adapter) -> None:
    """The indices of the rows that sites adapt, where not all of a weight's."""
    for site in adapter.sites:
        if site.rows is not None:
            _own(gm, site.index_name, site.index(get_path(gm, site.weight)), persistent=False)


def _shared(gm: CapturedModule, chosen: Sequence[tuple[Site, LoraSpec]], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that a variant's sites share, by name, as large as the largest of the sites needs.

    Raises:
        MatchError: specs of one variant want different ones.
    """
    groups: dict[str, list[tuple[Site, LoraSpec]]] = {}
    for site, spec in chosen:
        if VARIANTS[site.variant].shared:
            groups.setdefault(site.variant, []).append((site, spec))
    found: dict[str, Tensor] = {}
    for variant, members in groups.items():
        wanted = {(spec.options, spec.dtype_for(get_path(gm, site.weight).dtype)) for site, spec in members}
        if len(wanted) > 1:
            raise MatchError(
                f"all sites of variant {variant!r} share their projections, and these specs want different ones: "
                f"{' or '.join(sorted(f'{dict(options)} in {dtype}' for options, dtype in wanted))}. Give them equal "
                "options and adapter_dtype, or make an adapter of each"
            )
        ((options, dtype),) = wanted
        sizes = [(site.out_features, site.in_features) for site, _ in members]
        device = get_path(gm, members[0][0].weight).device
        drawn = VARIANTS[variant].share(sizes, max(site.r for site, _ in members), options, dtype)
        found |= {adapter.own_name(name): value.to(device) for name, value in drawn.items()}
    return found


def _copy_trained(gm: CapturedModule, adapter: Adapter) -> None:
    """The adapter's copies of what trains whole; names of one tensor stay names of one tensor."""
    copy_called_modules(gm, adapter.own_name(""), adapter.trained)
    copies: dict[int, Tensor] = {}
    kept = gm.state_dict().keys()
    for name in adapter.trained:
        old = get_path(gm, name)
        if id(old) not in copies:
            value = old.dequantize() if isinstance(old, QuantizedTensor) else old.detach().clone()
            copies[id(old)] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        _own(gm, adapter.own_name(name), copies[id(old)], persistent=name in kept)


def copy_called_modules(gm: CapturedModule, prefix: str, names: Sequence[str]) -> None:
    """Copy the modules that the graph calls whole and that hold tensors of these names to below ``prefix``.

    Put there afterwards, other tensors take the place of those of the base in the copies.
    """
    for node in gm.graph.find_nodes(op="call_module"):
        if any(name.startswith(f"{node.target}.") for name in names):
            gm.set_submodule(f"{prefix}{node.target}", _module_copy(get_path(gm, str(node.target))))


def _module_copy(module: nn.Module) -> nn.Module:
    """A module of the same class over the same tensors."""
    new = copy.copy(module)
    for store in ("_parameters", "_buffers"):
        setattr(new, store, dict(getattr(module, store)))
    new._modules = {n: None if m is None else _module_copy(m) for n, m in module._modules.items()}
    return new


def trained_base(gm: CapturedModule, choices: Sequence[Choice], specs: Sequence[LoraSpec]) -> tuple[str, ...]:
    """Names of the base tensors that train whole: ``modules_to_save`` (their buffers too) and ``bias``."""
    names: dict[str, None] = {}
    tensors = {n: t for n, t in named_tensors(gm) if n.partition(".")[0] not in (ADAPTERS, FOLDED)}
    parameters = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}
    modules = base_modules(gm, aliases=True)
    for spec in specs:
        for module in modules:
            if matches(module, spec.trained_modules):
                names.update(dict.fromkeys(n for n in tensors if n.startswith(module + ".")))
        if spec.bias == "all":
            names.update(dict.fromkeys(n for n in parameters if n.rpartition(".")[2].endswith("bias")))
        if spec.bias == "lora_only":
            taken = (c.site.bias for c in choices if c.site is not None and c.spec is spec)
            names.update(dict.fromkeys(n for n in taken if n is not None))
    of_adapters = {n for a in adapters(gm).values() for n in a.parameter_names}
    names = {n: None for n in names if n not in of_adapters}
    for name in names:
        aliases = [n for n, p in tensors.items() if p is tensors[name] and n not in names]
        if aliases:
            raise MatchError(
                f"'{name}' is to be trained whole (modules_to_save or bias), and is the same tensor as "
                f"'{aliases[0]}', which is not. Name both modules in modules_to_save, or leave both out"
            )
    return tuple(names)
