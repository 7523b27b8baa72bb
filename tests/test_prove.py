"""The proof that a file is another one with an adapter merged: it passes for a merge and fails for anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, helper
from torch import Tensor

import lorafx
from onnx_files import chain, delta, lora, make_model, save, save_adapter, stored, weights

LAYERS = ("l.0.q", "l.0.v", "l.1.q", "l.1.v")
ADAPTED = ("l.0.q", "l.1.q")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 48


def files(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
    """The base, the adapter of half of its layers, and the merged file."""
    base = save(chain(LAYERS, WIDTH, dtype), tmp_path / "base.onnx", outside=True)
    adapter = save_adapter(tmp_path / "adapter", lora(ADAPTED, WIDTH, WIDTH))
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx", verify=False)
    return base, adapter, tmp_path / "merged.onnx"


def rewrite(path: Path, change: Callable[[ModelProto], None]) -> Path:
    """A copy of a file with something changed."""
    model = onnx.load(path)
    change(model)
    copy = path.with_name("changed.onnx")
    onnx.save(model, copy)
    return copy


def put(name: str, tensor: Tensor) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        next(t for t in model.graph.initializer if t.name == name).CopyFrom(stored(name, tensor))

    return change


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_proved_and_any_last_bit_would_be_seen(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter, merged = files(tmp_path, dtype)
    proof = lorafx.verify_onnx(merged, base, adapter)
    assert proof.passed
    assert (len(proof.merged), proof.unchanged) == (2, 2)
    assert proof.worst is not None
    assert 0.5 < proof.worst.error <= 1.0
    assert proof.seen > (0.99999 if dtype == torch.float32 else 0.99)
    assert "2 initializers have the base's bits, 2 are merged" in str(proof)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_flipped_last_bit_is_seen(tmp_path: Path, dtype: torch.dtype, layer: str) -> None:
    base, adapter, merged = files(tmp_path, dtype)
    name = f"{layer}.weight.T"
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    seen = 0
    for place in range(20):
        tensor = weights(merged)[name]
        tensor.view(integer)[place, 3] ^= 1
        proof = lorafx.verify_onnx(rewrite(merged, put(name, tensor)), base, adapter)
        if not proof.passed:
            seen += 1
            assert proof.failure is not None
            assert f"'{name}'" in proof.failure
    # Of half types a few may be within what float32 arithmetic loses of the middle of two numbers.
    assert seen == 20 if dtype == torch.float32 or layer not in ADAPTED else seen >= 19


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("alpha off by 1 %", "is off by .* times what is allowed"),
        ("a missing layer", r"'l\.1\.q\.weight\.T' \(lora r=2, scaling 2\) is off by"),
        ("merged twice", "is off by"),
        ("one layer more", r"'l\.0\.v\.weight\.T' is not the base's, and the adapter does not change it"),
        ("rounded twice", "is off by"),
        ("NaN", "is off by inf"),
    ],
)
def test_planted_faults_of_values_are_found(tmp_path: Path, dtype: torch.dtype, fault: str, message: str) -> None:
    base, adapter, merged = files(tmp_path, dtype)
    tensors, name = lora(ADAPTED, WIDTH, WIDTH), "l.1.q.weight.T"
    old, change = weights(base)[name].double(), delta(lora(ADAPTED, WIDTH, WIDTH), "l.1.q").mT
    if fault == "alpha off by 1 %":
        other = save_adapter(tmp_path / "other", tensors, alpha=4.04)
        lorafx.merge_onnx(base, other, tmp_path / "changed.onnx")
    elif fault == "merged twice":
        lorafx.merge_onnx(merged, adapter, tmp_path / "changed.onnx")
    elif fault == "one layer more":
        lorafx.merge_onnx(merged, save_adapter(tmp_path / "other", lora(["l.0.v"], 48, 48)), tmp_path / "changed.onnx")
    elif fault == "rounded twice":
        coarse = torch.bfloat16 if dtype != torch.bfloat16 else torch.float16
        rewrite(merged, put(name, (old + change).to(coarse).to(dtype)))
    else:
        exact = old if fault == "a missing layer" else torch.full_like(old, torch.nan)
        rewrite(merged, put(name, exact.to(dtype)))
    proof = lorafx.verify_onnx(tmp_path / "changed.onnx", base, adapter)
    assert not proof.passed
    with pytest.raises(lorafx.ParityError, match=message):
        proof.raise_if_failed()
    assert str(proof).startswith("NOT PROVED")


def test_a_failure_names_the_worst_first(tmp_path: Path) -> None:
    """Wherever it stands in the file, and however many others are wrong."""
    paths = [f"l.{i}" for i in range(9)]
    base = save(chain(paths), tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", lora(paths[:7]))
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    after = weights(tmp_path / "merged.onnx")

    def spoil(model: ModelProto) -> None:
        for index, path in enumerate(paths):
            put(f"{path}.weight.T", after[f"{path}.weight.T"] * (1.5 if index == 5 else 1.001))(model)

    proof = lorafx.verify_onnx(rewrite(tmp_path / "merged.onnx", spoil), base, adapter)
    assert proof.worst is not None
    assert proof.worst.name == "l.5.weight.T"
    assert str(proof).startswith(
        f"NOT PROVED: initializer 'l.5.weight.T' (lora r=2, scaling 2) is off by {proof.worst.error:.4g} times what is "
        "allowed, the worst of 7; "
    )
    assert "(and 3 more); initializer 'l.7.weight.T' is not the base's" in str(proof)


def rename(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "renamed"


def more_nodes(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["y0"], ["z"], name="more"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("axis", 1)), "node 0 .* attributes"),
        (
            lambda m: m.graph.node[2].attribute[0].CopyFrom(helper.make_attribute("alpha", 0.5)),
            "attribute alpha is 0.5",
        ),
        (rename, "renamed"),
        (more_nodes, "node 4"),
        (lambda m: m.graph.initializer.reverse(), "the list of initializers"),
        (lambda m: m.opset_import[0].__setattr__("version", 19), "opset_imports"),
        (lambda m: m.__setattr__("ir_version", 9), "their ir_version"),
    ],
)
def test_planted_faults_of_the_graph_are_found(
    tmp_path: Path, change: Callable[[ModelProto], None], message: str
) -> None:
    model = chain(LAYERS)
    model.graph.node[2].op_type = "Gemm"
    model.graph.node[2].attribute.append(helper.make_attribute("alpha", 1.0))
    base = save(model, tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", lora(ADAPTED))
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    proof = lorafx.verify_onnx(rewrite(tmp_path / "merged.onnx", change), base, adapter)
    with pytest.raises(lorafx.ParityError, match=f"the graphs differ: .*{message}"):
        proof.raise_if_failed()


def test_labels_are_no_part_of_the_proof(tmp_path: Path) -> None:
    base, adapter, merged = files(tmp_path)

    def label(model: ModelProto) -> None:
        model.producer_name = model.doc_string = "another"
        model.graph.node[0].metadata_props.add(key="k", value="v")

    assert lorafx.verify_onnx(rewrite(merged, label), base, adapter).passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_dora_is_proved_where_rows_cancel_and_where_they_do_not(
    tmp_path: Path, dtype: torch.dtype, scale: float
) -> None:
    tensors = lora(["a.b"], 40, 64)
    weight = scale * torch.randn(40, 64) - delta(tensors, "a.b").float()  # what is left after A and B is small
    tensors["a.b.lora_magnitude_vector"] = torch.rand(40)
    node = helper.make_node("Gemm", ["x", "a.b.weight"], ["y"], name="/a/b/Gemm", transB=1)
    base = save(make_model([node], {"a.b.weight": weight.to(dtype)}, 64), tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", tensors, use_dora=True)
    report = lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    assert report.proof is not None
    assert report.proof.passed
    after = weights(tmp_path / "merged.onnx")["a.b.weight"]
    moved = (after.float() * 1.02).to(dtype)
    proof = lorafx.verify_onnx(rewrite(tmp_path / "merged.onnx", put("a.b.weight", moved)), base, adapter)
    assert not proof.passed


def dora_files(tmp_path: Path, dtype: torch.dtype) -> tuple[Path, Path, Path, Tensor]:
    """The base, a DoRA of usual size, the merged file, and what its weight is in float64."""
    generator = torch.Generator().manual_seed(5)
    weight = (0.05 * torch.randn(WIDTH, WIDTH, generator=generator)).to(dtype)
    tensors = {name: 0.2 * t for name, t in lora(["a.b"], WIDTH, WIDTH).items()}
    folded = weight.double() + delta(tensors, "a.b")
    tensors["a.b.lora_magnitude_vector"] = (folded.norm(dim=1) * 1.03).float()
    node = helper.make_node("Gemm", ["x", "a.b.weight"], ["y"], name="/a/b/Gemm", transB=1)
    base = save(make_model([node], {"a.b.weight": weight}, WIDTH), tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", tensors, use_dora=True)
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx", verify=False)
    magnitude = tensors["a.b.lora_magnitude_vector"].double()
    return base, adapter, tmp_path / "merged.onnx", folded * (magnitude / folded.norm(dim=1)).unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_last_bit_of_a_dora_is_seen(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wherever the right value is not as good as in the middle of two numbers."""
    base, adapter, merged, exact = dora_files(tmp_path, dtype)
    proof = lorafx.verify_onnx(merged, base, adapter)
    assert proof.passed
    assert proof.seen > (0.9999 if dtype == torch.float32 else 0.99 if dtype == torch.float16 else 0.998)
    after = weights(merged)["a.b.weight"]
    unit = torch.finfo(dtype).eps * torch.exp2(exact.abs().log2().floor())
    off = (after.double() - exact).abs() / unit
    assert float((off > 0.502).double().mean()) < 0.001  # of elements that nearly cancel
    for place in range(0, WIDTH, 3):
        flipped = after.clone()
        flipped.view(torch.int32 if dtype == torch.float32 else torch.int16)[place, 7] ^= 1
        passed = lorafx.verify_onnx(rewrite(merged, put("a.b.weight", flipped)), base, adapter).passed
        assert not passed or float(off[place, 7]) > 0.49


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["magnitude off by 1 %", "alpha off by 1 %", "not rescaled", "missing", "twice"])
def test_planted_faults_of_a_dora_are_found(tmp_path: Path, dtype: torch.dtype, fault: str) -> None:
    base, adapter, merged, exact = dora_files(tmp_path, dtype)
    tensors = {name: 0.2 * t for name, t in lora(["a.b"], WIDTH, WIDTH).items()}
    old = weights(base)["a.b.weight"].double()
    folded = old + 1.01 * delta(tensors, "a.b")
    if fault == "twice":
        lorafx.merge_onnx(merged, adapter, tmp_path / "changed.onnx")
    else:
        wrong = {
            "magnitude off by 1 %": exact * 1.01,
            "alpha off by 1 %": folded * (exact.norm(dim=1) / folded.norm(dim=1)).unsqueeze(1),
            "not rescaled": old + delta(tensors, "a.b"),
            "missing": old,
        }[fault]
        rewrite(merged, put("a.b.weight", wrong.to(dtype)))
    with pytest.raises(lorafx.ParityError, match=r"'a\.b\.weight' \(dora r=2, scaling 2\) is off by"):
        lorafx.verify_onnx(tmp_path / "changed.onnx", base, adapter).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_trained_in_float32_are_proved_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """A merge adds their change, in float32."""
    node = helper.make_node("Gather", ["a.b.weight", "i"], ["y"], name="/a/b/Gather")
    model = make_model([node], {"a.b.weight": torch.randn(40, 30).to(dtype)}, 30)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("i", onnx.TensorProto.INT64, ["n"]))
    base = save(model, tmp_path / "base.onnx")
    rows = {"a.b.token_adapter.trainable_tokens_delta": torch.randn(20, 30)}
    adapter = save_adapter(tmp_path / "adapter", rows, trainable_token_indices={"a.b": [*range(20)]})
    report = lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    assert report.proof is not None
    assert report.proof.seen > 0.99


