"""Lowering changes what computes a graph, and nothing else: values, text, files, and what one does with a graph."""

from __future__ import annotations

import copy
import io
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, leaves, loss_of, randomize, same
from lorafx import LoraSpec, LoweringError, PassError
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lorafx.kernels import providers
from lorafx.kernels.base import Call
from lorafx.kernels.cpu import build
from lorafx.kernels.cpu.provider import Cpu
from tolerances import assert_close
from zoo import FAMILIES, Family

WIDTH = 16
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A block with a group of three, one of two, and two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=i > 0) for i in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.drop(self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))))
        h = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return result


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


@cache
def inserted(dtype: torch.dtype, layers: int, options: tuple[tuple[str, Any], ...]) -> CapturedModule:
    """The model with adapters, as the reference. Shared: don't change it."""
    torch.manual_seed(0)
    spec = LoraSpec(**{"r": 3, **dict(options)})
    gm = lorafx.apply(Model(layers).to(dtype), spec, (X.to(dtype),), seed=0, backend="reference")
    randomize(gm)
    return gm


def applied(
    backend: str = "auto", *, dtype: torch.dtype = torch.float32, layers: int = 1, **options: Any
) -> CapturedModule:
    """What ``lorafx.apply`` returns, from a cached capture, its adapters filled."""
    gm = copy.deepcopy(inserted(dtype, layers, tuple(options.items())))
    lorafx.lower(gm, backend)
    return gm


def grads(gm: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in gm.named_parameters() if p.grad is not None}


def run(gm: nn.Module, x: Tensor = X, seed: int = 1) -> dict[str, Tensor]:
    """The output and all gradients, from this random state."""
    gm.zero_grad()
    torch.manual_seed(seed)
    y = gm(x)
    y.float().square().mean().backward()
    return {"output": y.detach(), **grads(gm)}


def assert_equal_results(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "model") -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(what, found[name], value)


def derived(gm: CapturedModule) -> list[str]:
    """The provider of each group that runs."""
    graph = gm.meta["lowering"].derive(gm, gm.graph)
    return [n.args[10] for n in graph.nodes if str(n.target) == "lorafx.grouped.default"]


# the zoo


def zoo_results(gm: CapturedModule, family: Family) -> dict[str, Tensor]:
    gm.zero_grad()
    torch.manual_seed(1)
    outputs = leaves(gm(**family.inputs()))
    torch.manual_seed(1)
    loss_of(gm, family).backward()
    return {**{f"output {i}": t.detach() for i, t in enumerate(outputs)}, **grads(gm)}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_zoo_computes_what_the_reference_does(zoo: Zoo, family: Family, variant: str) -> None:
    gm = zoo.adapted(family, LoraSpec(r=4, alpha=8, variant=variant))
    lorafx.lower(gm, "reference")
    reference = copy.deepcopy(gm)
    text, state = format_graph(gm), {n: t.clone() for n, t in gm.state_dict().items()}
    lorafx.lower(gm)
    assert set(derived(gm)) == {"cpu"}
    fresh, eager = (leaves(m.eval()(**family.inputs())) for m in (gm, reference))
    assert all(map(torch.equal, fresh, eager)), "the first outputs are the model's, bit for bit"
    for module in (gm, reference):
        torch.manual_seed(3)
        randomize(module, 0.1)
    for training in (False, True):
        found, expected = (zoo_results(m.train(training), family) for m in (gm, reference))
        assert_equal_results(found, expected, "peft")
    for name, value in gm.state_dict().items():
        if not any(n in name for n in ("lora_", "running_", "num_batches")):
            assert torch.equal(value, state[name])
    assert format_graph(gm) == text
    lorafx.lower(gm, "reference")
    assert gm.code == reference.code
    assert format_graph(gm) == text


# which provider, and why


def test_explain_says_who_computes_each_site() -> None:
    gm = applied(layers=2, target_modules=("q", "v", "down", "head"))
    found = lorafx.explain(gm)
    assert found.backend == "auto"
    rows = [(r.site, r.kind, r.provider, r.group) for r in found.rows]
    layer = [("q", 3), ("v", 3), ("down", 1)]
    expected = [(f"layers.{i}.{n}", "linear", "cpu", size) for i in range(2) for n, size in layer]
    assert sorted(rows) == sorted([*expected, ("head", "linear", "cpu", 1)])
    assert {name for row in found.rows for name, _ in row.declined} == {"triton"}
    text = str(found)
    assert text.splitlines()[0].rstrip() == "lorafx lowering, backend 'auto'"
    assert "layers.0.q" in text
    assert "of 3" in text
    assert "triton: " in text


