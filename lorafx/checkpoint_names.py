"""Names of tensors in a checkpoint's files, where transformers writes others than its modules have.

Some are several tensors' in the files, or parts of one: those of each expert, which the module has as a stack. Where
that only puts memory side by side it is done without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lorafx.errors import CheckpointError
from lorafx.joined import JoinedTensor


def named_as_in(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The same tensors under the names that they have in the model.

    Since its version 5, transformers keeps the names of older releases in files and renames as it loads: by the
    model's own table, applied here as it applies it. What the table computes is computed when it is read
    (:data:`_LAZY`), or refused.

    Raises:
        CheckpointError: what becomes of tensors of the files would need copies of them, or they do not go together.
    """
    wanted = model.state_dict()
    if find_spec("transformers") is None or tensors.keys() <= wanted.keys():
        return dict(tensors)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or find_spec("transformers.conversion_mapping") is None:
        return dict(tensors)
    from transformers import conversion_mapping, core_model_loading

    table: list[Any] = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, core_model_loading.WeightConverter)]
    maker = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, list[str]]] = {}  # of a tensor of the model, by the pattern that they match
    for name in sorted(tensors, key=core_model_loading.dot_natural_key):
        renamed, made_by = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if renamed not in wanted:
            found[name] = tensors[name]
        elif made_by is None:
            found[renamed] = tensors[name]
        else:
            parts.setdefault(renamed, {}).setdefault(made_by, []).append(name)
    for renamed, by_pattern in parts.items():
        found |= _made(renamed, maker[next(iter(by_pattern))], by_pattern, tensors, where)
    return found


def _made(
    target: str,
    converter: Any,
    by_pattern: Mapping[str, Sequence[str]],
    tensors: Mapping[str, Tensor],
    where: object,
) -> dict[str, Tensor]:
    """What one conversion of transformers' table makes of tensors, by names of the model."""
    names = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
    steps = ", ".join(map(repr, converter.operations))
    first = names[0][0]
    lazily = _LAZY.get(steps)
    if lazily is None or any(type(tensors[name]) is not Tensor for group in names for name in group):
        raise CheckpointError(
            f"{where}: '{first}' is a part of the model's '{target}', which transformers makes by {steps} as it loads, "
            "and that needs a copy: load the model with its from_pretrained and write it by "
            "save_pretrained(folder, save_original_format=False), or give it to lorafx.apply"
        )
    for group in names:
        if len(group) != len(names[0]):
            raise CheckpointError(
                f"{where}: of the parts of the model's '{target}' there are {len(names[0])} like '{first}' and "
                f"{len(group)} like '{group[0]}'. The checkpoint is incomplete; copy it again"
            )
        for name in group:
            one, other = tensors[group[0]], tensors[name]
            if (other.shape, other.dtype) != (one.shape, tensors[first].dtype):
                raise CheckpointError(
                    f"{where}: '{name}' is {other.dtype} {list(other.shape)}, not {tensors[first].dtype} "
                    f"{list(one.shape)} as '{group[0]}', and both are parts of the model's '{target}'. Copy the "
                    "checkpoint again"
                )
    made = lazily([[tensors[name] for name in group] for group in names], len(converter.target_patterns))
    pattern = converter.target_patterns[0]
    return {target.replace(pattern, p): t for p, t in zip(converter.target_patterns, made, strict=True)}


def _stack(groups: Sequence[Sequence[Tensor]], count: int) -> Sequence[Tensor]:
    """The n-th of each group below each other, and these stacked."""
    rows = list(zip(*groups, strict=True))
    height = sum(tensor.shape[0] for tensor in rows[0])
    return [JoinedTensor([t for row in rows for t in row], (len(rows), height, *rows[0][0].shape[1:]))]


def _below(groups: Sequence[Sequence[Tensor]], count: int) -> Sequence[Tensor]:
    """All of them below each other."""
    tensors = [tensor for group in groups for tensor in group]
    return [JoinedTensor(tensors, (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]))]


def _split(groups: Sequence[Sequence[Tensor]], count: int) -> Sequence[Tensor]:
    """The one tensor in so many pieces."""
    return groups[0][0].chunk(count)


#: What transformers does to tensors as it loads them, where the result has their memory.
_LAZY: Mapping[str, Callable[[Sequence[Sequence[Tensor]], int], Sequence[Tensor]]] = {
    "MergeModulelist(dim=0)": _stack,
    "MergeModulelist(dim=0), Concatenate(dim=1)": _stack,
    "Concatenate(dim=0)": _below,
    "Chunk(dim=0)": _split,
}


def without_expected(
    model: nn.Module, missing: Iterable[str], unread: Iterable[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the model that no file has, and of the files that the model has not, as far as something is amiss.

    What transformers knows of, it drops in silence: buffers that older releases saved, weights that a model computes.
    Which these are is the model's own knowledge (and, for names that are the same everywhere, transformers').
    """
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unread))
    adjust: Any = getattr(model, "_adjust_missing_and_unexpected_keys", None)
    if adjust is not None:
        adjust(info)
    return frozenset(info.missing_keys), frozenset(info.unexpected_keys)
