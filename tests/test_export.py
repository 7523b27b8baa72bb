"""Export: a file is the twin of what torch exports of the user's own module, or it gets no name."""

from __future__ import annotations

import copy
import dataclasses
import getpass
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves, randomize, same, train
from lorafx.errors import ExportError, InputError, MergeError, ParityError
from lorafx.export import check, export, parity, verify
from lorafx.export.commit import Draft
from lorafx.export.compare import compare
from lorafx.export.diff import diff_onnx
from lorafx.export.export import merge_and_export
from lorafx.export.parity import TOLERANCES, NoKernelError, difference
from lorafx.export.translate import Translation, structure, translate
from lorafx.export.weights import fill
from lorafx.graph import CapturedModule, get_path
from lorafx.passes.fold import Fold
from lorafx.passes.inference import inference
from lorafx.passes.merge import merge, merge_lazily, unadapted
from zoo import FAMILIES, Family

FLOAT32 = TOLERANCES[torch.float32]


class Net(nn.Module):
    """A small model with what matters to an export: a norm, weights used in expressions, a loss, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 30)
        self.down = nn.Linear(30, 12, bias=False)
        self.gain = nn.Parameter(0.1 * torch.randn(12))
        self.head = nn.Linear(12, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1).to(self.gain.dtype)
        x = x + self.down(torch.relu(self.up(self.norm(x)))) * (self.gain + 1)
        outputs = {"logits": self.head(x.mean(1))}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(outputs["logits"], labels)
        return outputs


def inputs(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    mask = (torch.arange(length) < length - torch.arange(batch)[:, None] % 2).long()
    return {"input_ids": torch.arange(batch * length).reshape(batch, length) % 20, "attention_mask": mask}


@cache
def fresh(dtype: torch.dtype = torch.float32, labelled: bool = False) -> CapturedModule:
    labels = {"labels": torch.tensor([0, 2])} if labelled else {}
    spec = lorafx.LoraSpec(r=3, modules_to_save=["head"])
    return lorafx.apply(Net().eval().to(dtype), spec, {**inputs(), **labels})


def adapted(dtype: torch.dtype = torch.float32, labelled: bool = False) -> CapturedModule:
    """The net with adapters (and a head) that are not at their first values."""
    gm = copy.deepcopy(fresh(dtype, labelled))
    randomize(gm)
    return gm


def translated(gm: CapturedModule, example: Mapping[str, Tensor], dims: Mapping[str, Any] | None = None) -> Translation:
    graph = inference(gm)
    found = translate(graph, example, graph.signature.dims if dims is None else dims)
    fill(found.weights, found.folded, lambda name: get_path(graph, name))
    return found


def run_onnx(path: Path, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {i.name: feed[i.name].numpy() for i in session.get_inputs()})
    return {o.name: torch.from_numpy(v) for o, v in zip(session.get_outputs(), found, strict=True)}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# The family tests: what leads to the file, and the file.


def test_inference_graph_is_eval_mode_without_labels(zoo: Zoo, family: Family) -> None:
    gm = zoo.captured(family).train()
    graph = inference(gm)
    assert gm.training
    assert not graph.training
    assert graph.signature.placeholders == tuple(family.inputs())
    assert "loss" not in graph.signature.outputs
    assert [n for n in graph.graph.nodes if n.target is lorafx.graph.by_mode] == []
    tensors = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (gm, graph))
    assert all(a is b for a, b in zip(*(t.values() for t in tensors), strict=True))
    gm.eval()
    with torch.no_grad():
        for sample in (family.inputs(), family.other_inputs()):
            assert same(list(leaves(graph(**sample))), [t for t in leaves(gm(**sample)) if t is not None])


def test_export_is_what_torch_exports_of_the_users_own_module(zoo: Zoo, family: Family) -> None:
    """Node by node, values of weights and constants included, against torch's export with its optimizer.

    Only the convolutional net is held to torch's unoptimized export brought through the same finish: torch's
    optimizer folds BatchNorm's statistics into the convolutions, which depends on values.
    """
    sample = family.inputs()
    ours = translated(zoo.captured(family), sample, dims={}).model
    folds_norms = family.name == "convnet"
    program = torch.onnx.export(
        zoo.eager(family), (), kwargs=sample, dynamo=True, verbose=False, optimize=not folds_norms
    )
    assert program is not None
    theirs = program.model
    if folds_norms:
        values = {n: v.const_value for n, v in theirs.graph.initializers.items()}
        for value in theirs.graph.initializers.values():
            value.const_value = None
        optimize_ir(theirs)
        for name, value in theirs.graph.initializers.items():
            value.const_value = values.get(name, value.const_value)
    assert compare(ours, theirs, names=False, by_value=lambda value: True) is None


def test_trained_model_exports_as_the_bases_twin(zoo: Zoo, family: Family, tmp_path: Path) -> None:
    """The whole way for each family; and an independent translation of the base gives the very bytes that
    the merged one has, but for the weights."""
    gm = zoo.trained(family)[0]
    report = merge_and_export(gm, tmp_path / "merged.onnx")
    assert report.sites == len(lorafx.sites(gm))
    assert report.warnings == ()
    assert [p.passed for p in report.parity] == [True] * len(report.parity)
    assert len(report.parity) >= 3

    again = translated(unadapted(gm), family.inputs()).model
    written = ir.load(tmp_path / "merged.onnx")
    for name, value in again.graph.initializers.items():
        value.const_value = written.graph.initializers[name].const_value
    assert ir.to_proto(again).SerializeToString(deterministic=True) == (tmp_path / "merged.onnx").read_bytes()

    found = run_onnx(tmp_path / "merged.onnx", family.other_inputs())
    with torch.no_grad():
        expected = leaves(inference(gm)(**family.other_inputs()))
    assert tuple(found) == report.outputs
    for (name, value), reference in zip(found.items(), expected, strict=True):
        assert difference(name, reference.numpy(), value.numpy(), FLOAT32).passed


@pytest.mark.xdist_group("mixtral")
def test_routers_named_as_targets_go_the_whole_way(zoo: Zoo, tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate"]
    gm = zoo.adapted(family, lorafx.LoraSpec(r=4, alpha=8, target_modules=names))
    losses = train(gm, family, steps=3)
    assert losses[-1] < losses[0]
    routers = [s for s in lorafx.sites(gm) if s.name.endswith("gate")]
    assert len(routers) == 2
    assert all(bool(s.parameters(gm)["lora_B"].any()) for s in routers)
    report = merge_and_export(gm.eval(), tmp_path / "model.onnx")
    assert all(row.passed for row in report.parity)


# One small model, everything else.


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[CapturedModule, Path, lorafx.export.report.ExportReport]:
    torch.manual_seed(0)
    gm = adapted()
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return gm, path, merge_and_export(gm, path)


def test_names_are_the_ones_users_know(exported: tuple[CapturedModule, Path, Any]) -> None:
    gm, path, report = exported
    model = ir.load(path)
    assert report.inputs == {"input_ids": "[batch,sequence]", "attention_mask": "[batch,sequence]"}
    assert [v.name for v in model.graph.outputs] == ["logits"]
    assert model.graph.outputs[0].shape == ir.Shape(["batch", 3])
    named = {n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT and v.shape}
    weights = {n for n in merge(gm).state_dict() if not n.endswith(("up.weight", "down.weight", "gain"))}
    assert named == {*weights, "up.weight.T", "down.weight.T", "gain.Add"}
    scopes = {n.metadata_props["pkg.torch.onnx.name_scopes"] for n in model.graph if n.op_type == "MatMul"}
    assert any("'up'" in scope for scope in scopes)


def test_nothing_of_the_machine_is_in_the_file(exported: tuple[CapturedModule, Path, Any]) -> None:
    data = exported[1].read_bytes()
    traces = [
        str(Path.home()),
        str(Path(__file__).parent),
        str(Path(torch.__file__).parent),
        ".py",
        "stack_trace",
    ]
    if len(getpass.getuser()) > 4:
        traces.append(getpass.getuser())
    assert [t for t in traces if t.encode() in data] == []


def test_report_says_what_ran_and_saves_as_json(exported: tuple[CapturedModule, Path, Any], tmp_path: Path) -> None:
    _, path, report = exported
    assert report.path == str(path)
    assert report.onnx_bytes == path.stat().st_size
    assert [p.sizes for p in report.parity] == [
        {"batch": 2, "sequence": 6},
        {"batch": 1, "sequence": 1},
        {"batch": 5, "sequence": 13},
        {"batch": 1, "sequence": 13},
    ]
    assert 0 < report.max_abs < 1e-5
    text = str(report)
    for part in (
        "same graph",
        "same weights",
        "random batch=5 sequence=13",
        "1e-06 + 0.0001 * largest",
        "up",
    ):
        assert part in text or part == "up"
    report.save_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["parity"][2]["outputs"][0]["output"] == "logits"
    assert saved == report.to_dict()


def test_exports_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Names and orders, capture's and torch's, must not hang on hashes or addresses."""
    code = """
import lorafx, torch
from lorafx.export.export import merge_and_export
torch.manual_seed(0)
layers = torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 2)
example = torch.arange(6).reshape(2, 3)
gm = lorafx.apply(torch.nn.Sequential(*layers).eval(), {"r": 2, "target_modules": ["2", "4"]}, example, seed=0)
merge_and_export(gm, path, verify=False)
"""
    theirs, ours = tmp_path / "theirs.onnx", tmp_path / "ours.onnx"
    command = [sys.executable, "-c", f"path = {str(theirs)!r}\n{code}"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    exec(code, {"path": ours})
    assert ours.read_bytes() == theirs.read_bytes()


def test_graph_depends_on_structure_not_on_values() -> None:
    """Equal, zero and one weights are what optimizers merge and drop; the names and nodes must not notice."""
    model = Net().eval()
    gm = lorafx.graph.share(lorafx.api.captured(model, inputs(), None))
    first = translated(gm, inputs()).model
    before = structure(inference(gm))
    with torch.no_grad():
        for parameter in model.parameters():  # shares its storage with the graph
            parameter.fill_(0.0)
        model.norm.weight.fill_(1.0)
    second = translated(gm, inputs()).model
    assert compare(first, second) is None
    assert structure(inference(gm)) == before
    names = set(second.graph.initializers)
    assert {"up.bias", "head.bias", "norm.bias", "norm.weight"} <= names


def test_tied_weights_are_stored_once(zoo: Zoo) -> None:
    """Above the size at which a transposed copy is cheap, as in torch's own optimizer."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(300, 40)
            self.head = nn.Linear(40, 300, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embed(input_ids))
            return logits

    sample = {"input_ids": torch.arange(6).reshape(2, 3)}
    model = translated(lorafx.api.captured(Tied().eval(), sample, None), sample).model
    assert [v.shape for v in model.graph.initializers.values()] == [ir.Shape([300, 40])]


def test_loss_is_exported_only_when_asked(tmp_path: Path) -> None:
    gm = adapted(labelled=True)
    plain = merge_and_export(gm, tmp_path / "plain.onnx")
    kept = merge_and_export(gm, tmp_path / "kept.onnx", keep_loss=True)
    assert ("labels" in plain.inputs, plain.outputs) == (False, ("logits",))
    assert ("labels" in kept.inputs, kept.outputs) == (True, ("logits", "loss"))
    with pytest.raises(ExportError, match=r"no example for labels: pass example_inputs="):
        merge_and_export(gm, tmp_path / "no.onnx", keep_loss=True, example_inputs=inputs())


def test_symbolic_graph_needs_examples(tmp_path: Path) -> None:
    gm = lorafx.apply(nn.Sequential(nn.Linear(5, 7), nn.ReLU()), {"r": 2, "target_modules": ["0"]})
    randomize(gm)
    with pytest.raises(ExportError, match=r"traced without example inputs, and ONNX needs some: pass example_inputs="):
        merge_and_export(gm, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="missing: input"):
        merge_and_export(gm, tmp_path / "model.onnx", example_inputs=())
    assert files(tmp_path) == {}
    report = merge_and_export(gm, tmp_path / "model.onnx", example_inputs=torch.randn(1, 5))
    assert report.inputs == {"input": "[batch,5]"}
    assert [p.sizes["batch"] for p in report.parity] == [1, 1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """float16 runs as it is; bfloat16, for which ONNX Runtime has no kernels, as its float32 twin."""
    report = merge_and_export(adapted(dtype), tmp_path / "model.onnx")
    kind = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16}[dtype]
    written = ir.load(tmp_path / "model.onnx")
    assert written.graph.initializers["up.weight.T"].dtype == kind
    assert {p.ran for p in report.parity} == {"its float32 twin" if dtype is torch.bfloat16 else "the file"}
    assert ("not run" in report.checks) is (dtype is torch.bfloat16)
    assert (report.precision, report.rtol) == (str(dtype).removeprefix("torch."), TOLERANCES[dtype].rtol)
    assert list(files(tmp_path)) == ["model.onnx"]


def test_float16_without_kernels_runs_as_its_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Choosy(parity.Session):
        def __init__(self, path: Path, ran: str) -> None:
            if ran == "the file":
                raise NoKernelError("none")
            super().__init__(path, ran)

    monkeypatch.setattr(verify, "Session", Choosy)
    report = merge_and_export(adapted(torch.float16), tmp_path / "model.onnx")
    assert {(p.ran, p.reference) for p in report.parity} == {("its float32 twin", "unmerged, in float32")}
    assert "no float16" in report.checks["not run"]
    with pytest.raises(NoKernelError):
        verify.open_runtime(tmp_path / "model.onnx", adapted(), torch.float32, tmp_path)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    gm = adapted()
    path = tmp_path / "model.onnx"
    report = merge_and_export(gm, path, external_data=True)
    (data,) = tmp_path.glob("model.onnx.*.data")
    assert report.data_path == str(data)
    stored = onnx.load(path, load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in stored.graph.initializer if t.external_data]
    assert {p["location"] for p in places} == {data.name}
    assert all(int(p["offset"]) % 64 == 0 for p in places)
    merge_and_export(gm, tmp_path / "inline.onnx", external_data=False)
    assert diff_onnx(path, tmp_path / "inline.onnx").same
    assert same(run_onnx(path, inputs()), run_onnx(tmp_path / "inline.onnx", inputs()))

    randomize(gm)
    merge_and_export(gm, path, external_data=True)
    (newer,) = tmp_path.glob("model.onnx.*.data")
    assert newer.name != data.name


# What must not get a name.


def wrong_weights(gm: CapturedModule, *choice: Any) -> tuple[CapturedModule, dict[str, Fold | Tensor]]:
    graph, folds = merge_lazily(gm, *choice)
    wrong = folds["up.weight"]
    assert isinstance(wrong, Fold)
    return graph, {**folds, "up.weight": wrong.compute() * 1.01}


def other_graph(gm: CapturedModule) -> CapturedModule:
    other = unadapted(gm)
    (relu,) = other.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.sigmoid.default
    other.recompile()
    return other


def flipped_bit(draft: Draft, model: ir.Model, *rest: Any) -> None:
    value = model.graph.initializers["up.weight.T"]
    held = value.const_value
    assert held is not None
    array = held.numpy().copy()
    array.view(np.uint32)[3, 4] ^= 1
    value.const_value = ir.tensor(array)
    Draft.write(draft, model, *rest)
    value.const_value = held


@pytest.mark.parametrize(
    ("target", "name", "planted", "message"),
    [
        (
            export,
            "merge_lazily",
            wrong_weights,
            r"unmerged torch graph disagree on example .*'logits' by 0\.\d+ .* allowed",
        ),
        (
            check,
            "unadapted",
            other_graph,
            r"not the graph of the base .*Relu.*op_type is 'Relu' .* 'Sigmoid'",
        ),
        (Draft, "write", flipped_bit, r"initializer 'up.weight.T' in the file is not the tensor"),
    ],
    ids=["wrong weight", "other graph", "flipped bit"],
)
def test_what_fails_a_check_leaves_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    planted: Callable[..., Any],
    message: str,
) -> None:
    gm = adapted()
    merge_and_export(gm, tmp_path / "model.onnx", verify=False, external_data=True)
    before = files(tmp_path)
    assert len(before) == 2
    original = getattr(target, name)

    def once(*args: Any) -> Any:
        monkeypatch.setattr(target, name, original)
        return planted(*args)

    monkeypatch.setattr(target, name, once)
    randomize(gm)
    with pytest.raises(ParityError, match=message):
        merge_and_export(gm, tmp_path / "model.onnx", external_data=True)
    assert files(tmp_path) == before


def test_nan_in_an_adapter_is_an_error(tmp_path: Path) -> None:
    gm = adapted()
    with torch.no_grad():
        next(p for p in gm.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(MergeError, match="NaN"):
        merge_and_export(gm, tmp_path / "model.onnx")
    assert files(tmp_path) == {}


def test_paths_that_cannot_be_written(tmp_path: Path, exported: tuple[CapturedModule, Path, Any]) -> None:
    gm = exported[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"No such file or directory. Give a path in a folder that exists"):
        merge_and_export(gm, tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(ExportError, match="Not a directory"):
        merge_and_export(gm, tmp_path / "file" / "model.onnx")
    with pytest.raises(ExportError, match="it is a directory; give the name of a file in it"):
        merge_and_export(gm, tmp_path)
    for none in ("", None):
        with pytest.raises(ExportError, match="is no path to write to"):
            merge_and_export(gm, none)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="example_inputs are of type int: give a tuple"):
        merge_and_export(gm, tmp_path / "m.onnx", example_inputs=5)  # type: ignore[arg-type]
    assert list(files_and_folders(tmp_path)) == ["file"]


def files_and_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_disk_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = adapted()
    merge_and_export(gm, tmp_path / "model.onnx", verify=False)
    before = files(tmp_path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    randomize(gm)
    with pytest.raises(ExportError, match="No space left on device"):
        merge_and_export(gm, tmp_path / "model.onnx", external_data=True)
    assert files(tmp_path) == before


def test_what_onnx_cannot_express_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(self.fc(x).unsqueeze(-1) * torch.eye(4))

    gm = lorafx.apply(Odd().eval(), {"r": 2, "target_modules": ["fc"]}, torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"torch cannot express the graph in ONNX: .*linalg_eig"):
        merge_and_export(gm, tmp_path / "model.onnx")
    assert files(tmp_path) == {}


def test_opset_is_the_one_asked_for(tmp_path: Path) -> None:
    assert merge_and_export(adapted(), tmp_path / "model.onnx", opset=22).opset == 22
    with pytest.raises(ExportError, match=r"opset=13 is not available: torch translates this graph to opset 18\."):
        merge_and_export(adapted(), tmp_path / "model.onnx", opset=13)


def test_tolerances_are_the_tables_unless_said_so_in_the_report(tmp_path: Path) -> None:
    gm = adapted()
    with pytest.raises(ParityError, match="disagree on example"):
        merge_and_export(gm, tmp_path / "model.onnx", atol=0.0, rtol=0.0)
    report = merge_and_export(gm, tmp_path / "model.onnx", atol=1.0)
    assert (report.atol, report.rtol) == (1.0, FLOAT32.rtol)
    assert "1 + 0.0001 * largest" in str(report)


def test_progress_names_each_phase_and_ends_at_one(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    merge_and_export(adapted(), tmp_path / "model.onnx", progress=lambda *step: seen.append(step))
    phases = list(dict.fromkeys(name for name, _ in seen))
    assert phases == ["merge", "translate", "write", "compare", "sync"]
    for phase in phases:
        steps = [done for name, done in seen if name == phase]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0.0, 1.0)


def test_a_size_that_torch_refuses_is_reported(tmp_path: Path) -> None:
    """A table's end is no bound that a capture can see."""

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            positions = torch.arange(input_ids.shape[1]) + 0 * input_ids
            rows: Tensor = self.fc(self.table(positions))
            return rows

    gm = lorafx.apply(Short().eval(), {"r": 2, "target_modules": ["fc"]}, torch.zeros(2, 3, dtype=torch.long))
    report = merge_and_export(gm, tmp_path / "model.onnx")
    assert [(p.sizes["sequence"], p.refused is None) for p in report.parity] == [
        (3, True),
        (1, True),
        (7, False),
        (7, False),
    ]
    assert report.warnings[0].startswith("torch itself refuses random batch=5 sequence=7: ")
    assert "nothing: torch refuses this size" in str(report)


# Two files.


def test_reports_are_plain_data(exported: tuple[CapturedModule, Path, Any]) -> None:
    report = exported[2]
    assert dataclasses.replace(report, warnings=("w",)).to_dict()["warnings"] == ["w"]
