"""The model of a checkpoint's folder, with its weights where they are: in the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lorafx.deploy import parameters_on_meta, put_tensors
from lorafx.packed_files import with_packed_weights
from lorafx.shards import main_dtype, read_shards
from lorafx.sources import model_of_config


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
            inside ``lorafx.deploy.parameters_on_meta()``) in the dtype in which to compute. None: ``weights_dir``'s
            own ``config.json``, in the dtype of the files.

    Returns:
        The module in eval mode, its parameters frozen.

    Raises:
        CheckpointError: files are missing or damaged (a quantized weight's state included), are of fp4, or do not fit
            the model: missing, extra and wrongly shaped tensors are listed.
        SourceError: there is no config, or none of a model that transformers has.
    """
    folder = Path(weights_dir)
    tensors = with_packed_weights(read_shards(folder), folder)
    if not isinstance(model, nn.Module):
        with parameters_on_meta():
            model = model_of_config(folder if model is None else model, main_dtype(tensors))
    return put_tensors(model, tensors, folder).eval()
