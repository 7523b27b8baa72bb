"""Other ranks in place: what is left computes the same, trains on, and goes through merge, disk and export."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW, Optimizer

import lorafx
from conftest import Zoo, leaves, loss_of, randomize
from lorafx import AdapterError, LoraSpec
from lorafx.graph import CapturedModule
from lorafx.ir import format_graph
from lorafx.passes.resize import fit_ranks, resize
from tolerances import assert_close
from zoo import FAMILIES, Family

SPEC = LoraSpec(variant="adalora", r=6, alpha=9)
EXPERTS = LoraSpec(
    variant="adalora", r=6, alpha=9, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]
)
MLP, BERT = FAMILIES["mlp"], FAMILIES["bert"]
CASES = {"mlp": SPEC, "bert": SPEC, "gpt2": SPEC, "mixtral": EXPERTS}


def masked(gm: CapturedModule) -> dict[str, list[int]]:
    """Random values, and zeros for the ranks to go: all of the first site's, the odd ones of the others."""
    randomize(gm)
    kept = {}
    with torch.no_grad():
        for index, site in enumerate(lorafx.sites(gm)):
            left = [] if index == 0 else [4, 2, 0]
            gone = [i for i in range(site.r) if i not in left]
            site.parameters(gm)["lora_E"][..., gone, :] = 0.0
            kept[site.name] = left
    return kept


def outputs(gm: CapturedModule, family: Family) -> list[Tensor]:
    return leaves(gm.eval()(**family.inputs()))


@pytest.mark.parametrize("name", CASES)
def test_sliced_computes_what_masked_did(zoo: Zoo, name: str) -> None:
    family = FAMILIES[name]
    gm = zoo.adapted(family, CASES[name])
    kept = masked(gm)
    before = outputs(gm, family)
    loss_of(gm, family).backward()
    first = {site.name: site for site in lorafx.sites(gm)}
    old = {site.name: site.parameters(gm) for site in lorafx.sites(gm)}
    resize(gm, kept)
    for actual, expected in zip(outputs(gm, family), before, strict=True):
        assert_close("model", actual, expected)
    for site in lorafx.sites(gm):
        assert (site.r, site.scaling) == (len(kept[site.name]), first[site.name].scaling)
        for parameter, new in site.parameters(gm).items():
            dim = -1 if parameter == "lora_B" else -2
            index = torch.tensor(kept[site.name], dtype=torch.long)
            was = old[site.name][parameter]
            assert torch.equal(new, was.index_select(dim, index))
            assert new.requires_grad == (site.r > 0)
            assert was.grad is not None
            if site.r:
                assert new.grad is not None
                assert torch.equal(new.grad, was.grad.index_select(dim, index))
    grads = [{n: p.grad for n, p in s.parameters(gm).items()} for s in lorafx.sites(gm) if s.r]
    gm.zero_grad()
    loss_of(gm, family).backward()
    for site, expected_grads in zip((s for s in lorafx.sites(gm) if s.r), grads, strict=True):
        for parameter, new in site.parameters(gm).items():
            expected_grad = expected_grads[parameter]
            assert new.grad is not None
            assert expected_grad is not None
            assert_close("model", new.grad, expected_grad)


def test_a_graph_without_ranks_is_the_captured_one_and_costs_nothing(zoo: Zoo) -> None:
    gm = zoo.adapted(BERT, SPEC)
    resize(gm, {site.name: () for site in lorafx.sites(gm)})
    assert format_graph(gm) == gm.meta["captured"]
    for _ in range(2):
        assert not any(p.requires_grad for p in gm.parameters())
        lorafx.set_adapter(gm, "default")
    assert sum(p.numel() for n, p in gm.named_parameters() if "lora_" in n) == 0


def test_the_spec_says_the_ranks_that_are_left(zoo: Zoo) -> None:
    gm = zoo.adapted(MLP, SPEC)
    resize(gm, {"0": [5], "3": []})
    (spec,) = gm.meta["adapters"]["default"].specs
    assert {site.name: spec.rank_for(site.name) for site in lorafx.sites(gm)} == {"0": 1, "3": 0}
    assert all(spec.scaling_for(site.name) == site.scaling for site in lorafx.sites(gm))


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1), lambda p: SGD(p, lr=0.1, momentum=0.9)])
def test_the_optimizer_keeps_the_state_of_what_is_left(
    zoo: Zoo, make: Callable[[list[torch.nn.Parameter]], Optimizer]
) -> None:
    gm = zoo.adapted(MLP, SPEC)
    kept = masked(gm)
    optimizer = make([p for p in gm.parameters() if p.requires_grad])
    loss_of(gm, MLP).backward()
    optimizer.step()
    old = {site.name: {n: optimizer.state[p] for n, p in site.parameters(gm).items()} for site in lorafx.sites(gm)}
    resize(gm, kept, optimizer=optimizer)
    trained = [p for p in gm.parameters() if p.requires_grad]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, trained))
    assert {id(p) for p in optimizer.state} == set(map(id, trained))
    for site in (s for s in lorafx.sites(gm) if s.r):
        for parameter, new in site.parameters(gm).items():
            for key, value in optimizer.state[new].items():
                was = old[site.name][parameter][key]
                dim = -1 if parameter == "lora_B" else -2
                expected = was if was.dim() == 0 else was.index_select(dim, torch.tensor(kept[site.name]))
                assert torch.equal(value, expected)