def test_an_adapter_of_another_model_is_an_error(tmp_path: Path) -> None:
    base, _, merged = files(tmp_path)
    with pytest.raises(lorafx.AdapterError, match="no weight of"):
        lorafx.verify_onnx(merged, base, save_adapter(tmp_path / "other", lora(["m.0.q"])))


def test_a_base_that_was_rounded_before_the_merge_is_named_as_a_cause(tmp_path: Path) -> None:
    """What merge_and_export makes with dtype= is the sum rounded once: no merge of a base that was rounded itself."""
    torch.manual_seed(0)
    gm = lorafx.apply(
        torch.nn.Sequential(torch.nn.Linear(32, 32)),
        lorafx.LoraSpec(r=2, target_modules=["0"]),
        (torch.ones(2, 32),),
        seed=0,
    )
    with torch.no_grad():
        gm.get_parameter("0.lora_B.default").normal_(std=0.1)
    lorafx.save_adapter(gm, tmp_path / "adapter")
    for dtype in (None, "bf16"):
        lorafx.export_base(gm, tmp_path / "base.onnx", dtype=dtype, verify=False)
        lorafx.merge_and_export(gm, tmp_path / "merged.onnx", dtype=dtype, verify=False)
        proof = lorafx.verify_onnx(tmp_path / "merged.onnx", tmp_path / "base.onnx", tmp_path / "adapter")
        assert proof.passed == (dtype is None)
        assert ("rounded to torch.bfloat16 when it was exported" in str(proof)) == (dtype is not None)
