"""The benchmarks `tax.py` and `qlora.py` at a tiny size: what is checked before it is timed, and what they write."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorafx
from lorafx.kernels.aten import Aten
from lorafx.kernels.base import Adapters, Provider
from lowered import replaced

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import calls
import qlora
import tax
import tax_report

TORCH = "lorafx, torch provider"
VECTORS = tax_report.vectors({"processor": tax_report.processor()})


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def tiny() -> tuple[nn.Module, dict[str, Tensor]]:
    return bert(), tax.text(2, 16, 16)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tax, "MODELS", dict.fromkeys(tax.MODELS, tiny))
    monkeypatch.setattr(calls, "model", lambda: bert().eval())
    monkeypatch.setattr(calls, "QUICK_ROUNDS", 2)
    monkeypatch.setenv("TAX_LAYERS", "1")  # which main may change


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "bf16"), ("dropout", "fp32"), ("dora", "fp32"), ("vera", "fp32")]
)
def test_every_way_is_checked_and_timed(method: str, dtype: str) -> None:
    found = tax.measure(tax.Case("bert", dtype, 4, method), list(tax.WAYS), 3, "eager", 1)
    assert list(found["ways"]) == list(tax.WAYS)
    assert found["ways"]["frozen"]["ratio"] == 1.0
    assert all(0 < v["low"] <= v["ratio"] <= v["high"] and v["ms"] > 0 for v in found["ways"].values())


def test_compiled_ways_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[type] = []
    real = tax.check

    def check(case: Any, steps: Any, reference: Any) -> None:
        checked.append(type(steps["lorafx"].model))
        real(case, steps, reference)

    monkeypatch.setattr(tax, "check", check)
    tax.measure(tax.Case("bert", "fp32", 4, "dropout"), ["frozen", "lorafx"], 2, "compiled")
    assert checked == [torch._dynamo.eval_frame.OptimizedModule]


class WrongX(Aten):
    """Gives queries, keys and values, which the input meets first, a wrong gradient of it."""

    def grad_x(self, bases: Sequence[Tensor], *arguments: Any) -> Tensor:
        return super().grad_x(bases, *arguments) * (2.0 if len(bases) == 3 else 1.0)


class OtherMasks(Aten):
    """Drops other elements in backward than in forward."""

    def grad_right(
        self, x: Tensor, ds: Tensor, rights: Sequence[Tensor], adapters: Adapters, masks: Tensor | None
    ) -> list[Tensor]:
        return super().grad_right(x, ds, rights, adapters, None if masks is None else masks.roll(1, -1))


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [("lora", WrongX, "the gradient of input"), ("dropout", OtherMasks, "the slope by lora_A is 0.")],
)
def test_wrong_gradients_are_not_timed(method: str, broken: type[Provider], message: str) -> None:
    with replaced("torch", broken), pytest.raises(SystemExit, match=message):
        tax.measure(tax.Case("bert", "fp32", 4, method), ["frozen", TORCH], 2, "eager")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    width = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    monkeypatch.setattr(qlora, "WIDTH", width)


def test_quantized_bases_are_checked_and_timed(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="is for Linux on x86-64 only")
    qlora.time_steps(list(qlora.WAYS), 512, 2, torch.float32)
    shown = capsys.readouterr().out
    assert [row.split("|")[1].strip() for row in shown.splitlines()[4:]] == ["frozen", "frozen, again", *qlora.WAYS]


def test_wrong_gradients_over_a_quantized_base_are_not_timed(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowered(*given: Any) -> Any:
        gm = real(*given)
        lorafx.lower(gm, "torch")
        return gm

    real = qlora.lorafx_on
    monkeypatch.setattr(qlora, "lorafx_on", lowered)
    with replaced("torch", WrongX), pytest.raises(SystemExit, match=r"the gradient of .* off the reference's"):
        qlora.time_steps(["lorafx, nf4"], 512, 2, torch.float32)


@pytest.mark.parametrize(
    ("floors", "best", "runs", "steady", "mark"),
    [
        ([0.99], 0.99, 1, True, ""),
        ([1.05, 1.01], 1.01, 2, True, ", again"),
        ([1.05, 0.97, 1.04], 0.97, 3, False, ", noisy"),
    ],
)
def test_a_noisy_case_is_measured_again(
    floors: list[float], best: float, runs: int, steady: bool, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(floors)
    monkeypatch.setattr(tax, "times", lambda steps, rounds: {"frozen, again": {"ratio": next(given)}})
    found = tax.measure(tax.Case("bert", "fp32", 4, "lora"), ["frozen", "frozen, again"], 2, "eager")
    assert found == {"ways": {"frozen, again": {"ratio": best}}, "runs": runs, "steady": steady}
    assert tax_report.mark({"mode": "eager", **found}) == mark


def test_the_quick_version_writes_a_table_numbers_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tax.py", "--quick", "--threads", "1", "--out", str(tmp_path)])
    tax.main()
    ways = {"frozen", "frozen, again", "captured", "lorafx", TORCH, "peft"}
    found = json.loads((tmp_path / "tax-quick.json").read_text())
    assert [set(row["ways"]) for row in found["steps"]] == [ways, ways]
    assert [row["case"]["model"] for row in found["steps"]] == ["bert", "llama"]
    assert [call["call"] for call in found["calls"]] == ["apply", "set_adapter", "merge"]
    text = (tmp_path / "tax-quick.md").read_text()
    assert "| adapters | mode | vectors | rounds | goal | " in text
    assert "| frozen, again | captured | lorafx | lorafx, torch provider |" in text
    assert text.count("| 1 | fp32 | 16 | lora | eager") == 2
    assert text.count(" | 5 | 1.06 | ") == 2
    assert "| `set_adapter` |" in text
    assert (tmp_path / "tax-quick.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("lorafx, torch provider:") == 2


def test_memory_is_shown_over_the_frozen_models() -> None:
    case = {"model": "bert", "dtype": "fp32", "r": 4, "method": "lora"}
    row = {"case": case, "layers": 2, "mode": "memory", "processor": "a, b", "ways": {"frozen": 200, "peft": 300}}
    shown = tax_report.markdown([row], [], "tax", "python tax.py")
    assert "| bert | 2 | fp32 | 4 | lora | memory | b |  |  | 1.50 |" in shown


def test_what_the_log_holds_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, out = tmp_path / "tax.jsonl", tmp_path / "docs"
    command = [
        "tax.py",
        "--way",
        "frozen, again",
        "lorafx",
        "--mode",
        "memory",
        "--log",
        str(log),
        "--out",
        str(out),
        "--method",
    ]
    monkeypatch.setattr(tax, "memory", lambda case, ways: dict.fromkeys(ways, 100))
    monkeypatch.setattr(sys, "argv", [*command, "lora"])
    tax.main()
    monkeypatch.setattr(tax, "memory", lambda case, ways: {"frozen": 100, "lorafx": 110})
    monkeypatch.setattr(sys, "argv", [*command, "lora", "dora"])
    tax.main()
    assert len(log.read_text().splitlines()) == 2
    table = (out / "tax.md").read_text()
    assert f"| 16 | lora | memory | {VECTORS} |  | 1.10 | 1.00 |" in table
    assert f"| 16 | dora | memory | {VECTORS} |  | 1.20 | 1.10 |" in table
    monkeypatch.setattr(sys, "argv", ["tax.py", "--report", "--log", str(log), "--out", str(tmp_path / "again")])
    tax.main()
    again = (tmp_path / "again" / "tax.md").read_text()
    assert again.splitlines()[4:] == table.splitlines()[4:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--report"], "no --log is not there"),
        (["--report", "--log", "mistyped.jsonl"], "mistyped.jsonl is not there"),
        (["--rounds", "1"], "quartiles need two rounds"),
        (["--quick", "--all"], "not allowed with"),
    ],
)
def test_flags_that_cannot_be_followed(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tax.py", *flags])
    with pytest.raises(SystemExit):
        tax.main()
    assert words in capsys.readouterr().err


def test_flags_beside_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tax.py", "--all", "--model", "vit", "--r", "8", "64"])
    given = tax.parse()
    assert (given.model, given.mode) == (["vit"], ["eager", "compiled", "memory"])
    cases = tax.cases_of(given)
    assert {c.r for c in cases if c.method != "vera"} == {8, 64}
    assert [c.r for c in cases if c.method == "vera"] == [256] * 2


def test_calls_are_logged_and_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = [{"call": "apply", "lorafx": 2.0, "peft": 1.0, "ratio": 2.0}]
    times = iter([called])
    monkeypatch.setattr(tax.calls, "measure", lambda rounds: next(times))
    monkeypatch.setattr(tax, "memory", lambda case, ways: dict.fromkeys(ways, 100))
    command = ["tax.py", "--calls", "--mode", "memory", "--log", str(tmp_path / "log"), "--out", str(tmp_path)]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        tax.main()
    assert "| `apply` | 2.0 | 1.0 | 2.00 |" in (tmp_path / "tax.md").read_text()