def test_training_goes_on_as_if_only_what_is_left_had_ever_been(zoo: Zoo) -> None:
    """Masked ranks, whose values stay zero, change nothing; so a sliced adapter takes the same steps."""
    runs = {}
    for sliced in (True, False):
        gm = zoo.adapted(MLP, SPEC).eval()
        torch.manual_seed(1)
        kept = masked(gm)
        optimizer = AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(6):
            if step == 2 and sliced:
                resize(gm, kept, optimizer=optimizer)
            loss = loss_of(gm, MLP)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if not (sliced and step >= 2):
                with torch.no_grad():
                    for site in lorafx.sites(gm):
                        gone = [i for i in range(site.r) if i not in kept[site.name]]
                        site.parameters(gm)["lora_E"][gone] = 0.0
        runs[sliced] = torch.stack(losses)
        assert runs[sliced][-1] < runs[sliced][0]
    assert_close("model", runs[True], runs[False])


def test_copies_merge_and_adapters_on_disk_have_the_ranks(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(BERT, SPEC)
    resize(gm, masked(gm))
    expected = outputs(gm, BERT)
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):  # noqa: S301  # it is our own
        assert all(map(torch.equal, outputs(twin, BERT), expected))
        assert [s.r for s in lorafx.sites(twin)] == [s.r for s in lorafx.sites(gm)]
    for actual, wanted in zip(outputs(lorafx.merge(gm), BERT), expected, strict=True):
        assert_close("model", actual, wanted)
    lorafx.save_adapter(gm, tmp_path)
    loaded = lorafx.apply(zoo.eager(BERT), tmp_path, BERT.inputs())
    lorafx.load_adapter(loaded, tmp_path)
    assert [(s.name, s.r) for s in lorafx.sites(loaded)] == [(s.name, s.r) for s in lorafx.sites(gm)]
    for actual, wanted in zip(outputs(loaded, BERT), expected, strict=True):
        assert_close("model", actual, wanted)


def test_the_exported_file_is_that_of_the_ranks_left(zoo: Zoo, tmp_path: Path) -> None:
    gm = zoo.adapted(MLP, SPEC)
    resize(gm, masked(gm))
    report = lorafx.merge_and_export(gm, tmp_path / "model.onnx")  # compares with the unmerged graph's numbers
    assert report.parity


def test_fitted_ranks_take_values_that_are_loaded(zoo: Zoo) -> None:
    small, large = zoo.adapted(MLP, SPEC), zoo.adapted(MLP, SPEC)
    resize(small, masked(small))
    randomize(large)
    states = {id(gm): {n: t.clone() for n, t in lorafx.adapter_state_dict(gm).items()} for gm in (small, large)}
    ranks = {id(gm): {s.name: s.r for s in lorafx.sites(gm)} for gm in (small, large)}
    expected = {id(gm): outputs(gm, MLP)[0] for gm in (small, large)}
    for gm, other in ((small, large), (large, small)):
        fit_ranks(gm, ranks[id(other)])
        gm.load_state_dict(states[id(other)], strict=False)
        assert torch.equal(outputs(gm, MLP)[0], expected[id(other)])


def test_what_cannot_be_resized_is_refused_and_nothing_is_changed(zoo: Zoo) -> None:
    gm = zoo.adapted(MLP, SPEC)
    lora = zoo.adapted(MLP, LoraSpec(r=6))
    with pytest.raises(AdapterError, match=r"^site '0': the scaling of its variant follows .*; what can is adalora"):
        resize(lora, {"0": [1]})
    with pytest.raises(AdapterError, match=r"^adapter 'default' has no site '1'"):
        resize(gm, {"0": [1], "1": [1]})
    with pytest.raises(AdapterError, match=r"^site '0' has the ranks 0 to 5, each once, and not \[1, 6\]"):
        resize(gm, {"0": [1, 6]})
    with pytest.raises(AdapterError, match=r"^site '0' has the ranks 0 to 5, each once, and not \[1, 1\]"):
        resize(gm, {"0": [1, 1]})
    adafactor = Adafactor([p for p in gm.parameters() if p.requires_grad])
    loss_of(gm, MLP).backward()
    adafactor.step()
    with pytest.raises(AdapterError, match=r"'0\.lora_A\.default': the optimizer's 'row_var' is \[6, 1\] and not"):
        resize(gm, {"0": [1]}, optimizer=adafactor)
    handle = gm.get_parameter("3.lora_E.default").register_hook(lambda grad: grad)
    with pytest.raises(AdapterError, match=r"^site '3': lora_E has hooks"):
        resize(gm, {"0": [1], "3": [1]})
    handle.remove()
    lorafx.merge(gm, inplace=True)
    with pytest.raises(AdapterError, match="is merged into the weights"):
        resize(gm, {"0": [1]}, "default")
    lorafx.unmerge(gm)
    assert [s.r for s in lorafx.sites(gm)] == [6, 6]


def test_ranks_that_come_back_need_an_optimizer_that_has_them(zoo: Zoo) -> None:
    gm = zoo.adapted(MLP, SPEC)
    optimizer = AdamW([p for p in gm.parameters() if p.requires_grad])
    resize(gm, {"0": []}, optimizer=optimizer)
    with pytest.raises(AdapterError, match=r"^'0\.lora_A\.default' is not in the optimizer"):
        fit_ranks(gm, {"0": 2}, optimizer=optimizer)
    fit_ranks(gm, {"0": 2})
    assert [s.r for s in lorafx.sites(gm)] == [2, 6]
