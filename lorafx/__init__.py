"""lorafx: rewrites a PyTorch model's graph to train with low-rank adapters and folds them away again.

gm = lorafx.apply(model, lorafx.LoraSpec(r=16, alpha=32))    # a torch.fx.GraphModule
...                                                          # any training loop
report = lorafx.merge_and_export(gm, "model.onnx")           # a verified ONNX file
"""

from __future__ import annotations

from lorafx.adapters import (
    AdapterInfo,
    add_adapter,
    delete_adapter,
    disable_adapters,
    list_adapters,
    merge,
    rename_adapter,
    set_adapter,
    set_adapter_names,
    unmerge,
)
from lorafx.api import apply, plan
from lorafx.arithmetic.combine import combine_adapters, convert
from lorafx.arithmetic.extract import Extraction, extract_adapter
from lorafx.arithmetic.report import FactorReport
from lorafx.checkpoint import load_checkpoint, save_checkpoint
from lorafx.deploy import export_checkpoint
from lorafx.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    CheckpointWarning,
    ExportError,
    FixedDimensionWarning,
    FrozenHeadWarning,
    InputError,
    LorafxError,
    LoweringError,
    MatchError,
    MergeError,
    NotFiniteError,
    ParityError,
    PassError,
    QuantizationError,
    SpecError,
    VerifyError,
)
from lorafx.export.diff import OnnxDifference, diff_onnx
from lorafx.export.export import export_base, merge_and_export
from lorafx.export.load import open_session
from lorafx.export.merge_onnx import MergeReport, merge_onnx
from lorafx.export.multi import MultiReport
from lorafx.export.prove import Proof, verify_onnx
from lorafx.export.report import ExportReport
from lorafx.export.runtime import AdapterSession
from lorafx.inspection.inspect import inspect_adapter
from lorafx.inspection.plot import plot_inspection
from lorafx.inspection.report import Inspection
from lorafx.ir import Site, sites
from lorafx.multi import export_multi
from lorafx.packed_files import packed_state_dict
from lorafx.passes.allocate import Allocation, allocate_ranks, with_ranks
from lorafx.passes.deviation import Deviation, merge_deviation
from lorafx.passes.explain import Explanation, explain
from lorafx.passes.initialize import initialize
from lorafx.passes.lower import lower
from lorafx.passes.merge import merged_state_dict, unadapted
from lorafx.passes.plan import Plan
from lorafx.passes.quantize import quantize
from lorafx.pretrained import load_pretrained
from lorafx.rank_scheduler import RankScheduler
from lorafx.spec import LoraSpec
from lorafx.state import adapter_state_dict, load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "AdapterSession",
    "Allocation",
    "CaptureError",
    "CheckpointError",
    "CheckpointWarning",
    "Deviation",
    "Explanation",
    "ExportError",
    "ExportReport",
    "Extraction",
    "FactorReport",
    "FixedDimensionWarning",
    "FrozenHeadWarning",
    "InputError",
    "Inspection",
    "LoraSpec",
    "LorafxError",
    "LoweringError",
    "MatchError",
    "MergeError",
    "MergeReport",
    "MultiReport",
    "NotFiniteError",
    "OnnxDifference",
    "ParityError",
    "PassError",
    "Plan",
    "Proof",
    "QuantizationError",
    "RankScheduler",
    "Site",
    "SpecError",
    "VerifyError",
    "adapter_state_dict",
    "add_adapter",
    "allocate_ranks",
    "apply",
    "combine_adapters",
    "convert",
    "delete_adapter",
    "diff_onnx",
    "disable_adapters",
    "explain",
    "export_base",
    "export_checkpoint",
    "export_multi",
    "extract_adapter",
    "initialize",
    "inspect_adapter",
    "list_adapters",
    "load_adapter",
    "load_checkpoint",
    "load_pretrained",
    "lower",
    "merge",
    "merge_and_export",
    "merge_deviation",
    "merge_onnx",
    "merged_state_dict",
    "open_session",
    "packed_state_dict",
    "plan",
    "plot_inspection",
    "quantize",
    "rename_adapter",
    "save_adapter",
    "save_checkpoint",
    "set_adapter",
    "set_adapter_names",
    "sites",
    "unadapted",
    "unmerge",
    "verify_onnx",
    "with_ranks",
]
