"""Every error lorafx raises on purpose, and what it warns of.

All derive from :class:`LorafxError`, so ``except lorafx.LorafxError`` catches what the library
refuses and nothing else. A message says what was wrong, where (which site, field or file), what was
expected, and what to do; it is raised before anything is changed.
"""

from __future__ import annotations


class LorafxError(Exception):
    """Base class of the errors raised by lorafx."""


class SpecError(LorafxError, ValueError):
    """A :class:`~lorafx.spec.LoraSpec` field, or a config read as one, has a value that is not allowed."""


class CaptureError(LorafxError):
    """The model could not be turned into a graph, or one of its modes could not be reconciled."""


class InputError(CaptureError, TypeError):
    """A captured graph was called with other inputs than those it was captured with."""


class MatchError(LorafxError):
    """The spec's targets do not describe layers of this model, or describe layers that cannot be adapted."""


class PassError(LorafxError):
    """A graph pass failed or was run on a graph in the wrong stage. Names the pass."""


class VerifyError(PassError):
    """A graph breaks the rules of its stage: see :func:`lorafx.ir.verify`."""


class LoweringError(LorafxError):
    """No provider of that name, or it cannot serve a layer: see :func:`lorafx.explain`."""


class MergeError(LorafxError):
    """An adapter cannot be folded into the weights (for instance: it holds NaN or Inf)."""


class AdapterError(LorafxError):
    """An adapter on disk does not fit the graph, or cannot be read or written."""


class CheckpointError(LorafxError):
    """The weights of a model on disk cannot be read, or do not fit the model."""


class NotFiniteError(LorafxError):
    """A weight of the model, whose name is in ``weight``, holds NaN or Inf, and so would what is made of it."""

    def __init__(self, weight: str) -> None:
        self.weight = weight
        super().__init__(
            f"weight '{weight}' holds NaN or Inf: its file was damaged, or its training diverged. Copy the checkpoint "
            "again, or go back to an earlier one (numbers that are meant so, as a mask's, belong into a buffer)"
        )


class QuantizationError(LorafxError):
    """A weight cannot be stored in a base format, or what is stored is damaged."""


class ExportError(LorafxError):
    """The ONNX file could not be written."""


class ParityError(ExportError):
    """The exported file is not the twin of the graph it came from: structure or numbers differ."""


class FixedDimensionWarning(UserWarning):
    """A dimension that was meant to be dynamic came out fixed, or limited to large sizes."""


class FrozenHeadWarning(UserWarning):
    """A head that looks freshly initialised gets no adapter and does not train."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds tensors that its model has no place for, and that are not read."""
