"""Which initializer of an ONNX file is which layer of the adapted model: by name, by scope, by order, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import lorafx
from onnx_files import LAYERS, chain, delta, lora, make_model, merged, refused, save, save_adapter, weights


def layer(op: str, name: str = "/a/b/Op", **attributes: Any) -> onnx.ModelProto:
    """One square layer of module ``a.b``, read as the operator reads it."""
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    reader = "a.b.weight"
    nodes = []
    if op == "Transpose, MatMul":
        nodes.append(helper.make_node("Transpose", [reader], ["t"], name="/a/b/Transpose", perm=[1, 0]))
        reader, op = "t", "MatMul"
    if op == "Cast, MatMul":
        nodes.append(helper.make_node("Cast", [reader], ["c"], name="/a/b/Cast", to=TensorProto.FLOAT))
        reader, op = "c", "MatMul"
    first = (reader, "x") if op == "Gemm, first" else ("x", reader)
    nodes.append(helper.make_node(op.removesuffix(", first"), first, ["y"], name=name, **attributes))
    return make_model(nodes, {"a.b.weight": weight}, 6)


@pytest.mark.parametrize(
    ("op", "attributes", "swapped"),
    [
        ("MatMul", {}, True),
        ("Gemm", {}, True),
        ("Gemm", {"transB": 1}, False),
        ("Gemm, first", {}, False),
        ("Gemm, first", {"transA": 1}, True),
        ("Transpose, MatMul", {}, False),
        ("Cast, MatMul", {}, True),
    ],
)
def test_how_a_square_weight_is_stored_is_told_by_its_reader(
    tmp_path: Path, op: str, attributes: dict[str, int], swapped: bool
) -> None:
    model, tensors = layer(op, **attributes), lora(["a.b"])
    save(model, tmp_path / "base.onnx")
    before = weights(tmp_path / "base.onnx")["a.b.weight"].double()
    change = delta(tensors, "a.b")
    after = merged(tmp_path, model, tensors)["a.b.weight"]
    assert torch.equal(after, (before + (change.mT if swapped else change)).float())


@pytest.mark.parametrize("named", ["name", "scope", "nothing"])
def test_layers_are_found_by_name_scope_or_order(tmp_path: Path, named: str) -> None:
    model = chain([f"layers.{i}.proj" for i in range(11)], named=named)
    paths = [f"layers.{i}.proj" for i in range(11)]  # as text, 10 comes before 2
    tensors = lora(paths)
    before = weights(save(model, tmp_path / "base.onnx"))
    after = merged(tmp_path, model, tensors)
    for index, (name, old) in enumerate(before.items()):
        assert torch.equal(after[name], (old.double() + delta(tensors, paths[index]).mT).float())


@pytest.mark.parametrize(
    ("inside", "paths"),
    [("outer.", LAYERS), ("", tuple(f"model.{p}" for p in LAYERS)), ("", LAYERS)],
    ids=["a wrapper", "a part", "the same"],
)
@pytest.mark.parametrize("named", ["name", "scope"])
def test_the_exported_module_may_hold_the_adapted_one_or_be_a_part_of_it(
    tmp_path: Path, inside: str, paths: Sequence[str], named: str
) -> None:
    model, tensors = chain([f"{inside}{p}" for p in LAYERS], named=named), lora(paths)
    before = weights(save(model, tmp_path / "base.onnx"))
    after = merged(tmp_path, model, tensors)
    for path, (name, old) in zip(paths, before.items(), strict=True):
        assert torch.equal(after[name], (old.double() + delta(tensors, path).mT).float())


def test_two_places_for_the_same_modules_are_refused(tmp_path: Path) -> None:
    model = chain([f"{side}.{p}" for side in ("left", "right") for p in LAYERS])
    refused(tmp_path, model, lora(LAYERS), r"several places \(left\., right\.\)")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["l.0.q", "l.1.q"], "3 nameless weights of its shape .*w0, w1, w2.* for 2 layers"),
        (["l.0.q", "l.0.v", "l.1.q"], r"for 3 layers of the adapter \(l\.#\.q, l\.#\.v\)"),
    ],
    ids=["too few", "two kinds"],
)
def test_what_order_alone_cannot_tell_is_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    refused(tmp_path, chain(LAYERS, named="nothing"), lora(paths), message)


@pytest.mark.parametrize("named", ["name", "scope"])
def test_an_adapter_for_other_layers_is_refused(tmp_path: Path, named: str) -> None:
    tensors = lora(["encoder.3.proj", *LAYERS[:2]])
    refused(tmp_path, chain(LAYERS, named=named), tensors, r"no weight of 'encoder\.3\.proj' \(did you mean")
    # Not even where as many of the same shape are there: the graph says that they are others.
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    others = lora([p.replace("encoder", "decoder") for p in LAYERS])
    refused(tmp_path, chain(LAYERS, named=named), others, "the graph has no weight of 'decoder")


def test_a_shared_weight_is_refused_unless_one_layer_reads_it_several_times(tmp_path: Path) -> None:
    model = chain(LAYERS[:2], named="scope")
    model.graph.node[1].input[1] = "w0"
    refused(tmp_path, model, lora(LAYERS[:1]), "initializer 'w0' is shared: .*encoder.0.proj.*encoder.1.proj")
    model.graph.node[1].name = "/encoder/0/proj/MatMul_1"
    merged(tmp_path, model, lora(LAYERS[:1]))


def tied(tensors: dict[str, Tensor]) -> onnx.ModelProto:
    """An embedding and a head with one initializer, and an index of the embedding's rows."""
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], name="/Cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["embed.weight", "i"], ["e"], name="/embed/Gather", axis=0),
        # As optimum ties again what its exporter stored twice.
        helper.make_node("Transpose", ["embed.weight"], ["embed.weight_transposed"], name="Transpose_5"),
        helper.make_node("MatMul", ["e", "embed.weight_transposed"], ["y"], name="/head/MatMul"),
    ]
    return make_model(nodes, tensors, 4)


