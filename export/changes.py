"""All that an adapter changes in an ONNX file, one change for each initializer, checked before any is computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lorafx.adapter_files import IN, OUT, RANK, StoredAdapter, StoredSite, as_matrix, base_name
from lorafx.errors import AdapterError, MergeError
from lorafx.export.edits import Change, Replacement, Update
from lorafx.export.onnx_file import OnnxFile
from lorafx.export.onnx_parts import Absent, Unmatched, inside, listed, side_of
from lorafx.export.onnx_targets import RMS_NORMS, Target, Targets, Wanted
from lorafx.ir import Site
from lorafx.spec import LoraSpec, matches
from lorafx.variants import VARIANTS
from lorafx.variants.inits import find_init


@dataclass(frozen=True)
class Changes:
    """All that an adapter changes in a file, in the file's order, and what of it the file has no place for."""

    changes: tuple[Change, ...]
    absent: tuple[str, ...] = ()


def find_changes(base: OnnxFile, adapter: StoredAdapter, source: str, part: str | None = None) -> Changes:
    """All that an adapter changes in a file. No weight is computed.

    Args:
        base: the file.
        adapter: the adapter.
        source: what to call the adapter in errors.
        part: the module of the model that the file is the export of, where others are in other files.

    Raises:
        AdapterError: a tensor of the adapter has no place in the graph, or several, or does not fit it; or the adapter
            means something else than a change of these weights. All that is wrong in one list.
        MergeError: a tensor holds NaN or Inf.
    """
    _refuse_start(adapter.spec, source)
    paths = {site.path for site in adapter.sites} | {base_name(n).rpartition(".")[0] for n in adapter.whole}
    try:
        targets = Targets(base.model, paths, part)
    except Unmatched as why:
        raise AdapterError(f"{source}: {why}") from why
    search = _Search(base, adapter, targets, part)
    search.tensors()
    search.sites()
    return search.result(source)


@dataclass(frozen=True)
class _Search:
    """What was found so far: changes by initializer, the modules that they are of, what is absent, what is wrong."""

    base: OnnxFile
    adapter: StoredAdapter
    targets: Targets
    part: str | None
    found: dict[str, list[Change]] = field(default_factory=lambda: defaultdict(list))
    placed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tensors(self) -> None:
        """Find the places of all that was trained whole."""
        for key, tensor in self.adapter.whole.items():
            path = base_name(key).rpartition(".")[0]
            self._add(key, path, partial(_whole, self.base, self.targets, self.adapter, key, tensor))

    def sites(self) -> None:
        """Find the weights of all sites."""
        adapter, spec = self.adapter, self.adapter.spec
        self.problems.extend(
            f"not of this graph's adapter: site '{site.path}', which adapter_config.json does not name"
            for site in adapter.unnamed()
        )
        parts = [(site, _tensors(adapter, site, self.problems)) for site in adapter.sites]
        parts = [(site, tensors) for site, tensors in parts if tensors]
        wanted = [_wanted(spec, site, tensors) for site, tensors in parts]
        layers = self.targets.layers(wanted, _meant_everywhere(adapter))
        _share_vera(adapter, parts, layers, self.targets, self.problems)
        for site, tensors in parts:
            target = layers[site.path]
            find = partial(_site_changes, self.base, self.targets, spec, site, tensors, target)
            self._add(f"site '{site.path}'", site.path, find)

    def _add(self, what: str, path: str, find: Callable[[], list[Change]]) -> None:
        """Note the changes that something of the adapter makes to a module, or why it makes none."""
        try:
            for change in find():
                self.found[change.name].append(change)
                self.placed.append(path)
        except Unmatched as why:
            missing = isinstance(why, Absent)
            if missing:
                self.absent.append(what)
            if self.part is None or not missing:
                self.problems.append(f"{what}: {why}")

    def _of_another_part(self) -> list[str]:
        """What is wrong if the file has the modules of another part, under the names of the whole model."""
        if self.part is None or any(inside(path, self.part) for path in self.placed):
            return []
        others = dict.fromkeys(side for path in self.placed if (side := side_of(path)) is not None)
        return [f"the file is not of part '{self.part}', but of {listed(others)}"] if others else []

    def result(self, source: str) -> Changes:
        """All changes in the file's order. Raises :class:`AdapterError` with all that is wrong."""
        problems, absent = self.problems, self.absent
        changes = [_one(self.found[name], problems) for name in self.base.sources if name in self.found]
        if not changes and absent and not problems:
            problems.append(f"nothing of it is in the file: not {', '.join(absent[:4])}")
        problems += self._of_another_part()
        if problems:
            listing = "\n  - ".join((f"{source} does not fit {self.base.path}; nothing was written:", *problems))
            several = self.part is None and changes and len(absent) == len(problems)
            advice = (
                ". If it was exported as several files, say which part of it this is (part=, --part)" if several else ""
            )
            raise AdapterError(f"{listing}\nMerge into the export of the model that the adapter was trained on{advice}")
        return Changes(tuple(changes), tuple(absent))


