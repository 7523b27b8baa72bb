"""Decoders with a cache: the names of a step's inputs and outputs, and whether it generates what torch does.

    prompts, left-padded --step--> logits, present --greedy token, past = present, step--> logits, present --> ...
         each row alone, without cache or padding ------ one call of the unmerged torch graph ---- same logits?

The step itself comes from :mod:`lorafx.passes.decoder`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lorafx.errors import ExportError, ParityError
from lorafx.export.names import all_values
from lorafx.export.pack import DENSE, Plan
from lorafx.export.parity import Session, Tolerance, difference, random_like, run_torch
from lorafx.export.report import OutputParity, Parity
from lorafx.export.translate import Translation, output_names, translate
from lorafx.export.verify import Runtime, open_runtime
from lorafx.graph import CapturedModule
from lorafx.signature import Signature

#: How many tokens are generated for each prompt, in as many runs.
STEPS = 8

_FLOATS = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32, "tensor(double)": torch.float64}
_TOTALS = frozenset({"sequence + past_sequence", "past_sequence + sequence"})

Rows = Sequence[Tensor]


def translate_step(
    step: CapturedModule,
    example: Mapping[str, Tensor],
    dims: Mapping[str, Mapping[int, str]],
    opset: int | None = None,
    packing: Plan = DENSE,
) -> Translation:
    """:func:`~lorafx.export.translate.translate` a step, its past called ``past_key_values.{i}.key`` and ``.value``."""
    translation = translate(step, example, dims, opset, packing)
    names = _input_names(step.signature)
    for value in translation.model.graph.inputs:
        value.name = names[str(value.name)]
    for value in all_values(translation.model):
        if value.shape is not None:
            value.shape = ir.Shape(["total_sequence" if str(d) in _TOTALS else d for d in value.shape])
    return dataclasses.replace(translation, dims={names[n]: held for n, held in translation.dims.items()})


def _input_names(signature: Signature) -> dict[str, str]:
    names = {leaf: leaf for leaf in signature.placeholders}
    (past,) = (a.leaves for a in signature.arguments if a.name == "past_key_values")
    for index, leaf in enumerate(past):
        names[leaf] = f"past_key_values.{index // 2}.{('key', 'value')[index % 2]}"
    return names


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue together: each an int64 ``[length]``. ``first`` columns of the batch go ahead of the rest."""

    origin: str
    rows: tuple[Tensor, ...]
    first: int = 0

    @property
    def length(self) -> int:
        """Of the longest."""
        return max(len(row) for row in self.rows)