def test_tied_weights_change_only_where_the_adapter_means_every_use(tmp_path: Path) -> None:
    weight, a, b = torch.randn(9, 6), torch.randn(2, 9), torch.randn(6, 2)
    embedding = {"embed.lora_embedding_A": a, "embed.lora_embedding_B": b}
    refused(tmp_path, tied({"embed.weight": weight}), embedding, "'embed.weight' is shared")
    head = {"head.lora_A.weight": b.mT, "head.lora_B.weight": a.mT}
    after = merged(tmp_path, tied({"embed.weight": weight}), embedding | head, ensure_weight_tying=True)
    assert torch.equal(after["embed.weight"], (weight.double() + 2 * (b.double() @ a.double()).mT).float())
    head["head.lora_B.weight"] = 2 * a.mT
    (tmp_path / "merged.onnx").unlink()
    refused(
        tmp_path, tied({"embed.weight": weight}), embedding | head, "changed more than once", ensure_weight_tying=True
    )


def test_trained_rows_of_an_embedding(tmp_path: Path) -> None:
    weight, rows = torch.randn(9, 6), torch.randn(2, 6)
    tensors = {"embed.token_adapter.trainable_tokens_delta": rows}
    settings = {"trainable_token_indices": {"embed": [7, 3]}}
    after = merged(tmp_path, tied({"embed.weight": weight}), tensors, **settings)["embed.weight"]
    weight[[7, 3]] = rows
    assert torch.equal(after, weight)


#: A layer and a norm, by the names of their nodes: of torch's older exporter (optimum-onnx 0.1.0, Olive 0.13), and with
#: what ONNX Runtime's fusions add. Modules have names that operators have too.
NORMED = {
    "plain": ("a.Conv", "/a/Conv/Gemm", "/a/LayerNorm/LayerNormalization"),
    "again": ("a.LayerNorm.proj", "/a/LayerNorm/proj/Gemm_1", "/a/LayerNorm/LayerNormalization_1"),
    "fused": ("a.proj", "/a/proj/MatMul/MatMulAddFusion", "/a/LayerNorm/Add_1/LayerNormFusion/"),
}


@pytest.mark.parametrize(("path", "product", "norm"), NORMED.values(), ids=NORMED)
def test_a_modules_name_is_told_from_an_operators(tmp_path: Path, path: str, product: str, norm: str) -> None:
    """BERT's ``LayerNorm``: with bias="all", or trained whole."""
    parts = ["a.LayerNorm.weight", "a.LayerNorm.bias"]
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name=product),
        helper.make_node("LayerNormalization", ["h", *parts], ["y"], name=norm, axis=-1),
    ]
    model = make_model(nodes, {"w": torch.eye(6), parts[0]: torch.ones(6), parts[1]: torch.zeros(6)}, 6)
    trained = {part: torch.rand(6) for part in parts}
    tensors = lora([path]) | trained
    after = merged(tmp_path, model, tensors, modules_to_save=["LayerNorm"])
    assert torch.equal(after["w"], (torch.eye(6).double() + delta(tensors, path).mT).float())
    assert all(torch.equal(after[part], trained[part]) for part in parts)