def _refuse_start(spec: LoraSpec, source: str) -> None:
    init = find_init(spec.init)
    if init is not None and init.changes_base:
        raise AdapterError(
            f"{source}: it started by {spec.init}, and is relative to what that left of the weights, which is not "
            "in the file. Save it as a plain LoRA of the original weights (lorafx.save_adapter does; PEFT: "
            "path_initial_model_for_weight_conversion)"
        )


def _tensors(adapter: StoredAdapter, site: StoredSite, problems: list[str]) -> dict[str, Tensor]:
    """A site's tensors as a matrix's; nothing, and a problem, where it cannot be merged here."""
    spec, variant = adapter.spec, site.variant(adapter.spec)
    where = f"site '{site.path}'"
    try:
        site.refuse_absent(variant)
        if site.depth or site.factor != 1.0 or site.of_parameter(spec):
            raise AdapterError(
                f"{where}: it adapts parameters of a module (nn.MultiheadAttention or target_parameters), of which a "
                "file does not tell what becomes of them. Use lorafx.merge_and_export with the model"
            )
        tensors = {p: as_matrix(site.tensors[p]) for p in variant.parameters}
        if "lora_magnitude_vector" in tensors:
            tensors["lora_magnitude_vector"] = site.tensors["lora_magnitude_vector"].reshape(-1)
        sizes = site.sizes(variant, tensors)
        if odd := site.tensors.keys() - set(variant.parameters):
            raise AdapterError(f"{where}: the file has its {', '.join(sorted(odd))}, which {variant.name} has not")
    except AdapterError as why:
        problems.append(str(why))
        return {}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MergeError(f"{where}: {name} holds NaN or Inf, so it cannot be folded; go back to an earlier adapter")
    r = spec.rank_for(site.path)
    if variant.name != "tokens" and not variant.shrinks and sizes.get(RANK, r) != r:
        problems.append(f"{where}: its tensors have rank {sizes[RANK]}, and adapter_config.json says {r}")
        return {}
    return tensors


def _wanted(spec: LoraSpec, site: StoredSite, tensors: Mapping[str, Tensor]) -> Wanted:
    variant = site.variant(spec)
    if variant.name == "tokens":
        return Wanted(site.path, tensors["trainable_tokens_delta"].shape[1], None)
    sizes = site.sizes(variant, tensors)
    return Wanted(site.path, sizes.get(OUT), sizes.get(IN))


def _meant_everywhere(adapter: StoredAdapter) -> set[str]:
    """The sites whose change PEFT makes wherever the weight is used: rows of tokens, and layers tied on purpose."""
    tokens = {s.path for s in adapter.sites if "trainable_tokens_delta" in s.tensors}
    return tokens | ({s.path for s in adapter.sites} if adapter.spec.tied == "tie" else set())


