"""Many tasks, one model: what ONNX Runtime computes with each adapter and with none, and what is refused there."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lorafx
from conftest import Zoo, leaves
from generation import of_file, of_torch, prompts
from lorafx import AdapterSession, LoraSpec
from lorafx.errors import AdapterError, ExportError, InputError
from lorafx.export.adapter_file import load_adapter_file, write_adapter
from lorafx.export.decoder import STEPS
from lorafx.export.input_names import GAIN, WHOLE, A, B, genai_name
from lorafx.export.multi import MultiReport
from lorafx.export.parity import TOLERANCES, difference
from lorafx.graph import CapturedModule
from lorafx.ir import adapters
from several import IDS, SPECS, files, filled, several
from zoo import FAMILIES

FAMILY_SPECS: Mapping[str, LoraSpec] = {
    "default": LoraSpec(r=4, alpha=8),
    "ranks": LoraSpec(r=6, rslora=True, rank_pattern={r".*1\..*": 3}, alpha_pattern={r".*0\..*": 4}),
    "dora": LoraSpec(r=2, variant="dora", target_modules=r".*(query|q_proj|c_attn)"),
    "vera": LoraSpec(r=5, variant="vera"),
    "pissa": LoraSpec(r=2, init="pissa"),
}


def with_adapters(gm: CapturedModule, specs: Mapping[str, LoraSpec]) -> CapturedModule:
    for name, spec in specs.items():
        if name not in adapters(gm):
            lorafx.add_adapter(gm, spec, name, seed=1)
    return filled(gm, 0.2).eval()


def arrays(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def run_torch(gm: CapturedModule, adapter: str | None, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        if adapter is None:
            with lorafx.disable_adapters(gm):
                return [t for t in leaves(gm(**inputs)) if t is not None]
        lorafx.set_adapter(gm, adapter)
        return [t for t in leaves(gm(**inputs)) if t is not None]


def assert_agrees(
    gm: CapturedModule, session: AdapterSession, tasks: Mapping[str | None, str | None], inputs: Mapping[str, Tensor]
) -> None:
    outputs = []
    for task, adapter in tasks.items():
        found = session.run(arrays(inputs), task)
        expected = run_torch(gm, adapter, inputs)
        for (name, value), wanted in zip(found.items(), expected, strict=True):
            assert difference(name, wanted.numpy(), value, TOLERANCES[torch.float32]).passed, (task, name)
        outputs.append(next(iter(found.values())))
    for index, value in enumerate(outputs):  # each adapter does something of its own
        assert not any(np.allclose(value, other, rtol=1e-3) for other in outputs[:index])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultiReport]:
    folder = tmp_path_factory.mktemp("multi")
    return folder, lorafx.export_multi(copy.deepcopy(several()), folder / "model.onnx")


# What comes out.


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_each_adapter_and_none_on_one_file(tmp_path: Path, zoo: Zoo, name: str) -> None:
    family = FAMILIES[name]
    gm = with_adapters(zoo.adapted(family, FAMILY_SPECS["default"]), FAMILY_SPECS)
    active = gm.meta["active"]
    report = lorafx.export_multi(gm, tmp_path / "model.onnx", verify=False)
    assert gm.meta["active"] == active
    assert report.tasks["ranks"].ranks == (3, 6)
    assert report.tasks["pissa"].ranks == (4, 4)
    session = AdapterSession(tmp_path / "model.onnx")
    assert set(session.adapters) == set(FAMILY_SPECS)
    for inputs in (family.inputs(), family.other_inputs()):
        assert_agrees(gm, session, {None: None, **{n: n for n in FAMILY_SPECS}}, inputs)

    model = ir.load(tmp_path / "model.onnx")
    gains = [n for n in model.graph.initializers if n.endswith(".lora_gain")]
    assert len(gains) == sum(s.variant == "dora" for s in adapters(gm)["dora"].sites)
    assert not [n for n in model.graph.initializers if n.endswith(".lora_shift")]
    defaults = {n: v.shape for n, v in model.graph.initializers.items() if ".lora_" in n and n not in gains}
    assert all(0 in v.const_value.shape.numpy() for n, v in model.graph.initializers.items() if n in defaults)

    lorafx.export_base(gm, tmp_path / "base.onnx", verify=False)
    base = ort.InferenceSession(tmp_path / "base.onnx", providers=["CPUExecutionProvider"])
    for inputs in (family.inputs(), family.other_inputs()):
        for wanted, found in zip(base.run(None, arrays(inputs)), session.run(arrays(inputs)).values(), strict=True):
            assert np.array_equal(wanted, found)


def test_every_kind_of_adapter(exported: tuple[Path, MultiReport]) -> None:
    folder, report = exported
    gm = copy.deepcopy(several())
    session = AdapterSession(folder / "model.onnx")
    assert_agrees(gm, session, {None: None, **{n: n for n in SPECS}}, {"ids": IDS})
    assert_agrees(gm, session, {None: None, **{n: n for n in SPECS}}, {"ids": IDS[:1, :2]})
    assert set(report.tasks["head"].whole) == {"up.bias", "head.weight", "head.bias"}
    assert report.tasks["dora"].rescaled == 2
    assert report.max_abs < 1e-5
    text = str(report)
    assert "no adapter:" in text
    assert "small.onnx_adapter" in text
    assert f"{sum(len(t.parity) for t in report.tasks.values()) + len(report.base)} runs agree" in text


class Odd(nn.Module):
    """Convolutions, one in groups and one with a bias; a layer called twice; a bare parameter; the output a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3)
        self.twice = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(5, 6))
        self.same = nn.Linear(6, 4, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.conv(image))).mean((2, 3))
        x = self.twice(torch.relu(self.twice(x)))
        logits: Tensor = self.same(x @ self.table.T @ self.table)
        return logits


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_convolutions_parameters_and_layers_called_twice(tmp_path: Path, variant: str) -> None:
    image = torch.randn(2, 3, 7, 7)
    spec = LoraSpec(r=2, variant=variant, target_modules=["conv", "deep", "twice", "same"])
    gm = lorafx.apply(Odd().eval(), spec, (image,), seed=0)
    if variant == "lora":
        lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["same"], target_parameters=["table"]), "table", seed=1)
    filled(gm).eval()
    report = lorafx.export_multi(gm, tmp_path / "model.onnx")
    assert report.tasks["default"].whole == ("deep.weight",)
    session = AdapterSession(tmp_path / "model.onnx")
    assert_agrees(gm, session, {None: None, **{n: n for n in adapters(gm)}}, {"image": image})


