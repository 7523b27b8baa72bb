"""Running a model with adapters in ONNX Runtime, without its traps.

    session = lorafx.AdapterSession("model.onnx", {"fr": "fr.onnx_adapter", "de": "de.onnx_adapter"})
    session.run({"input_ids": ids}, adapter="fr")        # None: the base alone

ONNX Runtime itself takes the first of two adapters with the same tensors without a word, ignores adapters where inputs
are bound (IO binding), fails inside the graph where an adapter has A without B, and runs an adapter of another
base as long as the shapes fit. Here each of these is an error that says what to do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from lorafx.checks import did_you_mean
from lorafx.errors import AdapterError, InputError
from lorafx.export.adapter_file import ADAPTER_SUFFIX, AdapterFile, load_adapter_file, model_version
from lorafx.export.input_names import PAIRS, allows, is_rank
from lorafx.export.load import known_providers, quiet, refuse_fallback, while_unchanged

Array = npt.NDArray[Any]


@cache
def onnx_type(dtype: np.dtype[Any]) -> str:
    """What ONNX Runtime calls tensors of this dtype, as ``tensor(int64)``."""
    found: str = ort.OrtValue.ortvalue_from_numpy(np.zeros(1, dtype)).data_type()
    return found


class AdapterSession:
    """ONNX Runtime on a file of :func:`lorafx.export_multi`, with any of its adapters.

    ``session`` is the ``onnxruntime.InferenceSession``. Runs may come from several threads at once, each with its own
    adapter; adding and removing adapters may not.

    Args:
        path: the ``.onnx`` file.
        adapters: files by the names to call them; None: all beside it that are for this base, by their files' names
            (one that cannot be read is an error only when it is asked for).
        providers, session_options: as for ``onnxruntime.InferenceSession``; None: the CPU, ONNX Runtime's defaults.

    Raises:
        AdapterError: as :meth:`add`.
        ExportError: ONNX Runtime cannot load the file, or has no such provider, or cannot start it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        *,
        providers: Sequence[Any] | None = None,
        session_options: ort.SessionOptions | None = None,
    ) -> None:
        self.path = Path(path)
        chosen = known_providers(providers)

        def load(place: Path) -> tuple[int, ort.InferenceSession]:
            version = model_version(hashlib.sha256(place.read_bytes()).hexdigest())
            return version, ort.InferenceSession(str(place), session_options or quiet(), providers=chosen)

        self._version, self.session = while_unchanged(path, load)
        refuse_fallback(self.session, chosen)
        self._inputs = {i.name: (i.type, i.shape) for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        self._optional = {i.name: i for i in self.session.get_overridable_initializers()}
        self._files: dict[str, AdapterFile] = {}
        self._loaded: dict[str, ort.LoraAdapter] = {}
        self._options: dict[tuple[str, ...], ort.RunOptions] = {}
        self._damaged: dict[str, AdapterError] = {}  # of which nobody can tell what base they are for
        if adapters is None:
            adapters = self._beside()
        for name, place in adapters.items():
            self.add(name, place)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._files)

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Load an adapter, while the session goes on; the base is not loaded again.

        Raises:
            AdapterError: the name is taken; the file is damaged or for another base; it has inputs that the model has
                not, of another shape or dtype, or A of a layer without B.
        """
        if name in self._files:
            raise AdapterError(f"there is an adapter '{name}' already: remove('{name}') first, or take another name")
        file = load_adapter_file(path)
        self._check(file)
        loaded = ort.LoraAdapter()
        loaded.Load(str(path))
        self._files[name], self._loaded[name] = file, loaded

    def _beside(self) -> dict[str, Path]:
        """The adapters for this base that lie beside it, by their files' names; those that cannot be read are noted."""
        found = {}
        for path in sorted(self.path.parent.glob(f"*{ADAPTER_SUFFIX}")):
            name = path.name.removesuffix(ADAPTER_SUFFIX)
            try:
                if load_adapter_file(path).version == self._version:
                    found[name] = path
            except AdapterError as error:
                self._damaged[name] = error
        return found

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterError: there is none of this name.
        """
        self._find(name)
        del self._files[name], self._loaded[name]
        self._options = {names: options for names, options in self._options.items() if name not in names}

    def run(self, inputs: Mapping[str, Array], adapter: str | Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs by name, with an adapter (several, if they adapt different layers), or with none.

        Raises:
            AdapterError: there is no such adapter, its file is damaged, two have the same tensors, the inputs are
                bound, or what is given is no name.
            InputError: an input is missing, unknown, an adapter's, or no numpy array of its dtype and rank.
        """
        if isinstance(inputs, ort.IOBinding) or not isinstance(inputs, Mapping):
            raise AdapterError(
                "run takes inputs as a dict of arrays. ONNX Runtime ignores adapters in runs with bound inputs: take "
                "binding = session.binding('name'), which has the adapter's tensors bound as inputs, bind the others, "
                "and call session.session.run_with_iobinding(binding)"
            )
        self._check_inputs(inputs)
        found: Sequence[Array] = self.session.run(self._outputs, dict(inputs), self._run_options(_names(adapter)))
        return dict(zip(self._outputs, found, strict=True))

    def binding(self, adapter: str | Sequence[str] | None = None) -> ort.IOBinding:
        """For runs with bound inputs and outputs: a binding that has an adapter's tensors as inputs.

        Bind the model's own inputs and its outputs to it, and call ``session.session.run_with_iobinding(binding)``,
        without run options. The tensors lie in the CPU's memory, mapped from the file.

        Raises:
            AdapterError: as :meth:`run`.
        """
        chosen = _names(adapter)
        self._refuse_overlap(chosen)
        binding = self.session.io_binding()
        for name in chosen:
            for tensor, value in self._find(name).values.items():
                binding.bind_ortvalue_input(tensor, value)
        return binding

    def _check_inputs(self, inputs: Mapping[str, object]) -> None:
        wanted = self._inputs
        for name in (*wanted, *inputs):
            if name in self._optional:  # ONNX Runtime would take A without B, and any of them beside an active adapter
                raise InputError(f"input '{name}' is an adapter's: give run the name of one, add(name, path) adds it")
            if name not in wanted:
                raise InputError(f"the model has no input '{name}'{did_you_mean(name, wanted)}; it takes {[*wanted]}")
        for name, (type_, shape) in wanted.items():
            value = inputs.get(name)
            if isinstance(value, np.ndarray) and onnx_type(value.dtype) == type_ and value.ndim == len(shape):
                continue
            what = f"input '{name}' is to be a numpy array, {type_} of shape {shape}"
            if name not in inputs:
                raise InputError(f"{what}, and is missing")
            if not isinstance(value, np.ndarray):
                hint = ": give its .numpy()" if hasattr(value, "numpy") else ""
                raise InputError(f"{what}, and is a {type(value).__module__}.{type(value).__qualname__}{hint}")
            raise InputError(f"{what}, and is {onnx_type(value.dtype)} of shape {[*value.shape]}")

    def _run_options(self, names: tuple[str, ...]) -> ort.RunOptions | None:
        if not names:
            return None
        if names not in self._options:
            self._refuse_overlap(names)
            options = ort.RunOptions()
            for name in names:
                self._find(name)
                options.add_active_adapter(self._loaded[name])
            self._options[names] = options
        return self._options[names]

    def _refuse_overlap(self, names: Sequence[str]) -> None:
        first: dict[str, str] = {}
        for name in names:
            for tensor in self._find(name).values:
                if (other := first.setdefault(tensor, name)) != name:
                    raise AdapterError(
                        f"adapters '{other}' and '{name}' both have '{tensor}': ONNX Runtime would take that of "
                        f"'{other}' and drop the other's without a word. Run one of them, or combine them before the "
                        "export (lorafx.combine_adapters)"
                    )
        if len(set(names)) < len(names):
            raise AdapterError(f"an adapter is named twice in {list(names)}; each counts once")

    def _find(self, name: str) -> AdapterFile:
        if name not in self._files:
            if name in self._damaged:
                raise self._damaged[name]
            there = ", ".join(map(repr, self._files)) or "none"
            raise AdapterError(f"there is no adapter {name!r}{did_you_mean(name, self._files)}; there are {there}")
        return self._files[name]

    def _check(self, file: AdapterFile) -> None:
        if unknown := [n for n in file.values if n not in self._optional]:
            raise AdapterError(
                f"{file.path}: {self.path} has no optional input '{unknown[0]}'"
                f"{did_you_mean(unknown[0], self._optional)}: the adapter was made for another model. Export "
                "them together"
            )
        for name, value in file.values.items():
            wanted = self._optional[name]
            fits = len(wanted.shape) == len(value.shape()) and all(
                allows(w, s) for w, s in zip(wanted.shape, value.shape(), strict=True)
            )
            if not fits or wanted.type != value.data_type():
                raise AdapterError(
                    f"{file.path}: '{name}' is {value.data_type()} {value.shape()}, and the model takes {wanted.type} "
                    f"{wanted.shape}"
                )
        for a, b in PAIRS:
            self._check_pairs(file, a, b)
        if file.version != self._version:
            raise AdapterError(
                f"{file.path} was made for another base than {self.path} (or the base was changed since): its "
                "update is relative to other weights. Export them together"
            )

    def _check_pairs(self, file: AdapterFile, a: str, b: str) -> None:
        for mine, other in ((a, b), (b, a)):
            for name in (n for n in file.values if n.endswith(f".{mine}")):
                partner = name.removesuffix(mine) + other
                if partner not in file.values:
                    raise AdapterError(f"{file.path}: '{name}' without '{partner}' means nothing")
                ranks = (self._rank(file, name), self._rank(file, partner))
                if ranks[0] != ranks[1]:
                    raise AdapterError(f"{file.path}: '{name}' has rank {ranks[0]} and '{partner}' {ranks[1]}")

    def _rank(self, file: AdapterFile, name: str) -> int:
        where = next(i for i, size in enumerate(self._optional[name].shape) if is_rank(size))
        return int(file.values[name].shape()[where])


def _names(adapter: str | Sequence[str] | None) -> tuple[str, ...]:
    if adapter is None:
        return ()
    names = (adapter,) if isinstance(adapter, str) else adapter
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise AdapterError(
            f"adapter={adapter!r} is of type {type(adapter).__name__}, and the name of an adapter, a list of names, or "
            "None (the base alone) is expected; session.adapters has the names"
        )
    return tuple(names)
