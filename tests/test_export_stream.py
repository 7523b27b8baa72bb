"""Streamed writing: the same graph to the byte, weights folded piece by piece, in the precision and files asked for."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, randomize
from lorafx import ExportError, LoraSpec, MergeError
from lorafx.export.cast import capture_in, cast_graph
from lorafx.export.export import export_base, merge_and_export
from lorafx.export.weights import PIECE, Stored
from lorafx.export.write import lay_out, parse_size
from lorafx.graph import CapturedModule, get_path
from lorafx.ir import active_layers
from lorafx.kernels.rounding import Rounding, round_once
from lorafx.passes.fold import TILE, Fold
from lorafx.passes.inference import inference
from lorafx.passes.merge import changed_tensors, merge, merge_lazily
from tolerances import assert_rounded_once
from zoo import FAMILIES

#: Beyond one tile in both directions, and no multiple of it.
WIDE, LONG = TILE + 44, 2 * TILE + 13


class Net(nn.Module):
    """A layer of each way that weights lie in a file: read by rows, transposed, kernels, one shared by two layers."""

    def __init__(self, width: int = 24, length: int = 30) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.up = nn.Linear(width, length)
        self.down = nn.Linear(length, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.head(x.mean(1))
        return out


IDS = {"input_ids": torch.arange(12).reshape(2, 6)}


def adapted(spec: LoraSpec | None = None, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> CapturedModule:
    torch.manual_seed(0)
    gm = lorafx.apply(Net().eval().to(dtype), LoraSpec(r=3) if spec is None else spec, IDS, seed=0)
    randomize(gm, scale)
    return gm


@pytest.fixture(scope="module")
def gm() -> CapturedModule:
    return adapted()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    """The file, offset and length of each initializer that lies outside."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.external_data:
            at = {e.key: e.value for e in tensor.external_data}
            found[tensor.name] = (at["location"], int(at["offset"]), int(at["length"]))
    return found


# The fold.


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panels_are_the_whole_in_either_direction(variant: str, dtype: torch.dtype) -> None:
    """Bit for bit, beyond a tile; and each weight is the exact sum, rounded once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(LONG, WIDE), nn.Linear(WIDE, LONG, bias=False)).to(dtype)
    gm = lorafx.apply(model, LoraSpec(r=5, variant=variant, target_modules=["0", "1"]), torch.randn(2, LONG).to(dtype))
    randomize(gm, 0.05)
    for found in active_layers(gm).values():
        fold = Fold.of(gm, found, get_path(gm, found[0].weight).detach())
        whole = fold.compute()
        assert torch.equal(torch.cat([*fold.panels()]), whole)
        assert torch.equal(torch.cat([*fold.panels((1, 0))]), whole.t())
        assert max(p.shape[0] for p in fold.panels((1, 0))) == TILE
        assert torch.equal(whole, get_path(merge(gm), found[0].weight))
        if variant == "lora":
            a, b = (p.detach().double() for p in found[0].parameters(gm).values())
            exact = fold.weight.double() + found[0].scaling * (b @ a)
            assert_rounded_once(whole, exact, fold.weight.double(), r=5)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "convnet", "mlp"])
def test_every_kind_of_layer_streams_what_merge_computes(zoo: Zoo, name: str) -> None:
    """Stored transposed, as kernels, as stacks of experts; in any order of dimensions."""
    family = FAMILIES[name]
    spec = LoraSpec(r=2, target_parameters=["experts.down_proj"]) if name == "mixtral" else LoraSpec(r=2)
    gm = zoo.adapted(family, spec)
    randomize(gm)
    merged = merge(gm)
    for weight, fold in changed_tensors(gm).items():
        assert isinstance(fold, Fold)
        expected = get_path(merged, weight)
        for order in itertools.permutations(range(expected.dim())):
            flat = torch.cat([p.reshape(-1) for p in fold.panels(order)])
            assert torch.equal(flat, expected.permute(order).reshape(-1))


def test_pieces_of_plain_tensors_in_any_order() -> None:
    tensor = torch.arange(PIECE // 2, dtype=torch.int32).reshape(-1, 64, 32)
    for order in (None, *itertools.permutations(range(3))):
        pieces = list(Stored(tensor, tensor.dtype).panels(order))
        assert len(pieces) > 1 or order is not None
        wanted = tensor if order is None else tensor.permute(order)
        assert torch.equal(torch.cat([p.reshape(-1) for p in pieces]), wanted.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float64_is_rounded_once_to_half_types(dtype: torch.dtype) -> None:
    """Just beside a tie, by less than float32 can tell: torch's own cast goes to the wrong side of half of them."""
    step = torch.finfo(dtype).eps
    ties = 1 + step * (torch.arange(16, dtype=torch.float64) + 0.5)
    exact = torch.cat([ties - 2.0**-40, ties + 2.0**-40, ties])
    exact = torch.cat([exact, -exact])
    found = round_once(exact, dtype).double()
    below, above = (exact / step).floor() * step, (exact / step).ceil() * step
    nearer = torch.where((exact - below).abs() < (above - exact).abs(), below, above)
    even = torch.where((below / step) % 2 == 0, below, above)
    wanted = torch.where((exact - below) == (above - exact), even, nearer)
    assert torch.equal(found, wanted)
    assert not torch.equal(exact.to(dtype).double(), wanted)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e300, 1e-320], dtype=torch.float64)
    assert torch.equal(round_once(special, dtype), special.to(dtype))


