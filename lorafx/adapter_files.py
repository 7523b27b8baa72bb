"""An adapter in PEFT's files, read without the model: its settings, its sites, and what it has trained whole.

The keys are those of :mod:`lorafx.peft_files`. What a site changes is made of its tensors alone for some variants; DoRA
scales rows of the base's weights besides, and how wide its layers are stands nowhere in the file of a VeRA adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorafx.errors import AdapterError, SpecError
from lorafx.peft_files import ATTENTION_OUTPUT, PREFIX, SHARED_PREFIX
from lorafx.spec import ALL_LINEAR, PEFT_CONFIG_NAME, LoraSpec, matches
from lorafx.variants import VARIANTS
from lorafx.variants.base import Variant

WEIGHTS_NAME = "adapter_model.safetensors"

#: What a tensor's key ends in, and the parameter that it is.
_SUFFIXES: Mapping[str, str] = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_B_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "token_adapter.trainable_tokens_delta": "trainable_tokens_delta",
    **{name: name for variant in VARIANTS.values() for name in variant.parameters},
}
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+?)((?:\.base_layer)*)\.({'|'.join(map(re.escape, _SUFFIXES))})")

#: What stands for a matrix's sizes in a variant's shapes, to read them off its tensors.
OUT, IN, RANK = -1, -2, -3


@dataclass(eq=False)
class StoredSite:
    """The tensors of one site as they lie in a file.

    ``wrapper`` is the path in the file, ``depth`` how many of PEFT's wrappers are around this one, which nests one for
    each parameter of a module.
    """

    wrapper: str
    depth: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path in the base model."""
        return base_name(self.wrapper)

    @property
    def factor(self) -> float:
        """How many times PEFT adds the change: see :data:`lorafx.peft_files.ATTENTION_OUTPUT`."""
        return ATTENTION_OUTPUT if self.wrapper.endswith(".base_layer.out_proj") else 1.0

    def of_parameter(self, spec: LoraSpec) -> bool:
        """Whether the module is adapted by its parameters."""
        leaves = [t.rpartition(".")[2] for t in spec.target_parameters]
        return any(matches(f"{self.path}.{leaf}", spec.target_parameters) for leaf in leaves)

    def variant(self, spec: LoraSpec) -> Variant:
        """The adapter's variant, or the one of rows that train whole."""
        return VARIANTS["tokens" if "trainable_tokens_delta" in self.tensors else spec.variant]

    def sizes(self, variant: Variant, tensors: Mapping[str, Tensor]) -> dict[int, int]:
        """The sizes (:data:`OUT`, :data:`IN`, :data:`RANK`) of the site's matrix, as far as its tensors have them.

        Raises:
            AdapterError: two of them say different things.
        """
        shapes = variant.shapes(OUT, IN, RANK)
        sizes: dict[int, int] = {}
        for parameter in variant.parameters:
            marks, shape = shapes[parameter], tensors[parameter].shape
            found = dict(zip(marks, shape[-len(marks) :], strict=False))
            if any(sizes.get(mark, size) != size for mark, size in found.items()):
                raise AdapterError(
                    f"site '{self.path}': {parameter} is {list(shape)}, which does not go with the others of it"
                )
            sizes.update(found)
        return sizes

    def refuse_absent(self, variant: Variant) -> None:
        """Raise :class:`AdapterError` where a tensor of the variant is not there."""
        if absent := [p for p in variant.parameters if p not in self.tensors]:
            raise AdapterError(
                f"site '{self.path}': the file lacks its {', '.join(absent)}. It is damaged, or not whole"
            )


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk.

    ``shared`` are the tensors that all sites have in common, by name; ``whole`` what is trained whole and anything
    else, by its key without PEFT's prefix.
    """

    spec: LoraSpec
    sites: tuple[StoredSite, ...]
    shared: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]

    @classmethod
    def read(cls, directory: Path) -> StoredAdapter:
        """Read the files; the tensors stay in the mapped file until they are used.

        Raises:
            AdapterError: a file is missing or damaged, or holds no site.
        """
        spec, given = read_spec(directory), read_tensors(directory)
        sites: dict[tuple[str, int], StoredSite] = {}
        shared: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for key, tensor in given.items():
            match = _KEY.fullmatch(key)
            if match is not None:
                path, depth = match[1], match[2].count(".base_layer")
                sites.setdefault((path, depth), StoredSite(path, depth)).tensors[_SUFFIXES[match[3]]] = tensor
            elif (leaf := key.removeprefix(SHARED_PREFIX)) in VARIANTS[spec.variant].shared:
                shared[leaf] = tensor
            else:
                whole[key.removeprefix(PREFIX)] = tensor
        if not sites:
            raise AdapterError(
                f"{directory}: the file has no site of an adapter, only {', '.join([*whole][:3]) or 'nothing'}"
            )
        return cls(spec, tuple(sorted(sites.values(), key=_by_number)), shared, whole)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of the adapter by its names in the base model, as exports digest what they hold of an adapter."""
        for site in self.sites:
            prefix = site.path + ".base_layer" * site.depth
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in site.tensors.items())
        yield from self.shared.items()
        yield from ((base_name(key), tensor) for key, tensor in self.whole.items())

    def unnamed(self) -> list[StoredSite]:
        """The sites that the settings do not name, so that PEFT does not read them. ``"all-linear"`` names any."""
        named = [site for site in self.sites if _names(self.spec, site)]
        leaders = named if self.spec.tied == "tie" else []
        return [s for s in self.sites if s not in named and not any(_follows(s, leader) for leader in leaders)]

    def trains(self, key: str) -> bool:
        """Whether the settings name a tensor of :attr:`whole`; others in the file repeat the base's."""
        *atoms, leaf = key.split(".")
        if leaf == "weight" and atoms[-1:] == ["base_layer"]:
            return False
        if "bias" in leaf and self.spec.bias == "all":
            return True
        if (
            leaf == "bias"
            and self.spec.bias == "lora_only"
            and base_name(".".join(atoms)) in {s.path for s in self.sites}
        ):
            return True
        return any(matches(".".join(atoms[: i + 1]), self.spec.trained_modules) for i in range(len(atoms)))


