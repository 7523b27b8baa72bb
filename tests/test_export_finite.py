"""Weights that hold NaN or Inf are refused while they are written; what cannot be seen so, a digest tells."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorafx
from lorafx import LoraSpec
from lorafx.errors import CheckpointError, ExportError, NotFiniteError
from lorafx.kernels.rounding import _round_into, all_finite
from lorafx.shards import INDEX_NAME, WEIGHTS_NAME

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An adapted and a plain weight, one that is stored transposed, and a mask that is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("mask", torch.tensor([0.0] * 7 + [-torch.inf]))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        return (self.down(self.up(x)) * self.scale + self.mask).softmax(-1)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapted(model: nn.Module, variant: str = "lora") -> lorafx.CapturedModule:
    gm = lorafx.apply(model, LoraSpec(r=2, variant=variant, target_modules=["up"]), X, seed=0)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return gm.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The model in two shards, and an adapter."""
    lorafx.save_adapter(adapted(net()), tmp_path / "adapter")
    folder = tmp_path / "base"
    folder.mkdir()
    places = {name: f"{name.startswith('down')}.safetensors" for name in net().state_dict()}
    for file in set(places.values()):
        save_file({n: t for n, t in net().state_dict().items() if places[n] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    return folder


def flip(path: Path, tensor: str, mask: int) -> None:
    """Flip these bits of a tensor's first number, a float32."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    at = 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]
    (bits,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, bits ^ mask)
    path.write_bytes(data)


def exponent(value: Tensor) -> int:
    """The bits to flip of a float32 so that its exponent is all ones."""
    return ~int(value.view(torch.int32)) & 0x7F800000


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("name", ["up.weight", "down.weight", "down.bias", "scale"])
def test_a_flipped_exponent_is_named_with_its_file(name: str, adapter: bool, checkpoint: Path, tmp_path: Path) -> None:
    """Of a one, a single bit is enough. Nothing is left of the export, of either kind of file of weights."""
    mask = exponent(net().state_dict()[name].flatten()[0])
    assert (mask.bit_count() == 1) == (name == "scale")
    file = checkpoint / f"{name.startswith('down')}.safetensors"
    flip(file, name, mask)
    before = sorted(p.name for p in tmp_path.iterdir())
    for external in (True, False):
        with pytest.raises(CheckpointError, match=rf"{file.name}: weight '{name}' holds NaN or Inf: .* Copy"):
            lorafx.export_checkpoint(
                net(),
                checkpoint,
                tmp_path / "adapter" if adapter else None,
                tmp_path / "m.onnx",
                example_inputs=X,
                external_data=external,
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_flipped_mantissa_is_another_model(checkpoint: Path, tmp_path: Path) -> None:
    """Which nothing in the files contradicts: the digest of the base's weights that another export has does."""
    known = lorafx.merge_and_export(adapted(net()), tmp_path / "m.onnx").provenance["base_sha256"]

    def export(base_sha256: str | None) -> str:
        report = lorafx.export_checkpoint(
            net(), checkpoint, tmp_path / "adapter", tmp_path / "m.onnx", example_inputs=X, base_sha256=base_sha256
        )
        found: str = report.provenance["base_sha256"]
        return found

    assert export(known.upper()) == known
    flip(checkpoint / "True.safetensors", "down.weight", 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ExportError, match=rf"have the SHA-256 (?!{known}).*{known}.* Nothing was written"):
        export(known)
    with pytest.raises(ExportError, match=r"base_sha256='1234' is no SHA-256 .*report\.provenance"):
        export("1234")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert export(None) != known


def test_one_file_is_named_too(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / WEIGHTS_NAME)
    flip(tmp_path / WEIGHTS_NAME, "scale", 1 << 30)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_NAME}: weight 'scale' holds NaN"):
        lorafx.export_checkpoint(net(), tmp_path, None, tmp_path / "m.onnx", example_inputs=X)


def damaged(name: str, value: float) -> Net:
    model = net()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_of_a_model_in_memory(value: float, tmp_path: Path) -> None:
    model = damaged("down.weight", value)
    exports = (
        lambda: lorafx.export_base(model, tmp_path / "m.onnx", example_inputs=X),
        lambda: lorafx.merge_and_export(adapted(model), tmp_path / "m.onnx"),
        lambda: lorafx.export_multi(adapted(model), tmp_path / "m.onnx"),
    )
    for export in exports:
        with pytest.raises(NotFiniteError, match=r"weight 'down\.weight' holds NaN or Inf"):
            export()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapted_weight(variant: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging refuses it too, whatever folds, and whether or not a NaN spreads through a whole row."""
    if not compiled:
        monkeypatch.setattr("lorafx.kernels.rounding.round_into", _round_into)
    gm = adapted(damaged("up.weight", torch.nan), variant)
    for act in (lambda: lorafx.merge(gm), lambda: lorafx.merge_and_export(gm, tmp_path / "m.onnx")):
        with pytest.raises(NotFiniteError, match=r"weight 'up\.weight' holds NaN or Inf"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_what_an_adapter_trained_whole(tmp_path: Path) -> None:
    gm = lorafx.apply(net(), LoraSpec(r=2, target_modules=["up"], modules_to_save=["down"]), X, seed=0).eval()
    with torch.no_grad():
        gm.get_parameter("_adapters.default.down.weight")[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"weight 'down\.weight' holds NaN or Inf"):
        lorafx.merge_and_export(gm, tmp_path / "m.onnx")


def test_a_bias_with_shifts(tmp_path: Path) -> None:
    gm = lorafx.apply(
        damaged("up.bias", torch.nan), LoraSpec(r=2, variant="lora_bias", target_modules=["up"]), X, seed=0
    )
    with pytest.raises(NotFiniteError, match=r"weight 'up\.bias' holds NaN or Inf"):
        lorafx.merge_and_export(gm.eval(), tmp_path / "m.onnx")


def test_what_a_smaller_dtype_does_not_have(tmp_path: Path) -> None:
    """It was infinite in the file before, without a word; in a buffer that is a mask's way to say so."""
    model = damaged("down.weight", 1e5)
    with pytest.raises(
        ExportError, match=r"weight 'down\.weight' does not fit in torch\.float16: .* beyond 6\.55e\+04"
    ):
        lorafx.export_base(model, tmp_path / "m.onnx", example_inputs=X, dtype="fp16", verify=False)
    assert list(tmp_path.iterdir()) == []
    lorafx.export_base(model, tmp_path / "m.onnx", example_inputs=X, dtype="bf16", verify=False)


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    model = net()
    report = lorafx.merge_and_export(adapted(model), tmp_path / "m.onnx")
    assert "same numbers" in report.checks
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert held["mask"][-1] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_all_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.empty(0, dtype=dtype))
    for size in (1, 3, 100, 5000):
        tensor = torch.full((size,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        tensor[0] = torch.finfo(dtype).min
        assert all_finite(tensor)
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = tensor.clone()
            bad[size // 2] = value
            assert not all_finite(bad)