def test_rounding_says_how_much_of_a_change_survives() -> None:
    """Below half a unit nothing does; in float32 all."""
    torch.manual_seed(0)
    weight = torch.randn(40, 50).bfloat16().double()
    change = 1e-3 * torch.randn(40, 50)
    stored = torch.empty(40, 50, dtype=torch.bfloat16)
    rounding = Rounding()
    rounding.round(stored, weight + change, weight)
    error = stored.double() - weight - change
    assert rounding.largest == pytest.approx(float(error.abs().max()))
    assert rounding.relative == pytest.approx(float(error.norm() / change.norm()))
    assert 0.5 < rounding.relative < 5.0
    lost = Rounding()
    lost.round(stored, weight * (1 + 1e-5), weight)
    assert (lost.survived, lost.relative) == (pytest.approx(0.0), pytest.approx(1.0))


# The same graph to the byte.


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"modules_to_save": ["head", "norm"]}], ids=str)
def test_base_and_merged_graphs_are_the_same_bytes(fields: dict[str, object], tmp_path: Path) -> None:
    """With one name for the weights: only the bytes of what is adapted differ, at the same offsets."""
    gm = adapted(LoraSpec(r=3, target_modules=["up", "conv"], **fields))  # type: ignore[arg-type]
    for folder in ("base", "merged"):
        (tmp_path / folder).mkdir()
    base = export_base(gm, tmp_path / "base" / "model.onnx", data_name="weights.data")
    merged = merge_and_export(gm, tmp_path / "merged" / "model.onnx", data_name="weights.data")
    assert base.onnx_sha256 == merged.onnx_sha256 == digest(tmp_path / "merged" / "model.onnx")
    assert digest(tmp_path / "base" / "model.onnx") == base.onnx_sha256
    laid = places(tmp_path / "merged" / "model.onnx")
    assert {file for file, _, _ in laid.values()} == {"weights.data"}
    one, other = ((tmp_path / f / "weights.data").read_bytes() for f in ("base", "merged"))
    assert len(one) == len(other)
    differing = {n for n, (_, at, size) in laid.items() if one[at : at + size] != other[at : at + size]}
    expected = {"up.weight.T", "conv.weight"}
    expected |= {"up.bias", "conv.bias", "norm.bias", "head.bias"} if fields.get("bias") else set()
    expected |= {"head.weight", "head.bias", "norm.weight", "norm.bias"} if fields.get("modules_to_save") else set()
    assert differing == expected
    assert merged.bytes_changed == sum(laid[name][2] for name in expected)
    assert {r.weight for r in merged.rounding} == {"up.weight", "conv.weight"}
    assert all(abs(r.survived - 1) < 1e-4 and r.relative < 1e-4 for r in merged.rounding)


def test_another_process_writes_the_same_bytes(gm: CapturedModule, tmp_path: Path) -> None:
    """The graph of a base exported elsewhere, and its weights: nothing hangs on hashes, addresses, what ran before."""
    here = merge_and_export(gm, tmp_path / "model.onnx", data_name="weights.data", verify=False)
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom test_export_stream import adapted, digest\n"
        "from lorafx.export.export import export_base, merge_and_export\n"
        "gm, folder = adapted(), Path(sys.argv[1])\nfolder.mkdir()\n"
        "merge_and_export(gm, folder / 'model.onnx', data_name='weights.data', verify=False)\n"
        "print(digest(folder / 'model.onnx'), digest(folder / 'weights.data'))\n"
        "(folder / 'base').mkdir()\n"
        "print(export_base(gm, folder / 'base' / 'model.onnx', data_name='weights.data', verify=False).onnx_sha256)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "theirs")]
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}", "PYTHONHASHSEED": "7"}
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.stdout.split() == [here.onnx_sha256, digest(tmp_path / "weights.data"), here.onnx_sha256]


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 40), nn.Linear(40, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids))
        return out


