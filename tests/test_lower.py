"""Lowering changes what computes a graph, and nothing else: values, text, files, and what one does with a graph."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorafx
from conftest import Zoo, leaves, loss_of, randomize, same
from kinds import build as build_kinds
from kinds import inputs
from lorafx import LoraSpec, LoweringError, PassError
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lorafx.kernels.aten import Aten
from lorafx.kernels.base import Call
from lorafx.kernels.cpu.provider import Cpu
from lorafx.passes import lower
from lorafx.passes.group import find_groups
from lowered import WIDTH, Model, X, applied, assert_equal_results, derived, grads, replaced, run
from tolerances import assert_close
from zoo import FAMILIES, Family

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


class Computed(nn.Module):
    """A layer whose bias is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, x.mean((0, 1)))


def test_explain_says_what_keeps_a_call_at_the_reference() -> None:
    gm = lorafx.apply(Computed(), LoraSpec(r=2, target_modules="weight"), (X,))
    rows = {row.site: (row.provider, row.declined) for row in lorafx.explain(gm).rows}
    assert rows == {"weight": ("reference", (("all", "its operand %mean is computed from the inputs"),))}


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


def test_a_provider_that_declines_is_passed_over() -> None:
    with replaced("cpu", Picky):
        gm = applied(target_modules=("q", "head"))
        assert derived(gm) == ["cpu", "torch"]
        (row,) = (r for r in lorafx.explain(gm).rows if r.site == "head")
        assert ("cpu", "four are too few") in row.declined
        assert_equal_results(run(gm.eval()), run(applied("reference", target_modules=("q", "head")).eval()))


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


@pytest.mark.parametrize("backend", [None, 3, ("cpu", "torch")])
def test_what_is_no_name_is_refused_with_the_names_there_are(backend: Any) -> None:
    gm = applied()
    for call in (
        lambda: lorafx.lower(gm, backend),
        lambda: lorafx.apply(Model(), LoraSpec(r=2), (X,), backend=backend),
    ):
        with pytest.raises(LoweringError) as refused:
            call()
        known = "('auto', 'reference', 'triton', 'cpu', 'torch')"
        assert str(refused.value) == f"there is no backend {backend!r}; choose one of {known}"
    assert lorafx.explain(gm).backend == "auto"


class Counting(Aten):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in ("down", "up", "grad_up", "grad_x", "grad_right"):
            self.calls[name] += 1
        return super().__getattribute__(name)


FORWARD = {"down": 1, "up": 1}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("x_trains", "trains", "backward"),
    [
        (True, "lora", {"grad_up": 1, "grad_x": 1, "grad_right": 1}),
        (False, "lora", {"grad_up": 1, "grad_right": 1}),
        (True, "lora_B", {"grad_up": 1, "grad_x": 1}),
        (False, "lora_B", {"grad_up": 1}),
        (True, "nothing", {"grad_up": 1, "grad_x": 1}),
        (False, "nothing", {}),
    ],
)
def test_a_group_reads_once_and_computes_what_is_needed(
    x_trains: bool, trains: str, backward: dict[str, int], dropout: float
) -> None:
    """For q, k and v together: one read of x for s and one for dA, one update of dx; dx and dA where they are used."""
    counting = Counting()
    with replaced("torch", lambda: counting):
        gm = applied("torch", target_modules=("q", "k", "v"), dropout=dropout)
        for name, parameter in gm.named_parameters():
            parameter.requires_grad_(trains in name)
        counting.calls.clear()
        y = gm(X.clone().requires_grad_(x_trains))
        assert counting.calls == FORWARD
        if y.requires_grad:
            y.sum().backward()
        assert counting.calls == {**FORWARD, **backward}


class Absent(Cpu):
    def unavailable(self) -> str | None:
        return "it is not here"


def test_a_provider_that_is_not_here_is_refused_though_nothing_needs_it_yet() -> None:
    gm = lorafx.apply(build_kinds(), LoraSpec(r=2, target_modules=["conv"]), inputs())
    with (
        replaced("cpu", Absent),
        pytest.raises(LoweringError, match=r"^backend 'cpu' is not available: it is not here\. Choose 'auto'$"),
    ):
        lorafx.lower(gm, "cpu")
    assert lorafx.explain(gm).backend == "auto"


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


@pytest.mark.parametrize(("variant", "ranks"), [("lora", [4, 2]), ("dora", [4, 2]), ("vera", [4, 2])])
def test_a_call_is_told_the_ranks_of_its_adapters(variant: str, ranks: list[int]) -> None:
    """Whatever the tensors' shapes: VeRA's are as large as the largest layer needs, and a rank may be a width."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    specs = [LoraSpec(variant=variant, r=r, target_modules=[str(2 * i)]) for i, r in enumerate(ranks)]
    if variant == "vera":
        specs, ranks = [LoraSpec(variant=variant, r=4, target_modules=["0", "2"])], [4, 4]
    gm = lorafx.apply(model, specs, torch.randn(3, 4))
    assert [lower._call(gm, group).r for group in find_groups(gm.graph)] == ranks