def test_a_norm_that_the_exporter_added_one_to_is_refused(tmp_path: Path) -> None:
    """Gemma's, as onnxruntime-genai 0.18 builds it: nothing but the values tells."""
    norm = "model.layers.0.input_layernorm"
    trained = 0.1 * torch.randn(6, generator=torch.Generator().manual_seed(5))
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", f"{norm}.weight"], ["h"], axis=-1),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="/model/layers.0/mlp/up_proj/MatMul"),
    ]
    layer = {"w": torch.eye(6)}
    plain = make_model(nodes, {f"{norm}.weight": trained + 0.01} | layer, 6)
    tensors = lora(["model.layers.0.mlp.up_proj"]) | {f"{norm}.weight": trained}
    config = {"modules_to_save": ["input_layernorm"]}
    assert torch.equal(merged(tmp_path, plain, tensors, **config)[f"{norm}.weight"], trained)
    (tmp_path / "offset").mkdir()
    offset = make_model(nodes, {f"{norm}.weight": trained + 1.01} | layer, 6)
    message = r"nearer to 1 \+ this tensor .* \(Gemma's\)\. Merge into the model's"
    refused(tmp_path / "offset", offset, tensors, message, **config)


@pytest.mark.parametrize("there", [torch.float16, torch.float32])
def test_an_embedding_that_peft_repeats_may_be_stored_in_fewer_bits(tmp_path: Path, there: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(9, 6, generator=generator)
    given = weight.half() if there is torch.float32 else weight
    tensors = {
        "embed.lora_embedding_A": torch.randn(2, 9, generator=generator),
        "embed.lora_embedding_B": torch.randn(6, 2, generator=generator),
        "embed.base_layer.weight": given,
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], name="/Cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["embed.weight", "i"], ["y"], name="/embed/Gather", axis=0),
    ]
    after = merged(tmp_path, make_model(nodes, {"embed.weight": weight.to(there)}, 4), tensors)["embed.weight"]
    change = 2 * (tensors["embed.lora_embedding_B"].double() @ tensors["embed.lora_embedding_A"].double()).mT
    exact = weight.to(there).double() + change
    assert torch.equal(after, exact.to(there))
    (tmp_path / "other").mkdir()
    tensors["embed.base_layer.weight"] = given + 1
    model = make_model(nodes, {"embed.weight": weight.to(there)}, 4)
    refused(tmp_path / "other", model, tensors, "repeats this weight of the base, and it differs")


SIDES = ("encoder.0.q", "encoder.1.q", "decoder.0.q", "decoder.1.q", "decoder.0.cross")


def sides(names: Sequence[str]) -> onnx.ModelProto:
    return chain(names, named="scope")


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """As optimum-onnx 0.1.0 exports T5: an encoder by itself, and decoders of the whole model, one without the layers
    that only the first step runs."""
    tensors = lora(SIDES)
    adapter = save_adapter(tmp_path / "adapter", tensors)
    files = {"encoder": ("0.q", "1.q"), "decoder": SIDES[2:], "later": SIDES[2:4]}
    for name, there in files.items():
        base, out = save(sides(there), tmp_path / f"{name}.onnx"), tmp_path / f"{name}_merged.onnx"
        with pytest.raises(lorafx.AdapterError, match=r"say which part of it this is \(part=, --part\)"):
            lorafx.merge_onnx(base, adapter, out)
        part = "encoder" if name == "encoder" else "decoder"
        report = lorafx.merge_onnx(base, adapter, out, part=part)
        held = [f"encoder.{n}" if name == "encoder" else n for n in there]
        assert set(report.absent) == {f"site '{path}'" for path in SIDES if path not in held}
        assert f"left out     {report.absent[0]}: not in this part" in str(report)
        before, after = weights(base), weights(out)
        for index, path in enumerate(held):
            exact = before[f"w{index}"].double() + delta(tensors, path).mT
            assert torch.equal(after[f"w{index}"], exact.float())
        proof = lorafx.verify_onnx(out, base, adapter, part=part)
        assert proof.passed
        assert f"{len(SIDES) - len(held)} parts of the adapter are not in this part" in str(proof)


