"""Checkpoints on disk as tensors that are read when they are used: safetensors files, mapped into memory.

    model.safetensors                               one file, or
    model.safetensors.index.json                    {"weight_map": {<tensor>: <file beside>, ...}}

A mapped page belongs to the file: the system drops it when memory is short and reads it again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafx.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PIECE = 2**22


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in a folder, by its name, mapped into memory and not read yet.

    Headers are read, so that what a file says of itself is checked: that it is as long as its tensors need. A path in
    the index that is not the name of a file in the folder is refused. Pickles are never read.

    Raises:
        CheckpointError: files are missing, damaged or contradict the index.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory. Give a local one with {WEIGHTS_NAME} or {INDEX_NAME}")
    if not (folder / INDEX_NAME).exists():
        if not (folder / WEIGHTS_NAME).is_file():
            there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
            advice = "pickles are not read; " if any(not name.endswith(".safetensors") for name in there) else ""
            raise CheckpointError(
                f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME} (but {', '.join(there) or 'no weights'}); "
                f"{advice}save_pretrained writes them"
            )
        return _read_file(folder / WEIGHTS_NAME)
    places = _read_index(folder / INDEX_NAME)
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(places.values()):
        found = _read_file(folder / name)
        listed = {tensor for tensor, file in places.items() if file == name}
        if found.keys() != listed:
            absent, extra = sorted(listed - found.keys()), sorted(found.keys() - listed)
            what = f"lacks {absent[0]}" if absent else f"holds {extra[0]} besides"
            raise CheckpointError(f"{folder / name} {what}, other than {INDEX_NAME} says. Copy the checkpoint again")
        tensors |= found
    return tensors


def file_of(folder: Path, tensor: str) -> Path:
    """The file of a checkpoint that has a tensor of this name; the folder itself, if none is said to."""
    if not (folder / INDEX_NAME).exists():
        return folder / WEIGHTS_NAME
    return folder / _read_index(folder / INDEX_NAME).get(tensor, "")


@contextmanager
def reading_ahead(folder: Path, limit: int) -> Iterator[None]:
    """Meanwhile bring up to so many bytes of a checkpoint's files into the system's cache, in a thread.

    What is read then costs no wait; nothing is kept here, and the system may drop it again.
    """
    stop = threading.Event()

    def read() -> None:
        left, piece = limit, memoryview(bytearray(_PIECE))
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with path.open("rb", buffering=0) as file:
                    while left > 0 and not stop.is_set() and (count := file.readinto(piece)):
                        left -= count
            except OSError:  # for whoever needs the file to report
                continue

    thread = threading.Thread(target=read, name="lorafx-read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = dict(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files ({error!r}). Copy it again") from error
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(
                f"{path}: '{tensor}' is said to be in {name!r}, which is no file in the same folder; paths that lead "
                "out of it are not followed"
            )
    return places


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. The checkpoint is incomplete; copy it again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}). It was cut off or damaged; copy it again"
        ) from error


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most of the bytes have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
