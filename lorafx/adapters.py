"""The life of adapters on one graph: add, switch, sum, route by row, disable, rename, delete, merge in place.

An adapter is its tensors and its record in the graph (:class:`lorafx.ir.Adapter`). Switching rewrites the graph
(:mod:`lorafx.passes.activate`), so adapters that are not active cost nothing but their memory.
"""

from __future__ import annotations

import gc
import keyword
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lorafx.errors import AdapterError, MergeError
from lorafx.graph import CapturedModule, Scope, delete_path, get_path, mark_own, set_tensor, share
from lorafx.ir import (
    ADAPTERS,
    FOLDED,
    ROWS,
    Stage,
    active_layers,
    adapters,
    find_adapter,
    stage,
    verify,
)
from lorafx.passes.activate import activate, deactivate, own_tensors
from lorafx.passes.by_row import check_rows
from lorafx.passes.insert import Insert, copy_called_modules, train_only
from lorafx.passes.match import match
from lorafx.passes.merge import folded_tensors, forget_folded, remove_adapter
from lorafx.passes.merge import merge as merged
from lorafx.passes.merge_base import Original, choose_base
from lorafx.passes.quantize import refuse_other_bases
from lorafx.spec import SpecLike, as_specs

T = TypeVar("T")

#: What PEFT calls no adapter in ``adapter_names``.
BASE = "__base__"


@dataclass(frozen=True)
class AdapterInfo:
    """What :func:`list_adapters` tells of one adapter; ``parameters`` counts all that trains with it."""

    name: str
    active: bool
    merged: bool
    variants: tuple[str, ...]
    ranks: tuple[int, ...]
    sites: int
    parameters: int


def list_adapters(gm: CapturedModule) -> tuple[AdapterInfo, ...]:
    """The adapters of a graph, in the order in which they were added.

    Raises:
        PassError: it is no graph of lorafx's, as everything here does.
    """
    found, running = adapters(gm), gm.meta.get("active", ())
    return tuple(
        AdapterInfo(
            name=adapter.name,
            active=adapter.name in running,
            merged=adapter.name in gm.meta.get("merged", ()),
            variants=tuple(dict.fromkeys(s.variant for s in adapter.sites)),
            ranks=tuple(sorted({s.r for s in adapter.sites})),
            sites=len(adapter.sites),
            parameters=sum(
                p.numel() for p in {get_path(gm, n) for n in adapter.parameter_names} if isinstance(p, nn.Parameter)
            ),
        )
        for adapter in found.values()
    )


