"""What a pass is: it says which stage it needs and which it leaves, and is checked on both sides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lorafx.errors import PassError
from lorafx.graph import CapturedModule
from lorafx.ir import Stage, stage, verify


@dataclass(frozen=True)
class PassResult:
    """A pass's graph, how many sites it changed, and those it left alone with the reason."""

    gm: CapturedModule
    changed: int
    skipped: tuple[tuple[str, str], ...] = ()


_ADVICE = {
    Stage.CAPTURED: "lorafx.apply(model, spec) gives one with adapters",
    Stage.INSERTED: "apply a spec to the model that it was made from",
    Stage.MERGED: "its adapters are folded or gone, and lorafx.export_base writes it as it is",
}


class Pass(ABC):
    """A graph rewrite; a frozen dataclass whose fields are its options.

    ``pass_(gm)`` checks that the graph is in one of the stages of ``requires``, runs, and checks the
    result against ``ensures``.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Stage]]
    ensures: ClassVar[Stage]

    @abstractmethod
    def run(self, gm: CapturedModule) -> PassResult:
        """Rewrite; the graph has been verified and the result will be."""

    def __call__(self, gm: CapturedModule) -> PassResult:
        now = stage(gm)
        if now not in self.requires:
            wanted = " or ".join(sorted(s.value for s in self.requires))
            raise PassError(f"{self.name}: needs a graph that is {wanted}, this one is {now.value}; {_ADVICE[now]}")
        verify(gm, now)
        result = self.run(gm)
        result.gm.meta["stage"] = self.ensures
        result.gm.recompile()
        result.gm.check()
        verify(result.gm, self.ensures)
        return result