def test_a_weight_that_is_tied_is_adapted_at_one_use(tmp_path: Path, zoo: Zoo) -> None:
    gm = zoo.captured(FAMILIES["gpt2"])
    lorafx.add_adapter(gm, LoraSpec(r=2, target_modules=["wte"], tied="untie"), "wte", seed=0)
    lorafx.add_adapter(gm, LoraSpec(r=3, target_modules=["lm_head"], tied="untie"), "head", seed=0)
    filled(gm).eval()
    lorafx.export_multi(gm, tmp_path / "model.onnx", verify=False)
    tasks = {None: None, "wte": "wte", "head": "head"}
    assert_agrees(gm, AdapterSession(tmp_path / "model.onnx"), tasks, FAMILIES["gpt2"].inputs())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    tasks = {"d": "dora", "h": "head"}
    report = lorafx.export_multi(several(), tmp_path / "model.onnx", tasks, dtype=dtype)
    assert report.precision == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert ("not run" in report.checks) == (dtype == "bf16")
    assert all(p.passed and p.refused is None for t in report.tasks.values() for p in t.parity)
    held = load_adapter_file(tmp_path / "d.onnx_adapter").values["up.lora_gain"]
    assert held.data_type() == f"tensor({report.precision})"


def test_names_of_genai(tmp_path: Path, zoo: Zoo) -> None:
    gm = filled(zoo.adapted(FAMILIES["llama"], LoraSpec(r=2))).eval()
    lorafx.export_multi(gm, tmp_path / "model.onnx", naming="genai", verify=False)
    session = AdapterSession(tmp_path / "model.onnx")
    names = set(load_adapter_file(tmp_path / "default.onnx_adapter").values)
    places = [*(f"attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    assert names == {
        f"model.layers.{i}.{place}.{role}.MatMul.weight" for i in (0, 1) for place in places for role in (A, B)
    }
    assert_agrees(gm, session, {None: None, "default": "default"}, FAMILIES["llama"].inputs())
    with pytest.raises(ExportError, match="onnxruntime-genai has no name for 'embed'"):
        lorafx.export_multi(several(), tmp_path / "other.onnx", naming="genai")


@pytest.mark.parametrize(
    ("site", "role"),
    [
        ("encoder.layers.0.self_attn.q_proj", A),
        ("model.layers.0.self_attn.gate_proj", A),
        ("model.layers.0.mlp.fc1", B),
        ("model.layers.0.self_attn.q_proj", GAIN),
        ("lm_head", A),
        ("model.layers.0.input_layernorm.weight", WHOLE),
    ],
)
def test_what_genai_has_no_name_for(site: str, role: str) -> None:
    with pytest.raises(ExportError, match="onnxruntime-genai has no name for"):
        genai_name(site, role)


def test_folders_and_adapters_of_the_graph_give_the_same_files(tmp_path: Path) -> None:
    gm = copy.deepcopy(several())
    lorafx.save_adapter(gm, tmp_path / "peft", "dora")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one = lorafx.export_multi(gm, tmp_path / "a" / "m.onnx", {"x": "dora", "y": "small"}, verify=False)
    two = lorafx.export_multi(gm, tmp_path / "b" / "m.onnx", {"x": tmp_path / "peft", "y": "small"}, verify=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (one.onnx_sha256, one.tasks["x"].sha256) == (two.onnx_sha256, two.tasks["x"].sha256)
    assert "task_0" not in adapters(gm)


def test_external_weights_are_shared_by_all_tasks(tmp_path: Path) -> None:
    gm = copy.deepcopy(several())
    report = lorafx.export_multi(gm, tmp_path / "model.onnx", {"h": "head", "d": "dora"}, external_data=True)
    (data,) = report.data_paths
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", Path(data).name, "h.onnx_adapter", "d.onnx_adapter"}
    session = AdapterSession(tmp_path / "model.onnx")
    assert_agrees(gm, session, {None: None, "h": "head", "d": "dora"}, {"ids": IDS})


# Running.


def resident() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_switching_a_thousand_times_leaves_no_drift_and_no_memory(exported: tuple[Path, MultiReport]) -> None:
    session = AdapterSession(exported[0] / "model.onnx")
    names = [None, *session.adapters]
    inputs = {"ids": IDS.numpy()}
    first = {name: session.run(inputs, name) for name in names}
    for name in names * 20:  # allocators fill up
        session.run(inputs, name)
    before = resident()
    for count in range(1000):
        name = names[count % len(names)]
        found = session.run(inputs, name)
        assert all(np.array_equal(found[k], first[name][k]) for k in found)
    assert resident() - before < 1024  # KiB: one a run would be 1000
    for name in names * 2:  # loading them again and again, too
        if name is not None:
            session.remove(name)
            session.add(name, exported[0] / f"{name}.onnx_adapter")
            assert all(np.array_equal(v, first[name][k]) for k, v in session.run(inputs, name).items())


def test_bound_inputs(exported: tuple[Path, MultiReport]) -> None:
    session = AdapterSession(exported[0] / "model.onnx")
    for adapter in ("dora", "head", None):
        binding = session.binding(adapter)
        binding.bind_cpu_input("ids", IDS.numpy())
        binding.bind_output("output")
        session.session.run_with_iobinding(binding)
        (found,) = binding.copy_outputs_to_cpu()
        assert np.array_equal(found, session.run({"ids": IDS.numpy()}, adapter)["output"])
    with pytest.raises(AdapterError, match=r"ignores adapters in runs with bound inputs.*session\.binding"):
        session.run(session.binding(), "dora")  # type: ignore[arg-type]


def test_adapters_of_different_layers_run_together_and_others_are_refused(exported: tuple[Path, MultiReport]) -> None:
    session = AdapterSession(exported[0] / "model.onnx")
    gm = copy.deepcopy(several())
    lorafx.set_adapter(gm, ["small", "adalora"])  # down; up
    found = session.run({"ids": IDS.numpy()}, ["small", "adalora"])["output"]
    assert difference("output", gm(IDS).detach().numpy(), found, TOLERANCES[torch.float32]).passed
    both = r"'small' and 'dora' both have 'down\.lora_"
    with pytest.raises(AdapterError, match=both):
        session.run({"ids": IDS.numpy()}, ["small", "dora"])
    with pytest.raises(AdapterError, match=both):
        session.binding(["small", "dora"])
    with pytest.raises(AdapterError, match="named twice"):
        session.run({"ids": IDS.numpy()}, ["small", "small"])
    with pytest.raises(AdapterError, match=r"no adapter 'smal'.*'small'"):
        session.run({"ids": IDS.numpy()}, "smal")
    for wrong in (5, ["small", None], {"small": 1}):
        with pytest.raises(AdapterError, match=r"adapter=.* is of type \w+, and the name of an adapter, a list"):
            session.run({"ids": IDS.numpy()}, wrong)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="there is an adapter 'small' already"):
        session.add("small", exported[0] / "small.onnx_adapter")


Tensors = dict[str, Any]


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("down", "downs"): t for name, t in tensors.items()}