def test_explain_says_why_a_site_is_left() -> None:
    from kinds import build as build_kinds
    from kinds import inputs

    gm = lorafx.apply(build_kinds(), LoraSpec(r=2, target_modules=["up", "conv", "embed"]), inputs())
    rows = {row.site: row for row in lorafx.explain(gm).rows}
    for name, row in rows.items():
        if row.kind == "linear":
            assert row.provider == "torch", "float64"
            assert ("cpu", "it computes in float32 and bfloat16, and the layer is torch.float64") in row.declined
        else:
            assert (row.provider, row.declined) == ("reference", (("all", "only linear and addmm are lowered"),)), name
    assert {row.kind for row in rows.values()} == {"linear", "conv2d", "embedding"}
    lorafx.lower(gm, "reference")
    assert {(r.provider, r.declined) for r in lorafx.explain(gm).rows} == {("reference", ())}
    with pytest.raises(PassError, match=r"expected a graph made by lorafx\.apply"):
        lorafx.explain(Model())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_provider_by_name_serves_all(backend: str) -> None:
    gm = applied(backend)
    assert set(derived(gm)) == {backend}
    assert lorafx.explain(gm).backend == backend
    assert_equal_results(run(gm.eval()), run(applied("reference").eval()))


class Picky(Cpu):
    """Serves no layer with as many outputs as the head."""

    name = "cpu"

    def rejects(self, call: Call) -> str | None:
        return "four are too few" if 4 in call.out_features else None


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "cpu": Picky})
    providers.provider.cache_clear()
    yield
    providers.provider.cache_clear()


def test_a_provider_that_declines_is_passed_over(picky: None) -> None:
    gm = applied(target_modules=("q", "head"))
    assert derived(gm) == ["cpu", "torch"]
    (row,) = (r for r in lorafx.explain(gm).rows if r.site == "head")
    assert ("cpu", "four are too few") in row.declined
    assert_equal_results(
        run(gm.eval()),
        run(
            applied(
                "reference",
                target_modules=("q", "head"),
            ).eval()
        ),
    )


