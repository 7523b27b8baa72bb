"""Where the command line gets a model from: a checkpoint's folder, or a function that builds one."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafx.errors import LorafxError
from lorafx.passes.example import ExampleInputs


class SourceError(LorafxError):
    """The command line's MODEL argument does not lead to a model."""


def find_model(source: str, *, weights: bool = False) -> tuple[nn.Module, ExampleInputs]:
    """A model and, if it brings some, its example inputs.

    ``source`` is a folder with a Hugging Face ``config.json``: the model it describes, on the meta
    device, so that no weights are read, unless ``weights`` asks for them; or ``package.module:function``: what the
    function returns, a module or a pair of a module and its example inputs.

    Raises:
        SourceError: says which of the two was tried, and what was missing.
    """
    if Path(source).is_dir():
        return _from_folder(Path(source), weights), None
    module, _, name = source.partition(":")
    if not name:
        raise SourceError(
            f"'{source}' is neither a folder nor package.module:function. Give a folder with a config.json, or a "
            "function that returns the model"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        made: Any = getattr(importlib.import_module(module), name)()
    except Exception as error:  # the user's own code
        raise SourceError(
            f"'{source}' raised {type(error).__name__}: {error}. Run from the folder in which `import {module}` works, "
            "or use --debug to see where"
        ) from error
    finally:
        sys.path.pop(0)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise SourceError(f"'{source}' returned a {type(model).__name__}, not a torch.nn.Module")
    return model, inputs


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


def _from_folder(folder: Path, weights: bool) -> nn.Module:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise SourceError(f"'{folder}' has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        import transformers
    except ImportError as error:
        raise SourceError("reading a checkpoint's folder needs transformers: pip install 'lorafx[hf]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = json.loads(config_file.read_text()).get("architectures") or []
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"'{config_file}' cannot be read: {error}") from error
    builder: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if builder is None:
        raise SourceError(f"'{config_file}' names the architecture {names[0]}, which transformers does not have")
    if weights:
        try:
            model = builder.from_pretrained(folder, local_files_only=True)
        except (ValueError, OSError) as error:
            raise SourceError(f"'{folder}': its weights cannot be read: {error}") from error
    else:
        with torch.device("meta"):
            model = builder._from_config(config) if names else builder.from_config(config)
    assert isinstance(model, nn.Module)
    return model