def without_b(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name != "down.lora_B"}


def other_rank(tensors: Tensors) -> Tensors:
    return {n: ir.tensor(np.repeat(t.numpy(), 2, 1)) if n == "down.lora_A" else t for n, t in tensors.items()}


def other_shape(tensors: Tensors) -> Tensors:
    return {n: ir.tensor(t.numpy()[:-1]) if n == "down.lora_A" else t for n, t in tensors.items()}


def other_width(tensors: Tensors) -> Tensors:
    return {n: ir.tensor(t.numpy()[:, :1]) if n == "down.lora_B" else t for n, t in tensors.items()}


def other_dtype(tensors: Tensors) -> Tensors:
    return {name: ir.tensor(t.numpy().astype(np.float64)) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "version", "message"),
    [
        (renamed, 0, r"has no optional input 'downs\.lora_"),
        (without_b, 0, r"'down\.lora_A' without 'down\.lora_B'"),
        (other_rank, 0, r"'down\.lora_A' has rank 2 and 'down\.lora_B' 1"),
        (other_shape, 0, r"'down\.lora_A' is tensor\(float\) \[9, 1\], and the model takes .*\[10, 'down\.rank'\]"),
        (
            other_width,
            0,
            r"'down\.lora_B' is tensor\(float\) \[1, 1\], and the model takes .*\['down\.rank', 'down\.out\.6'\]",
        ),
        (other_dtype, 0, r"tensor\(double\)"),
        (dict, 1, "made for another base"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path,
    exported: tuple[Path, MultiReport],
    change: Callable[[Tensors], Tensors],
    version: int,
    message: str,
) -> None:
    session = AdapterSession(exported[0] / "model.onnx", {})
    real = load_adapter_file(exported[0] / "small.onnx_adapter")
    tensors = {name: ir.tensor(np.array(value.numpy())) for name, value in real.values.items()}
    path = write_adapter(tmp_path / "new.onnx_adapter", change(tensors), real.version ^ version)
    with pytest.raises(AdapterError, match=message):
        session.add("new", path)
    assert session.adapters == ()


def test_files_that_are_none(tmp_path: Path, exported: tuple[Path, MultiReport]) -> None:
    session = AdapterSession(exported[0] / "model.onnx", {})
    (tmp_path / "new.onnx_adapter").write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(AdapterError, match="is no adapter of ONNX Runtime's, or damaged"):
        session.add("new", tmp_path / "new.onnx_adapter")
    with pytest.raises(AdapterError, match="no such file"):
        session.add("new", tmp_path / "gone.onnx_adapter")
    with pytest.raises(ExportError, match="cannot load"):
        AdapterSession(tmp_path / "new.onnx_adapter")


def test_a_damaged_file_beside_is_an_error_when_it_is_asked_for(
    tmp_path: Path, exported: tuple[Path, MultiReport]
) -> None:
    shutil.copytree(exported[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "torn.onnx_adapter").write_bytes((tmp_path / "small.onnx_adapter").read_bytes()[:40])
    session = AdapterSession(tmp_path / "model.onnx")
    assert "torn" not in session.adapters
    session.run({"ids": IDS.numpy()}, "small")
    with pytest.raises(AdapterError, match=r"torn\.onnx_adapter is no adapter of ONNX Runtime's, or damaged"):
        session.run({"ids": IDS.numpy()}, "torn")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"input 'ids' is to be a numpy array, tensor\(int64\) of shape \[.*\], and is missing"),
        ({"ids": IDS}, r"'ids' .* and is a torch\.Tensor: give its \.numpy\(\)"),
        ({"ids": IDS.tolist()}, r"'ids' .* and is a builtins\.list$"),
        ({"ids": IDS.int().numpy()}, r"'ids' .* and is tensor\(int32\) of shape"),
        ({"ids": IDS[0].numpy()}, r"'ids' .* and is tensor\(int64\) of shape"),
        ({"ids": IDS.numpy(), "idx": IDS.numpy()}, "the model has no input 'idx'.* it takes \\['ids'\\]"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_named(
    inputs: dict[str, Any], message: str, exported: tuple[Path, MultiReport]
) -> None:
    with pytest.raises(InputError, match=message):
        AdapterSession(exported[0] / "model.onnx").run(inputs, "small")


@pytest.mark.parametrize("adapter", [None, "small"])
def test_an_adapters_tensors_are_no_inputs_of_a_run(exported: tuple[Path, MultiReport], adapter: str | None) -> None:
    """ONNX Runtime takes A without B, and mixes what it is given with the adapter that is active."""
    session = AdapterSession(exported[0] / "model.onnx")
    name = next(i.name for i in session.session.get_overridable_initializers())
    with pytest.raises(InputError, match=rf"input '{name}' is an adapter's: give run the name of one"):
        session.run({"ids": IDS.numpy(), name: np.zeros((2, 2), np.float32)}, adapter)


def test_one_that_generates(tmp_path: Path, zoo: Zoo) -> None:
    """With a cache, under the names of onnxruntime-genai: each adapter's tokens are those of torch's own generation."""
    gm = with_adapters(zoo.adapted(FAMILIES["llama"], LoraSpec(r=2)), {"other": LoraSpec(r=3, alpha=9)})
    report = lorafx.export_multi(gm, tmp_path / "model.onnx", naming="genai", kv_cache=True)
    count = 3 * 6 * STEPS
    assert report.checks["same tokens"].startswith(f"{count} of {count} tokens generated with the cache are torch's")
    assert {p.reference for p in report.tasks["other"].parity} == {"adapter 'other', no cache"}
    assert [n for n in report.inputs if n.startswith("past_key_values")] == [
        f"past_key_values.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")
    ]
    ids, mask = prompts(5, 9)
    seen = []
    for task in (None, "default", "other"):
        model = FAMILIES["llama"].build()
        if task is not None:
            lorafx.set_adapter(gm, task)
            model.load_state_dict(lorafx.merged_state_dict(gm))
        seen.append(of_torch(model, ids, mask))
        adapter = None if task is None else tmp_path / f"{task}.onnx_adapter"
        assert torch.equal(of_file(tmp_path / "model.onnx", ids, mask, adapter=adapter), seen[-1]), task
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