def make_prompts(example: Mapping[str, Tensor], longest: int | None) -> list[Prompts]:
    """The rows of an example without their padding; a single random token; and random prompts of several lengths.

    Args:
        example: ``input_ids [batch, sequence]`` and, if there is padding, ``attention_mask``.
        longest: how many tokens the model takes, generated ones included; None: any number.
    """
    tokens = example["input_ids"].detach().cpu()
    mask = example.get("attention_mask", torch.ones_like(tokens)).detach().cpu().bool()
    limit = tokens.shape[1] if longest is None else min(tokens.shape[1], longest - STEPS)
    if limit < 1:
        raise ExportError(f"the model takes {longest} tokens, too few to generate {STEPS}: pass verify=False")
    rows = tuple(row[kept][:limit] for row, kept in zip(tokens, mask, strict=True) if kept.any())
    longer = 2 * limit + 1 if longest is None else min(2 * limit + 1, longest - STEPS)

    def random(*lengths: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(len(lengths))
        return tuple(random_like("input_ids", tokens, [n], generator) for n in lengths)

    return [
        Prompts("example", rows),
        Prompts("random", random(1)),
        Prompts("random", random(longer, limit, 1), longer // 2),
    ]


def check_generation(
    path: Path,
    graph: CapturedModule,
    dtype: torch.dtype,
    prompts: Sequence[Prompts],
    tolerance: Tolerance,
    progress: Callable[[float], None],
    name: str = "unmerged",
) -> tuple[tuple[Parity, ...], str, str | None]:
    """Continue prompts with a file that has a cache, greedily, and hold the logits of every token to those of torch.

    Args:
        path: the file.
        graph: the torch graph without a cache, for inference.
        dtype, tolerance, progress, name: as for :func:`~lorafx.export.verify.check_numbers`.
        prompts: what to continue.

    Returns:
        The runs; how many tokens are torch's too (the others are as likely by the tolerance); a note if a twin was run.

    Raises:
        ParityError: logits are further off than the tolerance allows.
        ExportError: the torch graph does not take sequences of all lengths, so that there is nothing to compare with.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        runtime = open_runtime(path, graph, dtype, Path(scratch), name)
        found = continue_prompts(runtime, prompts, tolerance, progress)
        return found.parity, found.text, runtime.note


@dataclass(frozen=True)
class Continued:
    """What was run to continue prompts, and how many of the ``count`` new tokens are the ``same`` as torch's."""

    parity: tuple[Parity, ...]
    same: int
    count: int

    @property
    def text(self) -> str:
        """The tokens in words."""
        return f"{self.same} of {self.count} tokens generated with the cache are torch's without one"


def continue_prompts(
    runtime: Runtime, prompts: Sequence[Prompts], tolerance: Tolerance, progress: Callable[[float], None]
) -> Continued:
    """:func:`check_generation` with a file that is open.

    Raises:
        ParityError, ExportError: as there.
    """
    parities: list[Parity] = []
    same = count = 0
    index = output_names(runtime.graph).index("logits")
    for done, batch in enumerate(prompts):
        worst: OutputParity | None = None
        for row, (logits, tokens) in zip(batch.rows, generate(runtime.session, batch), strict=True):
            fed = torch.cat([row, torch.from_numpy(tokens[:-1])])[None]
            expected = _run_whole(runtime.graph, fed)[index][0]
            found = difference("logits", expected, logits, tolerance)
            worst = found if worst is None or found.max_abs > worst.max_abs else worst
            same += int((expected[-len(tokens) :].argmax(-1) == tokens).sum())
            count += len(tokens)
        assert worst is not None
        sizes = {"batch": len(batch.rows), "prompt": batch.length, "tokens": STEPS}
        parity = Parity(batch.origin, sizes, f"{runtime.reference}, no cache", runtime.session.ran, (worst,))
        if not parity.passed:
            raise ParityError(
                f"ONNX Runtime (running {parity.ran}) with its cache and the torch graph ({parity.reference}) "
                f"disagree on {parity.where}: the logits by {worst.max_abs:.3g} (relative {worst.relative:.3g}), "
                f"allowed is {worst.allowed:.3g}"
            )
        parities.append(parity)
        progress((done + 1) / len(prompts))
    return Continued(tuple(parities), same, count)


def generate(session: Session, prompts: Prompts) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Continue prompts by the likeliest token, left-padded into one batch, each run's ``present`` the next one's past.

    Returns:
        For each prompt of length n the logits of its tokens and all but the last new one,
        ``[n + STEPS - 1, vocabulary]``; and the new tokens, int64 ``[STEPS]``.
    """
    batch, length = len(prompts.rows), prompts.length
    tokens = torch.zeros(batch, length, dtype=torch.long)
    mask = torch.zeros(batch, length + STEPS, dtype=torch.long)
    for index, row in enumerate(prompts.rows):
        tokens[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past = {
        i.name: torch.zeros(batch, i.shape[1], 0, i.shape[3], dtype=_FLOATS[i.type])
        for i in session.session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    logits: list[np.ndarray[Any, Any]] = []
    start = 0
    for stop in [*([prompts.first] if prompts.first else []), *range(length, length + STEPS)]:
        fed = {
            "input_ids": tokens[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
        }
        found, *present = session({**{n: t.contiguous() for n, t in fed.items()}, **past})
        past = {name: torch.from_numpy(value) for name, value in zip(past, present, strict=True)}
        logits.append(found)
        if stop >= length:
            tokens = torch.cat([tokens, torch.from_numpy(found[:, -1].argmax(-1))[:, None]], 1)
        start = stop
    joined = np.concatenate(logits, 1)
    return [
        (joined[index, length - len(row) :], tokens[index, length:].numpy()) for index, row in enumerate(prompts.rows)
    ]


def _run_whole(graph: CapturedModule, tokens: Tensor) -> list[np.ndarray[Any, Any]]:
    """The torch graph on one sequence without padding, ``[1, length]``."""
    length = tokens.shape[1]
    known = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(length)[None]}
    try:
        return run_torch(graph, {leaf: known[leaf] for leaf in graph.signature.placeholders})
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"generation is checked against the graph without a cache, which does not take [1, {length}] ({reason}): "
            "apply to the model with batch and sequence dynamic (the default), or pass verify=False"
        ) from error
