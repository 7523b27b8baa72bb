"""The model of a checkpoint's folder, with its weights where they are: in the files."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from lorafx.checkpoint_names import named_as_in
from lorafx.errors import CheckpointError, LorafxError
from lorafx.packed_files import as_held, with_packed_weights
from lorafx.shards import main_dtype, read_shards

#: How many bytes of tensors whose dtype in the files is not the module's are converted, which takes memory.
_CONVERTED_LIMIT = 2**26


class SourceError(LorafxError):
    """What is given for a model does not lead to one."""


def load_pretrained(
    weights_dir: str | os.PathLike[str], model: nn.Module | str | os.PathLike[str] | Any = None
) -> nn.Module:
    """A model for :func:`lorafx.apply` from what ``save_pretrained`` wrote, whether its weights are quantized or not.

    Weights are mapped into memory and read when they are used. Those that bitsandbytes quantized (nf4 with or without
    double quantization, int8) stay so, and bitsandbytes is not needed: each is a frozen parameter that reads as the
    dense weight (:class:`lorafx.bases.tensor.QuantizedTensor`), and layers compute in the dtype of the model. The model
    itself is to be adapted, run and exported; it cannot be saved again.

    Args:
        weights_dir: a folder with ``model.safetensors`` or ``model.safetensors.index.json``.
        model: a transformers config, the folder of one, or a module whose parameters are on the meta device (made
            inside ``lorafx.pretrained.parameters_on_meta()``) in the dtype in which to compute. None: ``weights_dir``'s
            own ``config.json``, in the dtype of the files.

    Returns:
        The module in eval mode, its parameters frozen.

    Raises:
        CheckpointError: files are missing or damaged (a quantized weight's state included), are of fp4, or do not fit
            the model: missing, extra and wrongly shaped tensors are listed.
        SourceError: there is no config, or none of a model that transformers has.
    """
    folder = Path(weights_dir)
    return model_over(read_weights(folder), folder, folder if model is None else model).eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder, mapped; quantized ones as they are.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    return with_packed_weights(read_shards(folder), folder)


def model_over(tensors: Mapping[str, Tensor], folder: Path, model: nn.Module | Any) -> nn.Module:
    """A module, or that of a config in the dtype of the files, over these tensors; errors as :func:`load_pretrained`.

    ``folder`` is where they are from.
    """
    found = model if isinstance(model, nn.Module) else model_on_meta(model, main_dtype(tensors))
    return put_tensors(found, tensors, folder)


def model_on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a config, or of the folder of one, in eval mode and without values but for its buffers."""
    with parameters_on_meta():
        return model_of_config(config, dtype).eval()


def model_of_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model that a transformers config, or the ``config.json`` in a folder, describes, with random weights.

    Raises:
        SourceError: there is no such config, or it names no architecture of transformers.
    """
    import transformers

    if isinstance(config, str | os.PathLike):
        folder = Path(config)
        if not (folder / "config.json").is_file():
            raise SourceError(f"'{folder}' has no config.json; give the folder of a Hugging Face checkpoint")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    builder: Any = getattr(transformers, names[0], None) if names else None
    if builder is None:
        what = f"the architecture {names[0]}, which transformers does not have" if names else "no architecture"
        raise SourceError(
            f"the config names {what}: set config.architectures, or give the model itself, made on the meta device"
        )
    model = builder._from_config(copy.deepcopy(config), dtype=dtype)
    assert isinstance(model, nn.Module)
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without values, on the meta device, and buffers with them.

    ``torch.device("meta")`` would leave computed buffers without values too, which nothing can compute again.
    """
    known = WeakIdKeyDictionary()  # a parameter registered twice stays one

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta:
            return parameter
        if parameter not in known:
            made = type(parameter)(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(made).update(vars(parameter))
            known[parameter] = made
        return known[parameter]

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        hook.remove()


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """A copy of a module that has these tensors for its parameters and saved buffers; ties stay tied.

    Raises:
        CheckpointError: they do not fit, with a list of what is missing, extra, of another shape or untied; or
            something is on the meta device that no file has.
    """
    tensors = named_as_in(model, tensors, folder)
    whole = copy.deepcopy(model)
    problems: list[str] = []
    converted = 0
    names: dict[int, list[str]] = {}
    places = Places(whole)
    wanted = dict(whole.state_dict(keep_vars=True))
    for name, old in wanted.items():
        names.setdefault(id(old), []).append(name)
    for aliases in names.values():
        old = wanted[aliases[0]]
        given = [name for name in aliases if name in tensors]
        if not given:
            problems.append(f"missing: {aliases[0]} {list(old.shape)}")
            continue
        new = as_held(tensors[given[0]], old, whole.get_submodule(given[0].rpartition(".")[0]))
        if new.shape != old.shape:
            problems.append(f"{given[0]}: shape {list(new.shape)}, expected {list(old.shape)}")
            continue
        if differing := [n for n in given[1:] if not torch.equal(tensors[n], tensors[given[0]])]:
            problems.append(f"'{given[0]}' and '{differing[0]}' are one tensor in the model and differ in the files")
        if new.dtype is not old.dtype:
            converted += new.nbytes
            if new.is_floating_point() != old.is_floating_point() or converted > _CONVERTED_LIMIT:
                problems.append(f"{given[0]}: {new.dtype}, and {old.dtype} in the model; make the model in {new.dtype}")
                continue
            new = new.to(old.dtype)
        places.put(old, new)
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = [n for n in tensors if n not in wanted and not any(re.search(pattern, n) for pattern in known)]
    problems += [f"not of this model: {name}" for name in sorted(extra)]
    if not problems:
        left = [n for n, t in (*whole.named_parameters(), *whole.named_buffers()) if t.is_meta]
        problems = [
            f"'{name}' is on the meta device and in no file: it is computed, so make the model with its buffers (give "
            "its config, or make it inside lorafx.pretrained.parameters_on_meta())"
            for name in left
        ]
    if problems:
        shown = [*problems[:12], *([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])]
        raise CheckpointError("\n  - ".join((f"{folder}: the checkpoint does not fit the model:", *shown)))
    return whole


class Places:
    """Where a module's tensors are, to replace each under all its names."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, held in store.items():
                    self._of.setdefault(id(held), []).append((store, name))

    def put(self, old: Tensor, new: Tensor) -> None:
        value = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for store, name in self._of[id(old)]:
            store[name] = value