def test_a_weight_kept_apart_is_written_apart(tmp_path: Path) -> None:
    """A tied model untied: the layer's own weight is folded when it is written, and the file says the same as merge."""

    gm = lorafx.apply(Tied().eval(), LoraSpec(r=2, target_modules=["head"], tied="untie"), IDS)
    randomize(gm)
    report = merge_and_export(gm, tmp_path / "model.onnx")
    assert report.checks["same graph"].startswith("but for the weights kept apart as asked (head)")
    (rounding,) = report.rounding
    written = ir.load(tmp_path / "model.onnx").graph.initializers
    merged = merge(gm).state_dict()
    stored = written[f"{rounding.weight}.T"].const_value
    assert stored is not None
    assert np.array_equal(stored.numpy(), merged[rounding.weight].t().numpy())


def test_a_weight_kept_apart_stays_apart_where_it_is_equal(tmp_path: Path) -> None:
    """An adapter at its start leaves the layer's own weight equal to the other one: the graph does not notice."""
    gm = lorafx.apply(Tied().eval(), LoraSpec(r=2, target_modules=["head"], tied="untie"), IDS)
    reports = []
    for name in ("start", "trained"):
        (tmp_path / name).mkdir()
        reports.append(merge_and_export(gm, tmp_path / name / "model.onnx", data_name="weights.data"))
        randomize(gm)
    assert reports[0].onnx_sha256 == reports[1].onnx_sha256
    assert reports[0].initializers == 2


def test_what_is_merged_in_place_is_written(tmp_path: Path) -> None:
    gm = adapted(LoraSpec(r=3, target_modules=["up"]))
    before = merge_and_export(gm, tmp_path / "before.onnx", external_data=False)
    lorafx.merge(gm, inplace=True)
    after = merge_and_export(gm, tmp_path / "after.onnx", external_data=False)
    assert after.onnx_sha256 == before.onnx_sha256
    assert list(after.provenance["adapters"]) == ["default"]


# Precision.


def written_as(path: Path) -> dict[str, Tensor]:
    """The initializers of a file."""
    found = {}
    for name, value in ir.load(path).graph.initializers.items():
        assert value.const_value is not None
        assert value.dtype is not None
        data = bytearray(value.const_value.tobytes())
        tensor = torch.frombuffer(data, dtype=ir.tensor_adapters.to_torch_dtype(value.dtype))
        found[name] = tensor.reshape(value.const_value.shape.numpy())
    return found


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("float32", "fp16"), ("float32", "bf16"), ("bfloat16", "fp32"), ("bfloat16", "fp16"), ("float16", "bf16")],
)
def test_dtype_of_the_file(given: str, wanted: str, tmp_path: Path) -> None:
    """The graph is that of the converted model, the weights are the exact sums rounded once, numbers are compared."""
    gm = adapted(dtype=getattr(torch, given), scale=0.1)
    report = merge_and_export(gm, tmp_path / "model.onnx", dtype=wanted)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    assert f"torch.{report.precision}" == str(dtype)
    assert len(report.parity) >= 3
    found = written_as(tmp_path / "model.onnx")
    for site in lorafx.sites(gm):
        a, b = (p.detach().double() for p in site.parameters(gm).values())
        weight = site.matrix(get_path(gm, site.weight).detach()).double()
        stored = found.get(f"{site.weight}.T")
        stored = found[site.weight] if stored is None else stored.t()
        assert_rounded_once(site.matrix(stored), weight + site.scaling * (b @ a), weight, r=3)
    for folder in ("direct", "cast"):
        (tmp_path / folder).mkdir()
    direct = lorafx.apply(Net().eval().to(dtype), LoraSpec(r=3), IDS)
    theirs = export_base(direct, tmp_path / "direct" / "model.onnx", data_name="weights.data", verify=False)
    ours = merge_and_export(
        gm, tmp_path / "cast" / "model.onnx", dtype=wanted, data_name="weights.data", opset=theirs.opset, verify=False
    )
    assert ours.onnx_sha256 == theirs.onnx_sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shifted_bias_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """A scaling that is no power of two, and sums within a unit of float32 of the middle of two numbers."""
    model = nn.Sequential(nn.Linear(4, 512)).to(dtype)
    bias = model[0].bias
    assert isinstance(bias, nn.Parameter)
    nn.init.zeros_(bias)
    x = torch.randn(2, 4).to(dtype)
    gm = lorafx.apply(model, LoraSpec(r=3, alpha=16, variant="lora_bias", target_modules=["0"]), (x,))
    randomize(gm)
    (site,) = lorafx.sites(gm)
    ties = 1 + torch.finfo(torch.bfloat16).eps * (torch.arange(512, dtype=torch.float64) % 128 + 0.5)
    shift = site.parameters(gm)["lora_B_bias"]
    with torch.no_grad():
        shift.copy_(ties / site.scaling)
    exact = shift.detach().double() * site.scaling
    assert torch.equal(merge(gm).state_dict()["0.bias"], round_once(exact, dtype))
    for wanted in ("bf16", "fp16", "fp32"):
        merge_and_export(gm, tmp_path / "model.onnx", dtype=wanted, verify=False)
        found = written_as(tmp_path / "model.onnx")["0.bias"]
        assert torch.equal(found, round_once(exact, found.dtype))
    lorafx.merge(gm, inplace=True)
    assert torch.equal(merge(gm).state_dict()["0.bias"], round_once(exact, dtype))


