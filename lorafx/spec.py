"""What to adapt and how: :class:`LoraSpec`, and reading one from dicts, JSON files and PEFT configs.

LoRA (arXiv 2106.09685, eq. 3) adds ``s * B A x`` to a frozen layer's ``W x``, with A: [r, in],
B: [out, r] and s = alpha / r (section 4.1). rsLoRA (arXiv 2312.03732) has s = alpha / sqrt(r), which
keeps the update's size steady as r grows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch

from lorafx import checks
from lorafx.bases import FORMATS
from lorafx.errors import SpecError
from lorafx.peft_config import HEADS_OF_TASK, METADATA, fields_from_peft, peft_from_fields
from lorafx.variants import SELECTABLE, VARIANTS
from lorafx.variants.inits import find_init

ALL_LINEAR = "all-linear"
PEFT_CONFIG_NAME = "adapter_config.json"

Bias = Literal["none", "all", "lora_only"]
Tied = Literal["refuse", "untie", "tie"]
AdapterDtype = Literal["float32", "bfloat16", "float16", "float64"]

T = TypeVar("T")


class PeftConfig(Protocol):
    """What is asked of a ``peft.LoraConfig``: a dataclass with a ``peft_type``. PEFT is never imported."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def peft_type(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Which layers get adapters and of what kind. Frozen, hashable, and checked when built.

    Names of modules are dotted paths in the user's model. A *pattern* maps a regex, matched against the
    end of a site's name (the whole name or after a dot), to a value; the first match wins.

    Attributes:
        r: rank, the inner dimension of ``B A``; an integer of at least 1.
        alpha: numerator of the scaling; above 0. None: the variant's default (16; for VeRA r, no scaling).
        target_modules: what to adapt. Names: each matches exactly or as a dotted suffix; kept sorted,
            since their order means nothing. A string: a regex for the full name, or ``"all-linear"``:
            every Linear but the output layer. Embeddings and convolutions go by name; so do an
            ``nn.MultiheadAttention`` (its projections of input and output) and ``<its name>.q``, ``.k`` and ``.v``.
        target_parameters: parameters to adapt wherever they are used, by name or dotted suffix: stacks of expert
            weights ``[experts, out, in]``, and what no layer of its own multiplies by.
        trainable_token_indices: rows of embeddings to train, and nothing else of them: a list of token ids for the
            input embedding, or a mapping from names of embeddings (exact or dotted suffix) to such lists.
        exclude_modules: what not to adapt, in the same grammar; wins over both.
        layers_to_transform: of what ``target_modules`` means, adapt only these of the numbered layers;
            ``layers_pattern`` names the list that numbers them (``"layers"``, ``"h"``), if not every list.
        dropout: probability of dropping an element of the adapter's input in training; in [0, 1). An
            embedding's input has no elements to drop, so there it means nothing, as in PEFT.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        variant: name of the adapter kind, one of :data:`lorafx.variants.SELECTABLE`.
        init: how the adapter starts (:mod:`lorafx.variants.inits`); None: the variant's default, for LoRA
            ``"kaiming"``. The model always starts out unchanged, but by ``"loftq"`` and ``"loftq_<rounds>"``
            (arXiv 2310.08659), which need a ``base`` and make up for a part of what it loses.
        options: what only this variant has, such as VeRA's ``projection_prng_key``.
        rank_pattern: pattern to r, where it differs. For AdaLoRA, what is left of r there (0: nothing); as in PEFT,
            the scaling stays that of r.
        alpha_pattern: pattern to alpha, where it differs.
        bias: which biases of the base train: ``"none"``, ``"all"``, or those of the adapted layers,
            ``"lora_only"``.
        modules_to_save: modules, named as in ``target_modules``, that are trained in full and saved with the
            adapter.
        adapter_dtype: dtype of the adapter's parameters, by name or as a ``torch.dtype``. None: float32 on a
            half-precision base, otherwise the base weight's own (:meth:`dtype_for`).
        tied: when a targeted weight is used elsewhere too: ``"refuse"``; ``"untie"``: the fold
            writes a weight of its own for the adapted call; or ``"tie"``: every use is adapted alike.
        base: how the adapted weights are stored, frozen: the name of a base format (:data:`lorafx.bases.FORMATS`),
            ``"nf4"`` for QLoRA (arXiv 2305.14314) or ``"int8"``; None: as they are. Those of embeddings and
            convolutions, and those with other uses, stay as they are.
        block_size, double_quant: settings of the format: how many values share a scale, and whether the scales are
            quantised too. None: its own choice (64 and True for nf4).
        metadata: what PEFT notes down beside the settings (base_model_name_or_path, task_type, ...): kept and
            written back, of no effect here, and left out of ``==``.

    Raises:
        SpecError: a field has a value that is not allowed; the message names all three.
    """

    r: int = 8
    alpha: float = None  # type: ignore[assignment]  # a number once built
    target_modules: str | Collection[str] = ALL_LINEAR
    target_parameters: Collection[str] = ()
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] = ()
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Collection[int] = ()
    layers_pattern: str | Collection[str] = ()
    dropout: float = 0.0
    rslora: bool = False
    variant: str = "lora"
    init: str = None  # type: ignore[assignment]  # a name once built
    options: Mapping[str, Any] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: Bias = "none"
    modules_to_save: Collection[str] = ()
    adapter_dtype: AdapterDtype | torch.dtype | None = None
    tied: Tied = "refuse"
    base: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(f"LoraSpec.{name}", getattr(self, name)))
        for name, value in _of_variant(self).items():
            object.__setattr__(self, name, value)
        _check_together(self)

    def rank_for(self, site: str) -> int:
        """r of the site with this name: its first match in ``rank_pattern``, otherwise ``r``."""
        return _first_match(self.rank_pattern, site, self.r)

    def alpha_for(self, site: str) -> float:
        """alpha of the site with this name: its first match in ``alpha_pattern``, otherwise ``alpha``."""
        return _first_match(self.alpha_pattern, site, self.alpha)

    def takes_layer(self, name: str) -> bool:
        """Whether ``layers_to_transform`` lets the module with this name be adapted, by PEFT's rule.

        The number is the first one in the name, or the first behind a name of ``layers_pattern``. What
        ``target_modules`` lists by its whole name is meant in any case.
        """
        numbers: Any = self.layers_to_transform  # a tuple once built
        if not numbers or (not isinstance(self.target_modules, str) and name in self.target_modules):
            return True
        lists = [rf"(?:^|.*?\.){p}" for p in self.layers_pattern] or [r".*?\.[^.]*"]
        found = next(filter(None, (re.match(rf"{regex}\.(\d+)\.", name) for regex in lists)), None)
        return found is not None and int(found[1]) in numbers

    def scaling_for(self, site: str) -> float:
        """s in ``y = W x + s B A x``: alpha / r (arXiv 2106.09685), or alpha / sqrt(r) (arXiv 2312.03732)."""
        variant = VARIANTS[self.variant]
        r = self.r if variant.shrinks else self.rank_for(site)
        return variant.scaling(self.alpha_for(site), r, self.rslora)

    @property
    def heads_of_task(self) -> tuple[str, ...]:
        """Modules that PEFT trains whole for the ``task_type`` among the metadata, where a model has them."""
        return HEADS_OF_TASK.get(str(self.metadata.get("task_type")), ())

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """What trains whole: ``modules_to_save``, and the heads that a PEFT task type implies."""
        return tuple(dict.fromkeys((*self.modules_to_save, *self.heads_of_task)))

    def dtype_for(self, base: torch.dtype) -> torch.dtype:
        """dtype of the adapter's parameters over a base weight of dtype ``base``."""
        if self.adapter_dtype is None:
            return torch.promote_types(base, torch.float32)
        dtype: torch.dtype = getattr(torch, str(self.adapter_dtype))
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON data; :meth:`from_dict` is the inverse."""
        return {f.name: checks.plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraSpec:
        """A spec from its fields; absent ones have their defaults. Unknown ones raise :class:`SpecError`."""
        checks.refuse_unknown("LoraSpec", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The spec as JSON text, also written to ``path`` if one is given: whole, or not at all."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            path = Path(path)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
                Path(beside, path.name).write_text(text, encoding="utf-8")
                Path(beside, path.name).replace(path)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> LoraSpec:
        """A spec from JSON text (starting with ``{``) or from a file of it, ours or PEFT's.

        A directory stands for the ``adapter_config.json`` in it. Raises :class:`SpecError` naming the
        file, for one that is missing, is no JSON object, or holds a value that is not allowed.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return _parse(source)
        path = Path(source)
        if path.is_dir():
            path /= PEFT_CONFIG_NAME
        if not path.is_file():
            raise SpecError(
                f"{path}: no such file. Give a JSON file (a LoraSpec or a PEFT config), or a directory that holds "
                f"{PEFT_CONFIG_NAME}."
            )
        try:
            return _parse(path.read_text(encoding="utf-8"))
        except (SpecError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: {error}") from error

    def to_peft(self) -> dict[str, Any]:
        """Keywords for the variant's config in PEFT, as plain JSON data fit for ``adapter_config.json``.

        That is ``LoraConfig``, ``AdaLoraConfig`` or ``VeraConfig``; the key ``peft_type`` says which.

        ``adapter_dtype``, ``tied="untie"`` and ``base`` with its settings have no key there and are left out; but by
        ``init="loftq"`` the ``loftq_config`` says which base (4 bits: nf4; 8: int8) and how many rounds. Raises
        :class:`SpecError` for a variant that PEFT does not have, and for other fields that its config has no key for.
        """
        return peft_from_fields(self.to_dict(), LoraSpec(r=self.r, variant=self.variant).to_dict())

    @classmethod
    def from_peft(cls, config: Mapping[str, Any] | PeftConfig) -> LoraSpec:
        """A spec from a ``peft.LoraConfig`` or from the dict in ``adapter_config.json``.

        Absent keys have PEFT's defaults (alpha is 8). Raises :class:`SpecError` naming every setting
        that is not supported. PEFT sorts the patterns' keys when it saves: where two of them match the
        same site, its file may mean something else than the config did.
        """
        if isinstance(config, Mapping):
            return cls(**fields_from_peft(config))
        if not _is_peft_config(config):
            raise SpecError(f"a peft.LoraConfig or the dict of one was expected, got {config!r}.")
        # asdict, because PEFT's own to_dict leaves runtime_config out.
        return cls(**fields_from_peft(dataclasses.asdict(config)))


SpecLike = LoraSpec | Mapping[str, Any] | str | os.PathLike[str] | PeftConfig
"""What :func:`as_spec` takes."""


def matches(name: str, targets: str | Collection[str]) -> bool:
    """Whether a module's dotted ``name`` is meant by ``targets``, by PEFT's rule.

    A string is a regex for the full name; of several names, one must equal ``name`` or be a dotted suffix
    of it. ``"all-linear"`` is about kinds of layers, not names: the caller resolves it.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def as_spec(spec: SpecLike) -> LoraSpec:
    """The :class:`LoraSpec` meant by a LoraSpec, a dict, a path (or text) for :meth:`LoraSpec.from_json`,
    or a ``peft.LoraConfig``. A dict with the key ``peft_type`` is PEFT's. Raises :class:`SpecError`."""
    if isinstance(spec, LoraSpec):
        return spec
    if isinstance(spec, Mapping):
        return LoraSpec.from_peft(spec) if "peft_type" in spec else LoraSpec.from_dict(spec)
    if isinstance(spec, (str, os.PathLike)):
        return LoraSpec.from_json(spec)
    if _is_peft_config(spec):
        return LoraSpec.from_peft(spec)
    raise SpecError(
        f"a spec was expected, got {spec!r}: give a LoraSpec, a dict of its fields, the path of a JSON file or of a "
        f"directory with {PEFT_CONFIG_NAME}, or a peft.LoraConfig."
    )


def as_specs(specs: SpecLike | Sequence[SpecLike]) -> tuple[LoraSpec, ...]:
    """The specs for the parts of a model: of a list, each :func:`as_spec`; otherwise the one given."""
    if isinstance(specs, str) or not isinstance(specs, Sequence):
        return (as_spec(specs),)
    if not specs:
        raise SpecError("at least one spec was expected, got an empty list.")
    return tuple(as_spec(spec) for spec in specs)


def _is_peft_config(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "peft_type")


def _parse(text: str) -> LoraSpec:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise SpecError(f"a JSON object was expected, got {values!r}.")
    return as_spec(values)


def _first_match(pattern: Mapping[str, T], site: str, default: T) -> T:
    found = (value for key, value in pattern.items() if re.match(checks.pattern_regex(key), site))
    return next(found, default)


def _of_variant(spec: LoraSpec) -> dict[str, Any]:
    """The fields whose values and defaults are the variant's to say."""
    variant = VARIANTS[spec.variant]
    if spec.init is not None and not variant.has_init(spec.init):
        expected = f"variant {variant.name!r} starts by {' or '.join(map(repr, variant.inits))}"
        raise checks.refusal("LoraSpec.init", spec.init, expected + checks.did_you_mean(spec.init, variant.inits))
    checks.refuse_unknown(f"LoraSpec.options of variant {variant.name!r}", spec.options, variant.options)
    options = {
        name: option.check(f"LoraSpec.options[{name!r}]", spec.options.get(name, option.default))
        for name, option in variant.options.items()
    }
    return {
        "alpha": variant.default_alpha(spec.r) if spec.alpha is None else spec.alpha,
        "init": variant.inits[0] if spec.init is None else spec.init,
        "options": checks.FrozenDict(options),
    }


def _check_together(spec: LoraSpec) -> None:
    """Refuse fields that are allowed one by one and not together."""
    if not (spec.target_modules or spec.target_parameters or spec.trainable_token_indices):
        expected = f'expected module names, a regular expression or "{ALL_LINEAR}" (or target_parameters)'
        raise checks.refusal("LoraSpec.target_modules", spec.target_modules, expected)
    if spec.layers_pattern and not spec.layers_to_transform:
        expected = "it goes with layers_to_transform, which numbers to take"
        raise checks.refusal("LoraSpec.layers_pattern", spec.layers_pattern, expected)
    if spec.base is not None:  # a row's width is not known yet
        FORMATS[spec.base].settings(spec.block_size or 0, spec.block_size, spec.double_quant)
    start = find_init(spec.init)
    if spec.base is None and start is not None and start.rounds:
        expected = f"it makes up for what a base format loses; give one (base={' or '.join(map(repr, FORMATS))})"
        raise checks.refusal("LoraSpec.init", spec.init, expected)
    for setting in ("block_size", "double_quant"):
        if spec.base is None and getattr(spec, setting) is not None:
            expected = f"it is a setting of a base format; give one (base={' or '.join(map(repr, FORMATS))})"
            raise checks.refusal(f"LoraSpec.{setting}", getattr(spec, setting), expected)
    least = 0 if VARIANTS[spec.variant].shrinks else 1
    for key, r in spec.rank_pattern.items():
        if r < least:
            raise checks.refusal(f"LoraSpec.rank_pattern[{key!r}]", r, "expected an integer of at least 1")


def _targets(where: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value.lower() == ALL_LINEAR:  # PEFT ignores the case too
        return ALL_LINEAR
    targets = checks.regex_or_names(where, value)
    if not isinstance(targets, str) and ALL_LINEAR in targets:
        raise checks.refusal(where, value, f'"{ALL_LINEAR}" is no module name; give it alone, not in a list')
    return targets


def _excludes(where: str, value: Any) -> str | tuple[str, ...] | None:
    if value == ALL_LINEAR:
        raise checks.refusal(where, value, "it would leave nothing to adapt; name what to leave out")
    return None if value is None else checks.regex_or_names(where, value) or None


_CHECKS: Mapping[str, checks.Check[Any]] = {
    "r": checks.rank,
    "alpha": checks.optional(checks.alpha),
    "target_modules": _targets,
    "target_parameters": checks.names,
    "trainable_token_indices": checks.token_indices,
    "exclude_modules": _excludes,
    "layers_to_transform": checks.one_or_more(checks.count),
    "layers_pattern": checks.one_or_more(checks.regex),
    "dropout": checks.dropout,
    "rslora": checks.flag,
    "variant": checks.one_of(tuple(SELECTABLE)),
    "init": checks.optional(checks.word),
    "options": checks.mapping,
    "rank_pattern": checks.pattern(checks.count),
    "alpha_pattern": checks.pattern(checks.alpha),
    "bias": checks.one_of(get_args(Bias)),
    "modules_to_save": checks.names,
    "adapter_dtype": checks.dtype_name(get_args(AdapterDtype)),
    "tied": checks.one_of(get_args(Tied)),
    "base": checks.optional(checks.one_of(tuple(FORMATS))),
    "block_size": checks.optional(checks.rank),
    "double_quant": checks.optional(checks.flag),
    "metadata": checks.json_object(METADATA),
}