REFUSED: dict[str, tuple[Callable[[], CapturedModule], str, str]] = {
    "unknown": (
        applied,
        "tritn",
        r"^there is no backend 'tritn' \(did you mean 'triton'\?\); choose one of \('auto', ",
    ),
    "no GPU": (applied, "triton", r"^backend 'triton' cannot serve 'layers\.0\.q': .*\. Choose 'auto'$"),
    "dtype": (
        lambda: applied("torch", dtype=torch.float64),
        "cpu",
        r"^backend 'cpu' cannot serve 'layers\.0\.q': it computes in float32 and bfloat16, and the layer is "
        r"torch\.float64\. Choose 'auto'$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_and_changes_nothing(case: str) -> None:
    make, backend, message = REFUSED[case]
    gm = make()
    before = (format_graph(gm), gm.code, lorafx.explain(gm), gm.meta["lowering"])
    with pytest.raises(LoweringError, match=message):
        lorafx.lower(gm, backend)
    assert (format_graph(gm), gm.code, lorafx.explain(gm), gm.meta["lowering"]) == before
    with pytest.raises(LoweringError, match=message):
        lorafx.apply(
            Model().to(next(gm.parameters()).dtype),
            LoraSpec(r=2),
            (X.to(next(gm.parameters()).dtype),),
            backend=backend,
        )


def test_only_graphs_of_ours_are_lowered() -> None:
    for backend in ("auto", "torch", "reference"):
        with pytest.raises(PassError, match=r"expected a graph made by lorafx\.apply"):
            lorafx.lower(Model(), backend)  # type: ignore[arg-type]


# the life of a lowered graph


def test_adapters_are_switched_merged_and_taken_away() -> None:
    gm, reference = applied(), applied("reference")
    for module in (gm, reference):
        lorafx.add_adapter(module, LoraSpec(r=2, variant="dora", target_modules=["q", "down"]), "second", seed=1)
        lorafx.add_adapter(module, LoraSpec(r=5, variant="vera", target_modules=["v"]), "third", seed=1)
        torch.manual_seed(5)
        lorafx.set_adapter(module, ["second", "third"])
        randomize(module)
        module.eval()

    def check() -> None:
        assert_equal_results(run(gm), run(reference))
        assert format_graph(gm) == format_graph(reference)

    for names in ("default", "second", ["default", "third"], ["third", "second", "default"]):
        for module in (gm, reference):
            lorafx.set_adapter(module, names)
        check()
    assert_close("model", lorafx.merge(gm)(X), gm(X))
    assert same(lorafx.merged_state_dict(gm), lorafx.merged_state_dict(reference))
    before = gm(X)
    lorafx.merge(gm, "second", inplace=True)
    assert_close("model", gm(X), before)
    lorafx.unmerge(gm)
    assert torch.equal(gm(X), before)
    with lorafx.disable_adapters(gm), lorafx.disable_adapters(reference):
        assert torch.equal(gm(X), reference(X))
    assert torch.equal(gm(X), before)
    for module in (gm, reference):
        lorafx.rename_adapter(module, "third", "other")
        lorafx.delete_adapter(module, "second")
    check()
    assert set(derived(gm)) == {"cpu"}


def test_ranks_shrink() -> None:
    gm, reference = (
        applied(
            b,
            variant="adalora",
            target_modules=("q", "k", "down"),
        ).eval()
        for b in ("auto", "reference")
    )
    from lorafx.passes.resize import resize

    for module in (gm, reference):
        names = [s.name for s in lorafx.sites(module)]
        resize(module, {names[0]: (0, 2), names[1]: (), names[2]: (1,)})
    assert_equal_results(run(gm), run(reference))
    sizes = {row.site: row.group for row in lorafx.explain(gm).rows}
    assert names[1] not in sizes, "of which nothing is left"
    assert sizes[names[0]] == 3


@pytest.mark.xdist_group("mlp")
def test_the_exported_file_is_the_references(zoo: Zoo, tmp_path: Path) -> None:
    files = []
    for backend in ("auto", "reference"):
        gm = zoo.adapted(FAMILIES["mlp"], LoraSpec(r=2)).eval()
        torch.manual_seed(1)
        randomize(gm)
        lorafx.lower(gm, backend)
        lorafx.merge_and_export(gm, tmp_path / "model.onnx")
        files.append((tmp_path / "model.onnx").read_bytes())
    assert files[0] == files[1]


def saved_and_loaded(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)), saved_and_loaded],  # noqa: S301  # our own bytes
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_copy_is_lowered_as_well(copied: Callable[[object], Any], checkpointed: bool) -> None:
    gm = applied("cpu", dropout=0.2).train()
    if checkpointed:
        gm.activation_checkpointing_enable()
    twin = copied(gm)
    assert twin.meta["lowering"] == gm.meta["lowering"]
    assert twin.code == gm.code
    assert derived(twin) == derived(gm)
    assert same(run(twin), run(gm))
    lorafx.lower(twin, "reference")
    assert set(derived(gm)) == {"cpu"}, "and the original stays"


def test_a_move_to_another_device_lowers_anew() -> None:
    gm = applied()
    assert set(derived(gm)) == {"cpu"}
    gm.to("meta")
    assert set(derived(gm)) == {"torch"}
    reasons = {reason for row in lorafx.explain(gm).rows for name, reason in row.declined if name == "cpu"}
    assert reasons == {"it is for CPUs, and the layer is on meta"}
    gm.train()(X.to("meta")).sum().backward()
    assert {p.grad.device.type for p in gm.parameters() if p.grad is not None} == {"meta"}


def test_by_row_adapters_stay_at_the_reference() -> None:
    gm, reference = applied(), applied("reference")
    for module in (gm, reference):
        lorafx.add_adapter(module, LoraSpec(r=2), "second", seed=1)
        lorafx.set_adapter_names(module, ["default", None, "second"])
        torch.manual_seed(5)
        randomize(module)
    assert_equal_results(run(gm.eval()), run(reference.eval()))
    found = {(row.provider, row.declined) for row in lorafx.explain(gm).rows}
    assert found == {("reference", (("all", "each row of a batch goes through its own adapter"),))}
    lorafx.set_adapter(gm, "second")
    assert {row.provider for row in lorafx.explain(gm).rows} == {"cpu"}