class Casting(nn.Module):
    """Asks for float32, and for the dtype of its input, as language models' norms do; also both in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        out: Tensor = self.fc(wide.to(before))
        out = out.float().exp().to(before)
        return torch.softmax(out, -1, dtype=torch.float32).to(x.dtype)


def test_a_float32_graphs_casts_are_told_by_their_code(tmp_path: Path) -> None:
    """float32 where the code names it, float16 where it asks for the dtype of something."""
    gm = lorafx.apply(Casting().eval(), LoraSpec(r=2, target_modules=["fc"]), torch.randn(2, 8))
    randomize(gm)
    twin = capture_in(gm, torch.float16)
    assert twin is not None
    graph = cast_graph(inference(lorafx.unadapted(gm)), inference(twin)).graph
    dtypes = [a for n in graph.nodes for a in n.args if isinstance(a, torch.dtype)]
    assert dtypes == [torch.float32, torch.float16] * 3
    assert len(merge_and_export(gm, tmp_path / "model.onnx", dtype="fp16").parity) >= 3


def test_what_cannot_be_converted_is_refused_by_name() -> None:
    gm = lorafx.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()), {"r": 1, "target_modules": ["0"]})
    with pytest.raises(ExportError, match="the model's weights have several dtypes"):
        capture_in(gm, torch.float16)
    with pytest.raises(ExportError, match=r"dtype='fp8' is none of 'fp32', "):
        merge_and_export(gm, "never.onnx", dtype="fp8")


def test_a_weight_that_overflows_the_files_dtype_is_an_error(tmp_path: Path) -> None:
    gm = adapted()
    with torch.no_grad():
        for parameter in lorafx.sites(gm)[0].parameters(gm).values():
            parameter.fill_(1e3)
    with pytest.raises(MergeError, match=r"does not fit in torch.float16 \(it overflows to Inf\)"):
        merge_and_export(gm, tmp_path / "model.onnx", dtype="fp16")
    assert list(tmp_path.iterdir()) == []


# Files.


def test_files_of_a_limited_size(gm: CapturedModule, tmp_path: Path) -> None:
    report = merge_and_export(gm, tmp_path / "model.onnx", max_shard_size="4KB")
    laid = places(tmp_path / "model.onnx")
    sizes = {Path(p).name: Path(p).stat().st_size for p in report.data_paths}
    assert {file for file, _, _ in laid.values()} == set(sizes)
    assert len(sizes) == 4
    assert all(size <= 4000 for size in sizes.values())
    assert report.data_bytes == sum(sizes.values())
    merge_and_export(gm, tmp_path / "model.onnx", external_data=True, verify=False)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ExportError, match=r"cannot all be called w\.data, nor be replaced at one moment"):
        merge_and_export(gm, tmp_path / "model.onnx", max_shard_size=4000, data_name="w.data")


def test_files_of_the_same_bytes_are_one(tmp_path: Path) -> None:
    first, second = nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False)
    second.load_state_dict(first.state_dict())
    model, x = nn.Sequential(first, nn.ReLU(), second), torch.randn(2, 30)
    report = export_base(model, tmp_path / "model.onnx", example_inputs=x, max_shard_size=3600)
    assert len(report.data_paths) == 1
    session = ort.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {"input": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)


def test_sizes_are_numbers_of_bytes() -> None:
    assert [parse_size(s) for s in (None, 7, "500MB", "2GiB", "1.5k")] == [None, 7, 500 * 10**6, 2**31, 1500]
    for bad in ("many", "0", "-1GB", ""):
        with pytest.raises(ExportError, match="is no size: give a number of bytes"):
            parse_size(bad)


def test_layout_depends_on_shapes_only() -> None:
    values = []
    for index, count in enumerate((3, 100, 1, 70)):
        value = ir.Value(name=str(index), shape=ir.Shape([count]), type=ir.TensorType(ir.DataType.FLOAT))
        value.const_value = ir.tensor(np.zeros(count, np.float32))
        values.append(value)
    assert [(p.file, p.offset, p.length) for p in lay_out(values)] == [
        (0, 0, 12),
        (0, 64, 400),
        (0, 512, 4),
        (0, 576, 280),
    ]
    assert [(p.file, p.offset) for p in lay_out(values, 350)] == [(0, 0), (1, 0), (2, 0), (2, 64)]


def test_weights_of_another_graph_are_not_overwritten(gm: CapturedModule, tmp_path: Path) -> None:
    merge_and_export(gm, tmp_path / "model.onnx", data_name="weights.data", verify=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        ExportError, match=r"weights\.data exists, and .*other\.onnx is not there: .* another data_name="
    ):
        merge_and_export(gm, tmp_path / "other.onnx", data_name="weights.data", verify=False)
    with pytest.raises(ExportError, match=r"weights\.data exists, and .*model\.onnx is another graph"):
        merge_and_export(gm, tmp_path / "model.onnx", data_name="weights.data", verify=False, opset=22)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for bad in ("../weights.data", "/weights.data", "", "model.onnx"):
        with pytest.raises(ExportError, match="must be the name of a file beside"):
            merge_and_export(gm, tmp_path / "model.onnx", data_name=bad)


def test_progress_of_writing_is_by_bytes(gm: CapturedModule, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    merge_and_export(gm, tmp_path / "model.onnx", external_data=True, verify=False, progress=lambda *s: seen.append(s))
    written = [share for phase, share in seen if phase == "write"]
    assert written == sorted(written)
    assert len(written) > 6
    assert written[-1] == 1.0


def test_provenance_has_no_place(gm: CapturedModule, tmp_path: Path) -> None:
    report = merge_and_export(gm, tmp_path / "model.onnx")
    assert report.provenance["lorafx"] == lorafx.__version__
    assert report.provenance["adapters"]["default"]["specs"][0]["r"] == 3
    assert str(tmp_path) not in json.dumps(report.provenance)
    again = merge_and_export(gm, tmp_path / "again.onnx").provenance
    assert again == report.provenance
    other = adapted(scale=0.2)
    changed = merge_and_export(other, tmp_path / "model.onnx").provenance
    assert changed["base_sha256"] == report.provenance["base_sha256"]
    assert changed["adapters"]["default"]["sha256"] != report.provenance["adapters"]["default"]["sha256"]


def test_lazily_merged_graphs_hold_the_bases_weights() -> None:
    gm = adapted()
    graph, folds = merge_lazily(gm)
    assert "folds" not in graph.meta
    assert set(folds) == {s.weight for s in lorafx.sites(gm)}
    assert all(get_path(graph, n).data_ptr() == get_path(gm, n).data_ptr() for n in folds)


# Memory.

_PEAK = """
import sys, threading, time, torch, lorafx
from pathlib import Path
def anonymous():
    text = Path("/proc/self/status").read_text()
    return 1024 * sum(int(l.split()[1]) for l in text.splitlines() if l.startswith(("RssAnon", "RssShmem")))
torch.manual_seed(0)
width = 2048
layers = [torch.nn.Linear(width, width, bias=False) for _ in range(12)]
gm = lorafx.apply(torch.nn.Sequential(*layers).eval(), {"r": 4, "target_modules": "all-linear"}, torch.randn(2, width))
with torch.no_grad():
    for p in gm.parameters():
        if p.requires_grad:
            p.normal_(std=0.02)
small = lorafx.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), {"target_modules": ["0"]}, torch.randn(2, 8))
def export(gm, name):
    lorafx.merge_and_export(gm, Path(sys.argv[1]) / name, external_data=True, verify=False)
export(small, "small.onnx")  # what is loaded once
peak, running = [0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
export(gm, "model.onnx")
running[0] = False
print(peak[0] - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_an_export_holds_a_few_pieces(tmp_path: Path) -> None:
    """Peak memory where 201 MB are folded, transposed and written: at most 3 times the largest tensor and 24 MiB."""
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", _PEAK, str(tmp_path)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert int(ran.stdout) <= 3 * 2048 * 2048 * 4 + 24 * 2**20