def _share_vera(
    adapter: StoredAdapter,
    parts: Sequence[tuple[StoredSite, dict[str, Tensor]]],
    layers: Mapping[str, Target | Unmatched],
    targets: Targets,
    problems: list[str],
) -> None:
    """Add what the sites have in common to the tensors of each; drawn again, if the file leaves it out."""
    variant, spec = VARIANTS[adapter.spec.variant], adapter.spec
    if not variant.shared:
        return
    found = [t for t in layers.values() if isinstance(t, Target)]
    sizes = [targets.size(t.initializer, t.kind) for t in found]
    shared = dict(adapter.shared)
    if not shared and sizes:
        shared = variant.share(sizes, spec.r, spec.options, torch.float32)
    largest = [max((s[i] for s in sizes), default=0) for i in (0, 1)]
    if sizes and (shared["vera_A"].shape[-1] < largest[1] or shared["vera_B"].shape[0] < largest[0]):
        problems.append(f"its vera_A and vera_B are too small for matrices [out, in] of up to {largest}")
    for _, tensors in parts:
        tensors |= shared


def _site_changes(
    base: OnnxFile,
    targets: Targets,
    spec: LoraSpec,
    site: StoredSite,
    tensors: dict[str, Tensor],
    target: Target | Unmatched,
) -> list[Change]:
    """What a site makes of its weight, and of its bias. Raises :class:`Unmatched`."""
    if isinstance(target, Unmatched):
        raise target
    variant = site.variant(spec)
    tokens = variant.name == "tokens"
    scaling = 1.0 if tokens else spec.scaling_for(site.path)
    _refuse_dtype(base, target)
    rows = _token_rows(spec, site, targets, target, tensors) if tokens else None
    if tokens:
        _refuse_copies(base, target)
    turned = target.kind == "addmm" and not target.as_named
    kind = "parameter" if tokens else "linear" if turned else target.kind
    shape = targets.size(target.initializer, target.kind)
    r = site.sizes(variant, tensors).get(RANK, 0)
    settings = Site(
        site.path, site.path, "", variant.name, kind, target.initializer, None, shape, r, 0.0, scaling, 0.0, rows=rows
    )
    given = tuple(tensors[n] for n in (*variant.parameters, *variant.shared))
    changes = [Change(target, Update(settings, given, turned))]
    if variant.shifts_bias:
        bias = targets.bias(site.path, target)
        _refuse_dtype(base, bias)
        changes.append(Change(bias, Replacement(shift=tensors["lora_B_bias"], scaling=scaling)))
    return changes


def _token_rows(
    spec: LoraSpec, site: StoredSite, targets: Targets, target: Target, tensors: Mapping[str, Tensor]
) -> tuple[int, ...]:
    given = spec.trainable_token_indices
    by_name = given if isinstance(given, Mapping) else {site.path: given}
    rows = next((r for name, r in by_name.items() if matches(site.path, (name,))), ())
    if target.kind not in ("embedding", "linear") or len(rows) != len(tensors["trainable_tokens_delta"]):
        raise Unmatched(
            f"it trains {len(tensors['trainable_tokens_delta'])} rows of an embedding, adapter_config.json names "
            f"{len(rows)}, and '{target.initializer}' is stored as that of a {target.kind or 'unknown layer'}"
        )
    size = targets.size(target.initializer, "linear")[0]
    if max(rows) >= size:
        raise Unmatched(f"it trains row {max(rows)}, and '{target.initializer}' has {size}")
    return tuple(rows)


def _refuse_copies(base: OnnxFile, target: Target) -> None:
    """PEFT changes rows of an embedding for the layers that are tied to it too, which an exporter may have copied."""
    source = base.sources[target.initializer]
    stored, dims = source.tensor(), list(source.proto.dims)
    for name, other in base.sources.items():
        same, turned = list(other.proto.dims) == dims, list(other.proto.dims) == dims[::-1]
        if name == target.initializer or other.proto.data_type != source.proto.data_type or not (same or turned):
            continue
        copy = other.tensor()
        if (same and torch.equal(copy, stored)) or (turned and torch.equal(copy.mT, stored)):
            raise Unmatched(
                f"'{name}' holds the same values as '{target.initializer}': a tied layer, which the rows are for as "
                "well. Export the base so that both share one initializer"
            )


