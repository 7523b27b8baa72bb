"""Names of tensors in a checkpoint's files, where transformers writes others than its modules have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lorafx.errors import CheckpointError


def named_as_in(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The same tensors under the names that they have in the model.

    Since its version 5, transformers keeps the names of older releases in files and renames as it loads: by the
    model's own table, applied here as it applies it. What its table makes of several tensors (the experts of a layer,
    stacked) would need a copy of them, and is refused.

    Raises:
        CheckpointError: tensors of the files are parts of one of the model's.
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
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed, made_by = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if renamed not in wanted:
            found[name] = tensor
        elif made_by is None:
            found[renamed] = tensor
        else:
            raise CheckpointError(
                f"{where}: '{name}' is a part of the model's '{renamed}', which transformers puts together as it "
                "loads: load the model with its from_pretrained, and give that to lorafx.apply"
            )
    return found


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