def test_a_loaded_state_is_what_runs() -> None:
    gm, other = applied(), applied()
    torch.manual_seed(9)
    randomize(other)
    gm.load_state_dict(other.state_dict())
    assert same(run(gm.eval()), run(other.eval()))


def test_a_base_weight_may_train() -> None:
    gm, reference = applied(layers=2), applied("reference", layers=2)
    for module in (gm, reference):
        for name in ("layers.0.q.weight", "layers.1.k.weight", "layers.1.v.bias", "layers.0.norm.weight"):
            module.get_parameter(name).requires_grad_()
    gm.recompile()
    found = run(gm.eval())
    assert "layers.0.norm.weight" in found
    assert_equal_results(found, run(reference.eval()))


def test_freezing_after_lowering_needs_no_recompilation() -> None:
    """What is kept for backward was chosen when the graph was compiled; values must not depend on it."""
    gm, reference = (applied(b, layers=2, variant="dora") for b in ("auto", "reference"))
    for module in (gm, reference):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("norm" in name or ("layers.1" in name and "lora_A" in name))
    assert_equal_results(run(gm.eval()), run(reference.eval()))


# torch's own machinery


def compiled_twice(gm: CapturedModule, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend=backend)
    other = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(3))
    for training in (True, False):
        compiled.train(training)
        assert_equal_results(run(compiled, X), run(gm, X))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_equal_results(run(compiled, other), run(gm, other))


@pytest.mark.parametrize(
    ("backend", "variant", "checkpointed"),
    [
        ("torch", "dora", True),
        ("torch", "lora", False),
        ("cpu", "lora", True),
        ("cpu", "dora", False),
    ],
)
def test_compiles_as_one_graph(backend: str, variant: str, checkpointed: bool) -> None:
    """In both modes, with dropout, at any size; the masks are those of the eager graph."""
    gm = applied(backend, variant=variant, dropout=0.2)
    if checkpointed:
        gm.activation_checkpointing_enable()
    compiled_twice(gm, "aot_eager")


