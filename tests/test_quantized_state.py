"""What is saved of a graph on a quantized base, and what comes back: states, copies, pickles, checkpoints, adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lorafx
from conftest import randomize
from lorafx import AdapterError, LoraSpec, QuantizationError
from lorafx.bases import FORMATS
from lorafx.bases.tensor import QuantizedTensor
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from tolerances import assert_close

X = torch.linspace(-1, 1, 5 * 66).view(5, 66)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(66, 40), nn.Tanh(), nn.Linear(40, 24))


def adapted(base: str | None = "nf4", seed: int = 0) -> CapturedModule:
    """Two adapted layers on a model of that seed."""
    return lorafx.apply(model(seed), LoraSpec(r=3, target_modules=["0", "2"], base=base), X, seed=0)


def trained(base: str | None = "nf4") -> CapturedModule:
    gm = adapted(base)
    randomize(gm)
    return gm


def first(gm: nn.Module) -> QuantizedTensor:
    found = gm.get_parameter("0.weight")
    assert isinstance(found, QuantizedTensor)
    return found


def address(gm: nn.Module) -> int:
    return first(gm).packed.tensors["codes"].data_ptr()


def packed(original: nn.Module, base: str = "nf4") -> nn.Module:
    """The model itself with packed weights, as a checkpoint gives it."""
    for layer in original.modules():
        if isinstance(layer, nn.Linear):
            weight = QuantizedTensor(FORMATS[base].quantize(layer.weight.detach()))
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return original


@pytest.mark.parametrize("base", FORMATS)
def test_a_state_dict_brings_the_packed_bytes_and_the_adapter(base: str) -> None:
    """Equal bytes stay shared with the user's model; others are the graph's own, and the model keeps what it had."""
    gm, models = trained(base), [packed(model(seed), base) for seed in (0, 1)]
    targets = [lorafx.apply(one, LoraSpec(r=3, target_modules=["0", "2"]), X, seed=0) for one in models]
    before = [first(one).dequantize() for one in models]
    for target in targets:
        target.load_state_dict(gm.state_dict())
        assert torch.equal(target(X), gm(X))
    assert [address(one) == address(target) for one, target in zip(models, targets, strict=True)] == [True, False]
    assert all(torch.equal(first(one).dequantize(), old) for one, old in zip(models, before, strict=True))


def by_deepcopy(gm: CapturedModule) -> CapturedModule:
    return copy.deepcopy(gm)


def by_pickle(gm: CapturedModule) -> CapturedModule:
    found = pickle.loads(pickle.dumps(gm))  # noqa: S301  # our own
    assert isinstance(found, CapturedModule)
    return found


def by_torch_save(gm: CapturedModule) -> CapturedModule:
    """A state dict, read as torch.load reads it unless told: running no code of the file's."""
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    assert file.tell() < sum(t.nbytes for t in gm.state_dict().values())
    file.seek(0)
    other = adapted()
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize("by", [by_deepcopy, by_pickle, by_torch_save])
def test_copies(by: Callable[[CapturedModule], CapturedModule]) -> None:
    gm = trained()
    found = by(gm)
    assert torch.equal(found(X), gm(X))
    assert format_graph(found) == format_graph(gm)
    assert address(found) != address(gm)
    found(X).sum().backward()
    assert found.get_parameter("0.lora_A.default").grad is not None
    assert lorafx.merged_state_dict(found)["0.weight"].equal(lorafx.merged_state_dict(gm)["0.weight"])


def test_a_file_with_damaged_sizes_is_refused() -> None:
    gm = adapted()
    first(gm).packed.tensors["absmax"].resize_(1)
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    with pytest.raises(QuantizationError, match="absmax is"):
        torch.load(file)


