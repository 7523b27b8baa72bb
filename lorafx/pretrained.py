"""The model of a checkpoint's folder, with its weights where they are: in the files."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from lorafx.errors import CheckpointError, CheckpointWarning, LorafxError
from lorafx.fitting import Fitted, put_tensors
from lorafx.packed_files import with_packed_weights
from lorafx.shards import file_of, main_dtype, read_shards


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

    Warns:
        CheckpointWarning: the files hold tensors that the model has no place for (another head), which are not read.

    Raises:
        CheckpointError: files are missing or damaged (a quantized weight's state included), are of fp4, or do not fit
            the model: missing and wrongly shaped tensors are listed, and those that it has no place for.
        SourceError: there is no config, or none of a model that transformers has.
    """
    folder = Path(weights_dir)
    fitted = model_over(read_weights(folder), folder, folder if model is None else model)
    for note in fitted.notes:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return fitted.model.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder, mapped; quantized ones as they are.

    Raises:
        CheckpointError: files are missing or damaged, or quantized in a way that lorafx does not read.
    """
    tensors = with_packed_weights(read_shards(folder), folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            raise CheckpointError(
                f"{file_of(folder, name)}: '{name}' is stored as {tensor.dtype}, which is a weight together with its "
                "scales only, and lorafx does not read these: save the model in bfloat16 (in transformers: "
                "from_pretrained with a quantization_config that has dequantize=True, then save_pretrained)"
            )
    return tensors


def model_over(
    tensors: Mapping[str, Tensor], folder: Path, model: nn.Module | Any, brought: Collection[str] = ()
) -> Fitted:
    """A module, or that of a config in the dtype of the files, over these tensors; errors as :func:`load_pretrained`.

    ``folder`` is where they are from; ``brought`` may be absent, as :func:`lorafx.fitting.put_tensors` says.
    """
    found = model if isinstance(model, nn.Module) else model_on_meta(model, main_dtype(tensors))
    return put_tensors(found, tensors, folder, brought)


def model_on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a config, or of the folder of one, in eval mode and without values but for its buffers."""
    with parameters_on_meta():
        return model_of_config(config, dtype).eval()


def model_of_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model that a transformers config, or the ``config.json`` in a folder, describes, with random weights.

    Raises:
        SourceError: there is no such config, it is none, or it names no architecture of transformers.
    """
    import transformers

    if isinstance(config, str | os.PathLike):
        folder = Path(config)
        if not (folder / "config.json").is_file():
            raise SourceError(f"'{folder}' has no config.json; give the folder of a Hugging Face checkpoint")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, transformers.PretrainedConfig):
        given = config.__name__ if isinstance(config, type) else f"a {type(config).__name__}"
        raise SourceError(f"expected a transformers config, the folder of one, or a torch.nn.Module, not {given}")
    names = config.architectures or []
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