def test_compiles_with_inductor() -> None:
    """Whose random numbers differ from torch's, so that only what needs none is compared."""
    gm = applied(
        target_modules=("q", "k"),
    ).eval()
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True)
    assert_equal_results(run(compiled), run(gm))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.bfloat16), ("torch", torch.float16), ("cpu", torch.bfloat16), ("cpu", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_autocast_gives_the_dtypes_of_the_frozen_model(variant: str, backend: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"variant": variant, "dropout": 0.0}
    gm, reference = applied(backend, **options).eval(), applied("reference", **options).eval()
    outputs: list[Tensor] = []
    for module in (gm, reference, Model(1)):
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            y = module(x)
        y.float().square().mean().backward()
        assert y.dtype == dtype
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        outputs.append(y.detach())
    assert_close("model", outputs[0], outputs[1])
    found, expected = grads(gm), grads(reference)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert_close("autocast", found[name], gradient)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_fresh_adapters_change_no_bit_under_autocast(backend: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    for variant in ("lora", "dora"):
        gm = lorafx.apply(model, LoraSpec(r=2, variant=variant), (X,), backend=backend).eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gm(X), model(X))


def test_bfloat16_models() -> None:
    for variant in ("lora", "dora"):
        gm, reference = (applied(b, dtype=torch.bfloat16, variant=variant).eval() for b in ("auto", "reference"))
        assert set(derived(gm)) == {"cpu"}
        assert_close("model", gm(X.bfloat16()), reference(X.bfloat16()))
        run(gm, X.bfloat16())
        for parameter in gm.parameters():
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype


def test_gradients_accumulate() -> None:
    gm, reference = applied(variant="dora"), applied("reference", variant="dora")
    for module in (gm.eval(), reference.eval()):
        for part in X.split(1):
            (module(part).square().mean() / len(X)).backward()
    assert_equal_results(grads(gm), grads(reference))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_function_transforms(variant: str) -> None:
    gm, reference = applied(variant=variant).eval(), applied("reference", variant=variant).eval()
    parameters = {n: p.detach() for n, p in gm.named_parameters() if p.requires_grad}

    def loss(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, values, (x,)).square().mean()
        return result

    def transformed(module: nn.Module) -> dict[str, Tensor]:
        per_row = torch.func.vmap(torch.func.grad(lambda v, x: loss(module, v, x[None])), in_dims=(None, 0))
        return {
            **torch.func.grad(lambda v: loss(module, v, X))(parameters),
            **{f"{n} by row": g for n, g in per_row(parameters, X).items()},
        }

    assert_equal_results(transformed(gm), transformed(reference))


def test_double_backward_is_refused_or_right() -> None:
    """The lowered form is differentiated once; the reference again and again."""
    gm = applied().eval()
    parameter = next(p for p in gm.parameters() if p.requires_grad)
    (first,) = torch.autograd.grad(gm(X).square().mean(), parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
    lorafx.lower(gm, "reference")
    (first,) = torch.autograd.grad(gm(X).square().mean(), parameter, create_graph=True)
    first.square().sum().backward()
    assert parameter.grad is not None


def test_inference_mode_and_no_grad() -> None:
    for variant in ("lora", "dora"):
        gm = applied(variant=variant).eval()
        expected = gm(X).detach()
        with torch.inference_mode():
            assert torch.equal(gm(X), expected)
        with torch.no_grad():
            y = gm(X)
        assert torch.equal(y, expected)
        assert not y.requires_grad


def test_a_frozen_graph_keeps_nothing_for_backward() -> None:
    gm = applied().eval()
    for parameter in gm.parameters():
        parameter.requires_grad_(False)
    assert not gm(X).requires_grad


# the compiler

SCRIPT = """
import torch, lorafx
from torch import nn
spec = lorafx.LoraSpec(r=2, dropout=0.1, target_modules=["0"])
gm = lorafx.apply(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), spec, (torch.ones(4, 6),))
gm(torch.ones(4, 6)).sum().backward()
(row,) = lorafx.explain(gm).rows
print(row.provider, "|", dict(row.declined).get("cpu"))
try:
    lorafx.lower(gm, "cpu")
except lorafx.LoweringError as error:
    print("refused:", error)
"""


def in_fresh_cache(folder: Path, **environment: str) -> str:
    """What the script says in a process of its own."""
    paths = os.pathsep.join(sys.path)
    given = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_auto_falls_back_and_says_so(tmp_path: Path) -> None:
    said = in_fresh_cache(tmp_path, CXX="/nonexistent")
    reason = "there is no C++ compiler (/nonexistent) on PATH; install g++ or clang, or set CXX"
    assert said.splitlines() == [
        f"torch | {reason}",
        f"refused: backend 'cpu' cannot serve '0': {reason}. Choose 'auto'",
    ]


def test_what_a_failing_compiler_says_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 3\n")
    compiler.chmod(0o755)
    said = in_fresh_cache(tmp_path / "cache", CXX=str(compiler))
    assert said.startswith(f"torch | {compiler} failed: this compiler is broken\n")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No kernels are loaded yet, and the user's cache is this folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path
    build.load.cache_clear()


def test_a_cache_that_others_can_write_to_is_refused(unloaded: Path) -> None:
    folder = unloaded / "lorafx"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(
        build.BuildError, match=r"lorafx can be written to by other users, and would hold code that runs"
    ):
        build.load()
    assert list(folder.iterdir()) == []


def test_the_kernels_are_built_once_for_this_user_alone(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def fake(compiler: str, to: Path) -> None:
        built.append(to)
        to.write_bytes(b"not a library")

    monkeypatch.setattr(build, "_build", fake)
    for _ in range(2):
        with pytest.raises(build.BuildError, match="could not be kept or loaded"):
            build.load()
    assert len(built) == 1, "the second time it is there"
    folder = unloaded / "lorafx"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr(build, "_SOURCE", unloaded / "other.cpp")
    (unloaded / "other.cpp").write_text("// another source")
    with pytest.raises(build.BuildError):
        build.load()
    assert len({path.name for path in built}) == 2, "another source, another file"


def test_a_cache_that_cannot_be_written_is_a_reason(unloaded: Path) -> None:
    (unloaded / "lorafx").write_text("a file where the folder should be")
    with pytest.raises(build.BuildError, match="could not be kept or loaded"):
        build.load()