def _whole(base: OnnxFile, targets: Targets, adapter: StoredAdapter, key: str, tensor: Tensor) -> list[Change]:
    """What is trained whole, at its place. Raises :class:`Unmatched`."""
    atoms = key.split(".")
    if {"original_module", "modules_to_save"} & set(atoms) and atoms[-1] == "bias" and adapter.spec.bias == "all":
        return []  # PEFT repeats the biases of modules_to_save
    if atoms[-1] == "num_batches_tracked":
        return []  # counts batches while training
    name = base_name(key)
    target = targets.tensor(name)
    source = base.sources[target.initializer]
    _refuse_dtype(base, target)
    swapped = not target.as_named and tensor.dim() == 2
    value = tensor.mT.contiguous() if swapped else tensor
    if tuple(value.shape) != tuple(source.proto.dims):
        raise Unmatched(
            f"it is {list(tensor.shape)}, and '{target.initializer}' {list(source.proto.dims)}"
            + (" (transposed)" if swapped else "")
        )
    if not bool(torch.isfinite(value).all()):
        raise MergeError(f"{key} holds NaN or Inf, so it cannot be merged; go back to an earlier adapter")
    if not adapter.trains(key):
        # PEFT repeats the embeddings it has adapted, which are the base's unless tokens were added. One of the two may
        # be the other in fewer bits.
        stored = source.tensor()
        narrow = min(stored.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(value.to(narrow), stored.to(narrow)):
            raise Unmatched(
                f"the file repeats this weight of the base, and it differs from '{target.initializer}': the adapter "
                "is of another base, or tokens were added to it (export the base with them), or adapter_config.json "
                "does not name what it trains"
            )
        return []
    if any(use.node.op_type in RMS_NORMS for use in targets.uses(target.initializer)):
        _refuse_offset(source.tensor().double(), value.double(), target)
    return [Change(target, Replacement(value))]


def _refuse_offset(stored: Tensor, value: Tensor, target: Target) -> None:
    """Refuse a norm of which the file holds 1 + weight, as onnxruntime-genai's model builder writes Gemma's.

    Nothing in the graph tells, but a trained norm is near the one it started from.
    """
    if (value + 1 - stored).norm() < (value - stored).norm():
        raise Unmatched(
            f"'{target.initializer}' is nearer to 1 + this tensor than to it: the exporter has added 1 to the model's "
            "norms (Gemma's). Merge into the model's checkpoint and export that"
        )


def _refuse_dtype(base: OnnxFile, target: Target) -> None:
    dtype = base.sources[target.initializer].value().dtype
    if dtype.name not in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"):
        raise Unmatched(
            f"initializer '{target.initializer}' holds {dtype.name}, which takes no update without being rounded "
            "again. Merge into the floating-point file and quantize the result"
        )


def _one(changes: Sequence[Change], problems: list[str]) -> Change:
    """The one change of an initializer that several parts of an adapter name: a bias trained whole and shifted, or a
    tied weight of which all sites make the same."""
    first, *others = changes
    for other in others:
        a, b = first.edit, other.edit
        if isinstance(a, Replacement) and isinstance(b, Replacement) and (a.shift is None) != (b.shift is None):
            whole, shifted = (a, b) if b.whole is None else (b, a)
            first = Change(first.target, Replacement(whole.whole, shifted.shift, shifted.scaling))
        elif not (isinstance(a, Update) and isinstance(b, Update) and _alike(a, b)):
            problems.append(
                f"initializer '{first.name}' is changed more than once, and differently ({a}; {b}): export the base so "
                "that each layer has its own weight"
            )
    return first


def _alike(left: Update, right: Update) -> bool:
    """Whether two sites make the same of a weight, which one of them may have transposed (PEFT's tied layers)."""
    if left.site.scaling != right.site.scaling or {left.site.variant, right.site.variant} != {"lora"}:
        return False
    turned = reversed([t.mT for t in right.tensors])
    return any(all(map(_equal, left.tensors, tensors)) for tensors in (right.tensors, turned))


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)