def _names(spec: LoraSpec, site: StoredSite) -> bool:
    """Whether the settings name a site, as :func:`lorafx.passes.match.match` finds it with the model."""
    if "trainable_tokens_delta" in site.tensors or site.wrapper != site.path or site.depth or site.of_parameter(spec):
        return True
    if spec.exclude_modules is not None and matches(site.path, spec.exclude_modules):
        return False
    meant = spec.target_modules == ALL_LINEAR or matches(site.path, spec.target_modules)
    return meant and spec.takes_layer(site.path)


def _follows(site: StoredSite, other: StoredSite) -> bool:
    """Whether a linear layer has the adapter of an embedding, of whose weight its own is the same tensor."""
    pairs = [(site.tensors.get(n), other.tensors.get(m)) for n, m in (("lora_A", "lora_B"), ("lora_B", "lora_A"))]
    return all(a is not None and b is not None and torch.equal(a.transpose(0, -1), b) for a, b in pairs)


def base_name(wrapped: str) -> str:
    """A path in the base model, of one in a model in which PEFT has wrapped modules."""
    return ".".join(atom for atom in wrapped.split(".") if atom != "base_layer")


def as_matrix(tensor: Tensor) -> Tensor:
    """A convolution's factor as a matrix's: ``[r, in, 3, 3]`` as ``[r, 9 in]``, ``[out, r, 1, 1]`` as ``[out, r]``."""
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


def read_spec(directory: Path) -> LoraSpec:
    """The settings of an adapter on disk; raises :class:`AdapterError`, as :meth:`StoredAdapter.read`."""
    if not directory.is_dir():
        raise AdapterError(
            f"{directory}: no such directory. Give a local one that holds {PEFT_CONFIG_NAME} and {WEIGHTS_NAME}; an "
            "adapter on a hub must be downloaded first"
        )
    named = sorted(path.parent for path in directory.glob(f"*/{PEFT_CONFIG_NAME}"))
    if named and not (directory / PEFT_CONFIG_NAME).is_file():
        raise AdapterError(
            f"{directory}: it holds no adapter itself, but in {', '.join(map(str, named))}, where PEFT's "
            "save_pretrained puts an adapter whose name is not 'default'. Give that folder"
        )
    try:
        return LoraSpec.from_json(directory / PEFT_CONFIG_NAME)
    except (SpecError, OSError) as error:
        raise AdapterError(str(error)) from error


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter on disk, by PEFT's keys; raises :class:`AdapterError`, as for :func:`read_spec`."""
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        pickles = sorted(p.name for p in directory.glob("adapter_model.*"))
        advice = (
            f"{pickles[0]} is not read: a pickle can run any code. If you trust it, convert it with PEFT: "
            "PeftModel.from_pretrained(model, directory).save_pretrained(directory)"
            if pickles
            else "save_adapter and PEFT's save_pretrained write it; look for the directory with both files"
        )
        raise AdapterError(f"{path}: no such file. {advice}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a whole safetensors file ({error}). It was cut off or damaged; copy it again"
        ) from error


def _by_number(site: StoredSite) -> tuple[list[tuple[int, str]], int]:
    return by_number(site.wrapper), -site.depth


def by_number(path: str) -> list[tuple[int, str]]:
    """A key to sort paths by, numbers in their order: a file has them as text, layer 10 before layer 2."""
    return [(int(atom), "") if atom.isdecimal() else (-1, atom) for atom in path.split(".")]
