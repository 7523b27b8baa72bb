"""Where the command line gets a model from: a checkpoint's folder, or a function that builds one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafx.passes.example import ExampleInputs
from lorafx.pretrained import SourceError, load_pretrained


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
        settings = json.loads(config_file.read_text())
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"'{config_file}' cannot be read: {error}") from error
    names = settings.get("architectures") or []
    builder: Any = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if builder is None:
        raise SourceError(f"'{config_file}' names the architecture {names[0]}, which transformers does not have")
    if weights and (settings.get("quantization_config") or {}).get("quant_method") == "bitsandbytes":
        return load_pretrained(folder)  # transformers would need bitsandbytes for it
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