@pytest.mark.parametrize("inside", ["", "stack."])
@pytest.mark.parametrize("side", ["decoder", "model.decoder", "text_model", "question_encoder", "vision_tower.model"])
def test_a_side_does_not_go_into_another_ones_file(tmp_path: Path, side: str, inside: str) -> None:
    """An encoder's file, exported by itself, has the names of a decoder's self-attention too."""
    layers = [f"{inside}{n}" for n in ("0.q", "1.q")]
    base = save(sides(layers), tmp_path / "base.onnx")
    tensors = lora([f"{side}.{n}" for n in layers])
    adapter = save_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lorafx.AdapterError, match=rf"without '{side}\.', so that .* say so \(part='{side}', --part"):
        lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    assert not (tmp_path / "merged.onnx").exists()
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx", part=side)
    before, after = weights(base), weights(tmp_path / "merged.onnx")
    for index, path in enumerate(f"{side}.{n}" for n in layers):
        assert torch.equal(after[f"w{index}"], (before[f"w{index}"].double() + delta(tensors, path).mT).float())


def test_a_part_must_hold_something_of_the_adapter_and_leave_out_nothing_else(tmp_path: Path) -> None:
    base = save(sides(SIDES[2:]), tmp_path / "base.onnx")
    other = save_adapter(tmp_path / "other", lora([*SIDES[:2], "decoder.9.q"]))
    with pytest.raises(lorafx.AdapterError, match=r"nothing of it is in the file: not site 'decoder\.9\.q'"):
        lorafx.merge_onnx(base, other, tmp_path / "merged.onnx", part="decoder")
    adapter = save_adapter(tmp_path / "adapter", lora(SIDES[:2]))
    nameless = save(chain(SIDES[:2], named="nothing"), tmp_path / "nameless.onnx")  # a part keeps no order
    with pytest.raises(lorafx.AdapterError, match="nothing of it is in the file"):
        lorafx.merge_onnx(nameless, adapter, tmp_path / "merged.onnx", part="encoder")
    wide = save(chain(SIDES[:2], 8, named="scope"), tmp_path / "wide.onnx")
    with pytest.raises(lorafx.AdapterError, match="it is an adapter of another model"):
        lorafx.merge_onnx(wide, adapter, tmp_path / "merged.onnx", part="encoder")


@pytest.mark.parametrize(
    ("paths", "part", "message"),
    [
        (SIDES, "vision", r"no layer in a module of this path\. Parts that it has layers in: decoder, encoder$"),
        (SIDES[:2], "decoder", "no layer in a module of this path"),
        ([f"model.{path}" for path in SIDES], "encoder", r"Parts .*: model\.decoder, model\.encoder$"),
        (["model.layers.0.q"], "decoder", "It knows no such parts: leave it out"),
    ],
)
def test_a_part_that_the_adapter_has_no_layer_in_is_refused(
    tmp_path: Path, paths: Sequence[str], part: str, message: str
) -> None:
    """Not a word of it was said where the file has all that the adapter changes."""
    base = save(sides(paths), tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", lora(paths))
    with pytest.raises(lorafx.AdapterError, match=f"part '{part}' .*{message}"):
        lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx", part=part)
    lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx")
    with pytest.raises(lorafx.AdapterError, match=message):
        lorafx.verify_onnx(tmp_path / "merged.onnx", base, adapter, part=part)


def test_a_part_does_not_go_into_another_ones_file(tmp_path: Path) -> None:
    """Whose modules have the paths of the whole model."""
    base = save(sides(SIDES[:2]), tmp_path / "base.onnx")
    adapter = save_adapter(tmp_path / "adapter", lora(SIDES))
    with pytest.raises(lorafx.AdapterError, match="the file is not of part 'decoder', but of encoder"):
        lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx", part="decoder")
    assert set(lorafx.merge_onnx(base, adapter, tmp_path / "merged.onnx", part="encoder").absent) == {
        f"site '{path}'" for path in SIDES[2:]
    }


@pytest.mark.parametrize("op", ["MatMulNBits", "DequantizeLinear"])
def test_quantized_weights_are_refused_with_advice(tmp_path: Path, op: str) -> None:
    if op == "MatMulNBits":
        node = helper.make_node(
            op, ["x", "a.b.weight_Q4", "s"], ["y"], "/a/b/MatMul_Q4", domain="com.microsoft", K=6, N=6
        )
        model = make_model([node], {"a.b.weight_Q4": torch.zeros(6, 1, 16), "s": torch.ones(6)}, 6)
    else:
        nodes = [
            helper.make_node(op, ["a.b.weight", "s"], ["w"], name="/a/b/DequantizeLinear"),
            helper.make_node("MatMul", ["x", "w"], ["y"], name="/a/b/MatMul"),
        ]
        model = make_model(nodes, {"s": torch.ones(())}, 6)
        model.graph.initializer.append(helper.make_tensor("a.b.weight", TensorProto.INT8, [6, 6], [1] * 36))
    refused(tmp_path, model, lora(["a.b"]), f"quantized \\({op} .*quantize the result")


def test_weights_that_branches_of_the_graph_read(tmp_path: Path) -> None:
    """As in the merged decoders that optimum makes: both branches call the same layer."""
    branches = {}
    for name in ("then", "else"):
        node = helper.make_node("MatMul", ["x", "a.b.weight"], [f"{name}_y"], name="/a/b/MatMul")
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        branches[f"{name}_branch"] = helper.make_graph([node], name, [], [out])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], name="m", keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], name="c", to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], name="if", **branches),
    ]
    weight, tensors = torch.randn(6, 6), lora(["a.b"])
    after = merged(tmp_path, make_model(nodes, {"a.b.weight": weight}, 6), tensors)
    assert torch.equal(after["a.b.weight"], (weight.double() + delta(tensors, "a.b").mT).float())