def add_adapter(
    gm: CapturedModule,
    spec: SpecLike | Sequence[SpecLike],
    name: str,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Add an adapter to a graph, in place. Which adapters are active does not change: see :func:`set_adapter`.

    Args:
        gm: a graph from :func:`lorafx.apply` or :func:`lorafx.merge`.
        spec: as for :func:`lorafx.apply`; the path of an adapter on disk gives its settings, and
            ``load_adapter(gm, path, name)`` then its weights.
        name: what to call it; ``apply`` calls the first one ``"default"``.
        seed, generator: make the initial values reproducible (one of them; None uses torch's global state).

    Raises:
        AdapterError: the name is taken, or none that a module can have.
        MergeError: the base was overwritten since it was first adapted.
        QuantizationError: the spec has a ``base``, and the graph's weights are stored in another way.
        SpecError, MatchError: as :func:`lorafx.apply`. Nothing is changed.
    """
    _refuse_disabled(gm)
    specs = as_specs(spec)
    check_new_name(gm, name)
    if seed is not None:
        if generator is not None:
            raise ValueError("give seed or generator, not both")
        generator = torch.Generator().manual_seed(seed)
    bare = share(gm)
    deactivate(bare)
    choices = match(bare, specs, name)
    refuse_other_bases(gm, choices)
    with torch.inference_mode(False):
        Insert(choices, specs, generator, name, alone=False)(gm)


def set_adapter(gm: CapturedModule, names: str | Sequence[str]) -> None:
    """Make these the active adapters, in place. Several are summed: each adds what it would add alone.

    An adapter's update is always relative to the frozen model, whatever else is active, and they are summed in the
    order in which they were added, so that the order here means nothing; for DoRA it is
    ``(m / ||W + s B A||) (W + s B A) - W``. The parameters of the active adapters require gradients, and those of no
    others. Wrap the graph in DistributedDataParallel afterwards.

    Raises:
        AdapterError: there is no such adapter, one is named twice or merged in place, two have their own
            version of one tensor, or the graph is wrapped in DistributedDataParallel. Nothing is changed.
    """
    _refuse_disabled(gm)
    chosen = _names(names)
    if not chosen:
        raise AdapterError("set_adapter needs a name; `with disable_adapters(gm):` runs the model without adapters")
    refuse_wrapped(gm, chosen)
    switch(gm, chosen)
    train_only(gm, chosen)


def set_adapter_names(gm: CapturedModule, adapter_names: Sequence[str | None]) -> None:
    """Send each row of the following batches through an adapter of its own, in one pass over the base weights.

    Args:
        gm: the graph.
        adapter_names: for each row of the batch the name of its adapter; None (or PEFT's ``"__base__"``): none.
            The names stay until they are set again; :func:`set_adapter` ends it. Setting other names of
            the same adapters does not rewrite the graph. The parameters of the adapters named require gradients.

    Raises:
        AdapterError: there is no such adapter; one trains tensors of the base (``modules_to_save``, ``bias``) or
            adapts a bare parameter, which cannot be by row; a layer's first dimension cannot be told to be
            the batch; or an adapter is merged in place, which rows without one would go through. Nothing is changed.
    """
    _refuse_disabled(gm)
    if merged := gm.meta.get("merged"):
        raise AdapterError(f"{', '.join(merged)} is merged in place, for all rows: call unmerge(gm) first")
    rows = [None if name == BASE else name for name in _list(adapter_names)]
    if not rows:
        raise AdapterError("adapter_names is empty: give one name (or None) for each row of the batch")
    found = {name: find_adapter(gm, name) for name in rows if name is not None}
    chosen = tuple(name for name in adapters(gm) if name in found)
    running = gm.meta.get("active", ())
    same = gm.meta.get("by_row", False) and set(chosen) <= set(running)
    if not same:
        check_rows(gm, [found[name] for name in chosen])
        refuse_wrapped(gm, chosen)
        running = chosen
    index = torch.tensor([-1 if name is None else running.index(name) for name in rows])
    index = index.to(next(iter(gm.parameters())).device)
    if same:
        _set_rows(gm, index)
    else:
        switch(gm, running, index)
        train_only(gm, running)


@contextmanager
def disable_adapters(gm: CapturedModule) -> Iterator[CapturedModule]:
    """The model without any adapter inside the ``with``, also without those merged in place; then all is as before.

    Raises:
        AdapterError: inside it, from the functions here that change adapters.
    """
    _refuse_disabled(gm)
    running, rows = gm.meta.get("active", ()), gm._buffers.get(ROWS)
    before = {key: gm.meta.get(key, ()) for key in ("merged", "folded")}
    gm.meta |= dict.fromkeys(before, ())
    switch(gm, ())
    gm.meta["disabled"] = True
    try:
        yield gm
    finally:
        gm.meta |= {**before, "disabled": False}
        switch(gm, running, rows)


def delete_adapter(gm: CapturedModule, name: str) -> None:
    """Remove an adapter and its tensors, in place. If it was active, the others that are stay active.

    Raises:
        AdapterError: there is no such adapter, or it is merged in place.
    """
    _refuse_disabled(gm)
    adapter = find_adapter(gm, name)
    _refuse_merged(gm, name)
    running, rows = gm.meta.get("active", ()), gm._buffers.get(ROWS)
    if rows is not None and name in running:
        raise AdapterError(f"rows go through adapter '{name}' (set_adapter_names): set others first, or set_adapter")
    running = tuple(n for n in running if n != name)
    deactivate(gm)
    remove_adapter(gm, adapter)
    if not adapters(gm):
        gm.meta["stage"] = Stage.CAPTURED
    switch(gm, running, rows)


def rename_adapter(gm: CapturedModule, name: str, new: str) -> None:
    """Give an adapter another name, in place; its parameters stay the same objects, for optimizers that hold them.

    Raises:
        AdapterError: there is no such adapter, it is merged in place, or the new name is taken.
    """
    _refuse_disabled(gm)
    old = find_adapter(gm, name)
    _refuse_merged(gm, name)
    check_new_name(gm, new)
    running, rows = gm.meta.get("active", ()), gm._buffers.get(ROWS)
    deactivate(gm)
    renamed = replace(old, name=new, sites=tuple(replace(s, adapter=new) for s in old.sites))
    for before, after in zip(old.sites, renamed.sites, strict=True):
        for parameter, path in before.parameter_names.items():
            set_tensor(gm, after.parameter_name(parameter), get_path(gm, path))
            delete_path(gm, path)
    held = gm._modules.get(ADAPTERS)
    if held is not None and name in held._modules:
        held.add_module(new, held._modules.pop(name))
    gm.meta["adapters"] = {(new if n == name else n): (renamed if n == name else a) for n, a in adapters(gm).items()}
    switch(gm, tuple(new if n == name else n for n in running), rows)


def merge(
    gm: CapturedModule,
    adapters: str | Sequence[str] | None = None,
    *,
    inplace: bool = False,
    base: str = "dequantized",
    original: Original | None = None,
    requantize: bool = False,
) -> CapturedModule:
    """Fold adapters (None: the active ones) into the weights.

    Each weight is computed in float32 or better (float64 over a float32 base) and rounded once to its dtype.

    Args:
        gm: the graph.
        adapters: which ones; None: those that are active, and what is merged in place already.
        inplace: False makes a base-shaped graph without any adapters, which prints as the captured one, and leaves
            ``gm`` as it is. True lets ``gm`` itself compute with the merged weights. The base's own weights, which
            the user's model shares, are kept: :func:`unmerge` goes back to them, bit for bit. Active adapters
            that are not merged stay active on top.
        base: of a quantized base, ``"dequantized"``: fold into the values that it reads as, on which the adapters were
            trained; the result is dense. ``"original"``: fold into the weights that it was quantized from, in the
            dtype that the graph has. The adapters never saw these, which may be better or worse for them. What the
            graph has dense stays the graph's; weights without adapters become the original's too, in its memory.
            DoRA's gain stays the trained one, ``m / ||W_quantized + s B A||``, so that an adapter that has learned
            nothing gives the original back; what a start took from the quantized weight (PiSSA) is not taken from it.
            What makes up for the quantization itself (LoftQ, and what was combined or converted of it) is refused.
        original: those weights, by the graph's names: the folder of a checkpoint in safetensors, which is mapped into
            memory; tensors by name; or the module that ``gm`` was made from. Other tensors in it are ignored. They are
            read once more to see that the base may come from them.
        requantize: store what was folded into quantized weights in their format again, with its settings: the merged
            graph is as small as the base. The weight is rounded to the graph's dtype first, and one is dense at a time.

        :func:`lorafx.merge_deviation` tells for each choice how far the merged graph is from the unmerged one.

    Returns:
        The merged graph; with ``inplace``, ``gm``.

    Raises:
        MergeError: an adapter is merged in place already, holds NaN or Inf (the site is named), or with ``inplace``
            has a weight to be kept apart from another use; a result overflows its dtype; ``original`` is missing,
            given without ``base="original"``, does not fit (what does not is listed), holds NaN or Inf or is another
            model's; nothing is quantized where ``base`` or ``requantize`` say what to do with it; or they are given
            with ``inplace``.
        CheckpointError: the original's files are missing or damaged.
        AdapterError: there is no such adapter, or they cannot be active together.
        PassError: the graph has no adapters (any more). Nothing is changed.
    """
    if not inplace:
        names = None if adapters is None else _names(adapters)
        return merged(gm, names, choose_base(gm, base, original, requantize))
    if (base, original, requantize) != ("dequantized", None, False):
        raise MergeError(
            "inplace=True keeps the base, which unmerge(gm) goes back to and other adapters build on: base, original "
            "and requantize are for merge(gm), which makes a graph of its own"
        )
    _refuse_disabled(gm)
    chosen = tuple(gm.meta.get("active", ())) if adapters is None else _names(adapters)
    if not chosen:
        raise MergeError("no adapter is active, so there is nothing to merge: name one, or call set_adapter first")
    there = gm.meta.get("merged", ())
    if twice := [name for name in chosen if name in there]:
        raise MergeError(f"adapter '{twice[0]}' is merged in place already; unmerge(gm) takes it out again")
    if ROWS in gm._buffers:
        raise MergeError(
            "each row of a batch goes through an adapter of its own (set_adapter_names), and weights hold the same for "
            "all rows: call set_adapter first"
        )
    running = tuple(gm.meta.get("active", ()))
    were = (*gm.meta.get("were_active", ()), *(n for n in chosen if n in running))
    _fold(gm, (*there, *chosen), tuple(n for n in running if n not in chosen))
    gm.meta["were_active"] = were
    return gm


def unmerge(gm: CapturedModule, names: str | Sequence[str] | None = None) -> None:
    """Take adapters (None: all) out of the weights again. Those that were active when they were merged are so again.

    Raises:
        MergeError: one is not merged.
    """
    _refuse_disabled(gm)
    merged = tuple(gm.meta.get("merged", ()))
    chosen = merged if names is None else _names(names)
    if not merged or not set(chosen) <= set(merged):
        which = next((n for n in chosen if n not in merged), "none")
        raise MergeError(f"adapter '{which}' is not merged in place; merged are: {', '.join(merged) or 'none'}")
    were = tuple(gm.meta.get("were_active", ()))
    again = tuple(n for n in chosen if n in were)
    _fold(gm, tuple(n for n in merged if n not in chosen), (*again, *gm.meta.get("active", ())))
    gm.meta["were_active"] = tuple(n for n in were if n not in chosen)


def _fold(gm: CapturedModule, merged: tuple[str, ...], running: tuple[str, ...]) -> None:
    """Make these the adapters that are merged in place and these the active ones; or raise and change nothing."""
    work = share(gm)
    forget_folded(work)
    activate(work, merged)
    apart = [found[0].name for found in active_layers(work).values() if found[0].apart]
    if apart:
        raise MergeError(
            f"site '{apart[0]}': its weight has another use and is kept apart (tied=\"untie\"), so it cannot be merged "
            "in place; merge(gm) makes a graph with a weight of its own for it"
        )
    with torch.inference_mode(False):
        values = folded_tensors(work)
    own_tensors(gm, [find_adapter(gm, name) for name in running], merged, values)  # raises before anything is changed
    deactivate(gm)
    forget_folded(gm)
    copy_called_modules(gm, f"{FOLDED}.", tuple(values))
    for name, value in values.items():
        tensor = nn.Parameter(value, requires_grad=False) if isinstance(get_path(gm, name), nn.Parameter) else value
        mark_own(tensor)
        set_tensor(gm, f"{FOLDED}.{name}", tensor)
    gm.meta["merged"], gm.meta["folded"] = merged, tuple(values)
    switch(gm, running)


def switch(gm: CapturedModule, names: Sequence[str], rows: Tensor | None = None) -> None:
    """Rewrite the graph for these active adapters, compile and verify it; what requires gradients stays.

    ``rows [batch]`` are the indices among ``names`` of each row's adapter, or None to sum them.
    """
    chosen = [find_adapter(gm, name) for name in names]
    own_tensors(gm, chosen, gm.meta.get("merged", ()), gm.meta.get("folded", ()))  # raises before anything is changed
    _set_rows(gm, rows)
    activate(gm, names, rows is not None)
    gm.recompile()
    verify(gm, Stage.INSERTED if adapters(gm) else Stage.CAPTURED)


def _set_rows(gm: CapturedModule, rows: Tensor | None) -> None:
    if rows is not None:
        mark_own(rows)
        gm.register_buffer(ROWS, rows, persistent=False)
    elif ROWS in gm._buffers:
        delattr(gm, ROWS)


def refuse_wrapped(gm: CapturedModule, names: Sequence[str]) -> None:
    """Refuse to let other parameters train where DistributedDataParallel averages the gradients of those it found.

    It looks once, when it is made: what trains only later would get different gradients in each process.

    Raises:
        AdapterError: the graph is wrapped and other adapters are to train.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() == 1 or set(names) == set(gm.meta.get("active", ())):
        return
    gc.collect()  # a wrapper that was deleted may be part of a cycle
    for held in gc.get_objects():
        if issubclass(type(held), DistributedDataParallel) and any(m is gm for m in held.module.modules()):
            raise AdapterError(
                "the graph is wrapped in DistributedDataParallel, which averages the gradients of the parameters that "
                "it found when it was made: it would leave out those of other adapters, and each process would train "
                "its own. Delete the wrapper, switch, and wrap the graph again"
            )


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    chosen = (names,) if isinstance(names, str) else _list(names)
    if twice := [name for i, name in enumerate(chosen) if name in chosen[:i]]:
        raise AdapterError(f"adapter '{twice[0]}' is named twice; each counts once")
    return chosen


def _list(names: Iterable[T]) -> tuple[T, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise AdapterError(f"expected a list of adapters' names, got {names!r}")
    return tuple(names)


def check_new_name(gm: CapturedModule, name: str) -> None:
    """Raise :class:`AdapterError` where a new adapter cannot be called this."""
    if not isinstance(name, str) or re.fullmatch(r"[\w-]+", name) is None or name == BASE:
        raise AdapterError(f"{name!r} cannot be an adapter's name: use letters, digits, '_' and '-'")
    if keyword.iskeyword(name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: it is a keyword of Python, as which graphs are run; take another"
        )
    if hasattr(Scope(), name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: modules have an attribute of that name; take another"
        )
    if name in adapters(gm):
        raise AdapterError(
            f"there is an adapter '{name}' already; delete_adapter(gm, '{name}') removes it, or take another name"
        )


def _refuse_merged(gm: CapturedModule, name: str) -> None:
    if name in gm.meta.get("merged", ()):
        raise AdapterError(f"adapter '{name}' is merged into the weights; call unmerge(gm, '{name}') first")


def _refuse_disabled(gm: CapturedModule) -> None:
    stage(gm)  # refuses what is no graph of lorafx's
    if gm.meta.get("disabled"):
        raise AdapterError("adapters are disabled (disable_adapters): leave the with block first")