@pytest.mark.parametrize("save", [save_model, lambda gm, path: save_file(gm.state_dict(), path)])
def test_what_safetensors_cannot_write_it_is_told_of(save: Callable[[nn.Module, str], None], tmp_path: Path) -> None:
    with pytest.raises(
        QuantizationError, match=r"stored as nf4.*save_adapter .LoraTrainer.*save_checkpoint.*torch\.save"
    ):
        save(trained(), str(tmp_path / "model.safetensors"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("other", [None, "int8"])
def test_a_state_of_another_form_is_refused_before_anything_is_loaded(other: str | None) -> None:
    gm = trained()
    before = gm(X)
    with pytest.raises(QuantizationError, match=r"'0\.weight' is stored as nf4.*save_adapter and load_adapter"):
        gm.load_state_dict(trained(other).state_dict())
    assert torch.equal(gm(X), before)


def test_a_dense_graph_takes_the_dequantised_values() -> None:
    gm, dense = trained(), adapted(None, seed=1)
    dense.load_state_dict(gm.state_dict())
    assert torch.equal(dense.get_parameter("0.weight"), first(gm).dequantize())
    assert_close("layer", dense(X), gm(X))


@pytest.mark.parametrize(("there", "here"), [(None, "nf4"), ("nf4", None), ("nf4", "int8")])
def test_adapters_move_between_bases(there: str | None, here: str | None, tmp_path: Path) -> None:
    """In PEFT's format; what they add is the same on any base."""
    gm, other = trained(there), adapted(here)
    lorafx.save_adapter(gm, tmp_path)
    lorafx.load_adapter(other, tmp_path)
    found, expected = (lorafx.adapter_state_dict(one) for one in (other, gm))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert lorafx.apply(model(), tmp_path, X).get_parameter("0.weight").dtype == torch.float32


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    gm, other = trained(), adapted()
    optimizers = [torch.optim.AdamW([p for p in one.parameters() if p.requires_grad]) for one in (gm, other)]

    def step(one: CapturedModule, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        one(X).square().sum().backward()
        optimizer.step()

    step(gm, optimizers[0])
    lorafx.save_checkpoint(gm, tmp_path, optimizers[0], step=1)
    assert lorafx.load_checkpoint(other, tmp_path, optimizers[1]) == 1
    for one, optimizer in zip((gm, other), optimizers, strict=True):
        step(one, optimizer)
    assert torch.equal(other(X), gm(X))
    for wrong in (adapted(None), adapted("int8"), adapted(seed=1)):
        with pytest.raises(AdapterError, match=r"base weight '0\.weight' has other values"):
            lorafx.load_checkpoint(wrong, tmp_path)


def test_what_trains_whole_is_dense(tmp_path: Path) -> None:
    """``modules_to_save`` of a quantized layer: a copy of it, dequantised, since codes cannot train."""
    spec = LoraSpec(r=3, target_modules=["0"], modules_to_save=["2"])
    gm, other = (lorafx.apply(packed(model()), spec, X, seed=0) for _ in range(2))
    own = gm.get_parameter("_adapters.default.2.weight")
    assert not isinstance(own, QuantizedTensor)
    assert torch.equal(own, gm.get_parameter("2.weight").dequantize())
    gm(X).square().sum().backward()
    assert own.grad is not None
    randomize(gm)
    lorafx.save_adapter(gm, tmp_path)
    lorafx.load_adapter(other, tmp_path)
    assert torch.equal(other(X), gm(X))


def test_memory_that_processes_share() -> None:
    gm = trained()
    expected = gm(X).detach()
    gm.share_memory()
    assert first(gm).is_shared()
    assert torch.equal(gm(X), expected)


def test_data_parallel_training_leaves_packed_weights_where_they_are(tmp_path: Path) -> None:
    gm, alone = trained(), trained()
    alone.load_state_dict(gm.state_dict())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(gm)
        parallel(X).sum().backward()
    finally:
        dist.destroy_process_group()
    alone(X).sum().backward()
    found, expected = (one.get_parameter("0.lora_A.default").grad for one in (gm, alone))
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(found, expected)