GENAI = ("attn.q_proj", "attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def genai(packed: bool = False, seed: int = 2) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """As onnxruntime-genai's model builder names nodes and weights, and stores them: ``[in, out]``."""
    generator = torch.Generator().manual_seed(seed)
    nodes, tensors, last = [], {}, "x"
    names = ("attn.qkv_proj", *GENAI[1:]) if packed else GENAI
    for place in (*(f"/model/layers.0/{n.replace('.', '/')}" for n in names), "/lm_head"):
        weight = f"{place[1:].replace('/', '.')}.MatMul.weight"
        tensors[weight] = torch.randn(6, 6, generator=generator)
        nodes.append(helper.make_node("MatMul", [last, weight], [f"{place}/MatMul/output_0"], f"{place}/MatMul"))
        last = nodes[-1].output[0]
    bias = "model.layers.0.attn.q_proj.Add.bias"
    tensors[bias] = torch.randn(6, generator=generator)
    first = nodes[0].output[0]
    nodes.insert(1, helper.make_node("Add", [first, bias], ["biased"], "/model/layers.0/attn/q_proj/Add"))
    nodes[2].input[0] = "biased"
    return make_model(nodes, tensors, 6), tensors


def test_the_layout_of_onnxruntime_genais_model_builder(tmp_path: Path) -> None:
    model, before = genai()
    paths = [f"model.layers.0.{'self_' if n.startswith('attn') else ''}{n}" for n in GENAI]
    head, shift = torch.randn(6, 6), torch.randn(6)
    tensors = lora(paths) | {"lm_head.weight": head}
    after = merged(tmp_path, model, tensors, modules_to_save=["lm_head"])
    for name, path in zip(GENAI, paths, strict=True):
        weight = f"model.layers.0.{name}.MatMul.weight"
        assert torch.equal(after[weight], (before[weight].double() + delta(tensors, path).mT).float())
    assert torch.equal(after["lm_head.MatMul.weight"], head.mT)
    tensors = lora(paths[:1]) | {f"{paths[0]}.lora_B.bias": shift}
    bias = merged(tmp_path / "bias", model, tensors, lora_bias=True)["model.layers.0.attn.q_proj.Add.bias"]
    assert torch.equal(bias, (before["model.layers.0.attn.q_proj.Add.bias"].double() + 2 * shift.double()).float())
    (tmp_path / "packed").mkdir()
    message = (
        r"no weight of 'model\.layers\.0\.self_attn\.q_proj'.*qkv_proj' queries, .* one matrix: build .*fuse_qkv=false"
    )
    refused(tmp_path / "packed", genai(packed=True)[0], lora(paths), message)
