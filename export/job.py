"""What an export works on: the graph that is written, what its weights are made of, how it is expressed in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lorafx.export.cast import Captures, cast_graph, written_source
from lorafx.export.decoder import translate_step
from lorafx.export.example import Example, find_example
from lorafx.export.pack import Plan, dense_notes, plan_packing, read_as
from lorafx.export.parity import TOLERANCES, Tolerance, precision
from lorafx.export.settings import Settings
from lorafx.export.translate import Translation, translate
from lorafx.graph import CapturedModule, get_path
from lorafx.passes.decoder import with_tensors
from lorafx.passes.fold import Fold
from lorafx.passes.inference import inference

#: For bfloat16 unless said otherwise. Before 22 ONNX has no bfloat16 convolutions; before 23 attention is
#: spelled out, with its scale rounded to bfloat16, which torch does not do.
BFLOAT16_OPSET = 23


@dataclass(frozen=True)
class Job:
    """``written``, in which ``folds`` take the place of tensors, becomes a file with the numbers of ``trained``.

    ``no_numbers`` is why these are not to be compared, if they are not; ``to_merged`` says that they are beside the
    merged graph, which is then not what was trained. ``model`` is the graph whose base the report has the digest of, if
    that is another one than ``trained``.
    """

    trained: CapturedModule
    written: CapturedModule
    settings: Settings
    captured: Captures = field(default_factory=Captures)
    folds: Mapping[str, Fold | Tensor] = field(default_factory=dict)
    no_numbers: str | None = None
    to_merged: bool = False
    model: CapturedModule | None = None

    def as_called(self, gm: CapturedModule) -> CapturedModule:
        """A graph of the model's as the file is called: for inference, as a step with a cache if that is written."""
        step = self.captured.step
        return inference(gm if step is None else with_tensors(step, gm), keep_loss=self.settings.keep_loss)

    def in_its_dtype(self, gm: CapturedModule) -> CapturedModule:
        """The graph that a file of one of :meth:`as_called` has: another one in another precision."""
        twin = self.captured.twin
        return gm if twin is None else cast_graph(gm, inference(twin, keep_loss=self.settings.keep_loss))

    @cached_property
    def plain(self) -> CapturedModule:
        """What is written, in the model's precision: its tensors are the ones that weights are made of."""
        return self.as_called(self.written)

    @cached_property
    def graph(self) -> CapturedModule:
        """What is written."""
        return self.in_its_dtype(self.plain)

    @property
    def is_cast(self) -> bool:
        """Whether that is in another precision than the model."""
        return self.graph is not self.plain

    @property
    def dtype(self) -> torch.dtype:
        """The file's precision."""
        return precision(self.graph)

    @cached_property
    def example(self) -> Example:
        """What to trace and compare with."""
        step = self.captured.step
        captured = (self.trained if step is None else step).meta.get("example")
        given = self.settings.example_inputs if step is None else None
        return find_example(self.plain, captured, given, self.settings.precision if self.is_cast else None)

    @cached_property
    def packing(self) -> Plan:
        """Which weights are to be packed."""
        return plan_packing(self.plain, self.source, self.settings.weight_format)

    def source(self, name: str) -> Fold | Tensor:
        """What a tensor of the file is made of."""
        tensor = written_source(self.plain, self.graph, name)
        return self._held.get(id(tensor), tensor)

    @cached_property
    def _held(self) -> dict[int, Fold | Tensor]:
        return {id(get_path(self.written, name)): value for name, value in self.folds.items()}

    def express(self, graph: CapturedModule, packing: Plan) -> Translation:
        """A graph like :attr:`graph` in ONNX."""
        opset = self.settings.opset
        if opset is None and self.dtype is torch.bfloat16:
            opset = BFLOAT16_OPSET
        made: Callable[..., Translation] = translate if self.captured.step is None else translate_step
        return made(graph, self.example.traced, self.example.dims, opset, packing)

    def tolerance(self, packing: Plan) -> Tolerance:
        """How far numbers may be off."""
        default, given = TOLERANCES[read_as(packing, self.dtype)], self.settings
        return Tolerance(
            default.atol if given.atol is None else given.atol,
            default.rtol if given.rtol is None else given.rtol,
        )

    def warnings(self, translation: Translation) -> list[str]:
        """What the file does not take though the model does, and what its graph leaves out."""
        fixed = [f"{place} came out fixed: the file takes this size only" for place in translation.fixed]
        fixed += [
            f"dimension {dim} of '{name}' is fixed at {size}: the model's code was traced for that size only"
            for name, sizes in self.graph.signature.fixed.items()
            for dim, size in sizes.items()
        ]
        note = None if self.captured.twin is None else self.captured.twin.meta.get("note")
        return [*fixed, *dense_notes(translation.dense), *([] if note is None else [note])]
