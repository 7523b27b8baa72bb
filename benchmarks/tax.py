"""What adapters cost: a training step with them over a step of the same frozen model.

    python benchmarks/tax.py --quick                # at most three minutes: one layer, few rounds
    python benchmarks/tax.py --all                  # some hours
    python benchmarks/tax.py --model bert --dtype fp32 --r 16 --method lora --way lorafx peft --mode eager memory

The first two also write a table, its numbers and a picture to docs/ (`--out` elsewhere), and, as `--calls` does, time
`apply`, `set_adapter` and `merge` (calls.py); what is given beside them replaces what they say. One line of JSON a
measurement goes to `--log`, and what is in it is not measured again: the hours may be cut in parts, and `--report`
makes the table of all that a log holds.

A step is a forward and a backward pass of the model without its embeddings or head, which would only dilute the ratio:
the gradient goes to the embedded inputs, so that the frozen model's step has a backward pass as well. A batch has
padded rows. All variants of one case run in one process, one after the other in an order that turns around each round;
a ratio is the median over the rounds of the round's own ratio, with its quartiles. The line "frozen, again" is the
frozen model over a copy of itself: what it is off 1 is noise. Adapters change between steps, as in training. A case
where that is more than 2 % is measured again, three times at most, and the run with the least noise is shown, marked.
Step memory is the growth of the process's peak over what it held before the step, of a process each. Before anything is
timed, gradients are checked (:func:`check`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import calls
import tax_report
import torch
import transformers
from torch import Tensor, nn

import lorafx
from lorafx.passes.capture import capture

#: How far the frozen model over its own copy may be off 1, and how often a case is measured to get there.
NOISE, RUNS = 0.02, 3

#: VeRA's rank, which costs no parameters (arXiv 2310.11454, table 2).
VERA_RANK = 256

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPECS: Mapping[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"dropout": 0.1},
    "dora": {"variant": "dora"},
    "vera": {"variant": "vera"},
}


def layers() -> int:
    """How deep the models are: 4, or what TAX_LAYERS says (the ratio hardly changes with it)."""
    return int(os.environ.get("TAX_LAYERS", "4"))


@dataclass(frozen=True)
class Case:
    """One frozen model and one kind of adapter on all of its linear layers."""

    model: str
    dtype: str
    r: int
    method: str

    @property
    def spec(self) -> dict[str, Any]:
        return {"r": self.r, "alpha": 2 * self.r, "target_modules": "all-linear", **SPECS[self.method]}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """The width of BERT-base, 4 layers; a batch of 8 x 128."""
    config = transformers.BertConfig(
        vocab_size=1000, num_hidden_layers=layers(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertModel(config, add_pooling_layer=False), text(8, 128, 768)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """4 layers of width 1024, a key for each four queries; a batch of 4 x 256."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers(), num_attention_heads=16,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config), text(4, 256, 1024)


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """The width of GPT-2, 4 layers; a batch of 4 x 256."""
    config = transformers.GPT2Config(
        vocab_size=1000, n_layer=layers(), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )
    return transformers.GPT2Model(config), text(4, 256, 768)


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """The width of ViT-base, 4 layers; a batch of 8 images of 176 x 176, 122 tokens each."""
    config = transformers.ViTConfig(
        num_hidden_layers=layers(), image_size=176, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(8, 3, 176, 176)}


def text(batch: int, length: int, width: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1::2, -length // 8 :] = 0
    return {"inputs_embeds": torch.randn(batch, length, width), "attention_mask": mask}


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2, "vit": vit}


@dataclass(frozen=True)
class Step:
    """One training step of a model: a forward pass, and a backward pass from a fixed gradient."""

    model: nn.Module
    inputs: dict[str, Tensor]
    grad: Tensor

    def __call__(self) -> None:
        for tensor in (*self.model.parameters(), *self.inputs.values()):
            tensor.grad = None
        self.output().backward(self.grad)

    def output(self) -> Tensor:
        out = self.model(**self.inputs)
        return out if isinstance(out, Tensor) else out[0]

    def tensors(self) -> dict[str, Tensor]:
        """All that gets a gradient, the inputs too."""
        own = {n.removeprefix("_orig_mod."): p for n, p in self.model.named_parameters()}
        named = {**own, **{f"input {n}": v for n, v in self.inputs.items()}}
        return {n: t for n, t in named.items() if t.requires_grad}

    def update(self) -> None:
        """As an optimiser does, and not timed: what may be kept while nothing changes is not what training costs."""
        with torch.no_grad():
            for p in self.model.parameters():
                if p.requires_grad:
                    p.mul_(1 + 2**-8)

    def gradients(self) -> dict[str, Tensor]:
        self()
        return {n: t.grad.clone() for n, t in self.tensors().items() if t.grad is not None}


def frozen(case: Case) -> Step:
    """The floor. The same weights in every process."""
    torch.manual_seed(0)
    model, inputs = MODELS[case.model]()
    model = model.to(DTYPES[case.dtype]).train().requires_grad_(False)
    inputs = {n: v.to(DTYPES[case.dtype]) if v.is_floating_point() else v for n, v in inputs.items()}
    with torch.no_grad():
        shape = model(**inputs)[0].shape
    grad = torch.randn(shape).to(DTYPES[case.dtype])
    for value in inputs.values():
        if value.is_floating_point():
            value.requires_grad_()
    return Step(model, inputs, grad)


def captured(floor: Step, case: Case) -> Step:
    """The captured graph without an adapter: what capture costs by itself."""
    gm = capture(floor.model, {n: v.detach() for n, v in floor.inputs.items()})
    return Step(gm.train(), floor.inputs, floor.grad)


def adapted(floor: Step, case: Case, backend: str) -> Step:
    example = {n: v.detach() for n, v in floor.inputs.items()}
    gm = lorafx.apply(floor.model, case.spec, example, seed=0, backend=backend)
    randomise(gm)
    return Step(gm.train(), floor.inputs, floor.grad)


def peft(floor: Step, case: Case) -> Step:
    from peft import LoraConfig, VeraConfig, get_peft_model

    common = {"r": case.spec["r"], "target_modules": "all-linear"}
    if case.method == "vera":
        config: Any = VeraConfig(**common)
    else:
        config = LoraConfig(
            **common, lora_alpha=case.spec["alpha"], lora_dropout=case.spec.get("dropout", 0.0),
            use_dora=case.method == "dora",
        )  # fmt: skip
    model = copy.deepcopy(floor.model)
    model.prepare_inputs_for_generation = None
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    randomise(wrapped)
    return Step(wrapped.train(), floor.inputs, floor.grad)


def full(floor: Step, case: Case) -> Step:
    """Full fine-tuning of what the adapters adapt: the weights of all linear layers."""
    model = copy.deepcopy(floor.model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
            module.requires_grad_(True)
    return Step(model, floor.inputs, floor.grad)


def randomise(model: nn.Module) -> None:
    """Values as in the midst of training: B starts at zero, which no gradient of A survives."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.02)


WAYS: Mapping[str, Callable[[Step, Case], Step]] = {
    "frozen": lambda floor, case: floor,
    "frozen, again": lambda floor, case: Step(copy.deepcopy(floor.model), floor.inputs, floor.grad),
    "captured": captured,
    "lorafx": lambda floor, case: adapted(floor, case, "auto"),
    "lorafx, torch provider": lambda floor, case: adapted(floor, case, "torch"),
    "lorafx, reference": lambda floor, case: adapted(floor, case, "reference"),
    "peft": peft,
    "full": full,
}


def compiled(step: Step) -> Step:
    return Step(torch.compile(step.model), step.inputs, step.grad)  # type: ignore[arg-type]


def times(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Ratios to the frozen model, round by round: median and quartiles; and the median time in ms."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    names = list(steps)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            steps[name].update()
            start = time.perf_counter()
            steps[name]()
            taken[name].append(time.perf_counter() - start)
    result = {}
    for name in names:
        ratios = [a / b for a, b in zip(taken[name], taken["frozen"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {"ratio": middle, "low": low, "high": high, "ms": 1e3 * statistics.median(taken[name])}
    return result


def check(case: Case, steps: Mapping[str, Step], reference: Step) -> None:
    """Every way of lorafx's has the reference's gradients, of the inputs too; in the mode in which it will be timed.

    With dropout off: its masks are not those of the reference. With dropout on the gradient is compared with the slope
    of the step's own output, which for another mask in backward than in forward is another (:func:`check_slope`).
    """
    wanted = reference.gradients()
    bound = 1e-4 if case.dtype == "fp32" else 6e-2
    for way, step in steps.items():
        if not way.startswith("lorafx"):
            continue
        step.model.eval()
        found = step.gradients()
        step.model.train()
        if found.keys() != wanted.keys():
            raise SystemExit(f"{case}, {way}: not both have a gradient of {sorted(found.keys() ^ wanted.keys())}")
        for name, grad in wanted.items():
            off = ((found[name] - grad).float().norm() / grad.float().norm().clamp_min(1e-12)).item()
            if not off < bound:
                raise SystemExit(f"{case}, {way}: the gradient of {name} is {off:.1e} off the reference's")
        if case.method == "dropout" and case.dtype == "fp32":
            check_slope(f"{case}, {way}", step)


def check_slope(what: str, step: Step) -> None:
    """With the masks of one seed, A, B and the input have the gradients that differences of the output tell.

    In float32 only: the difference of two outputs of bfloat16 is mostly their rounding.
    """

    def value() -> float:
        torch.manual_seed(1)
        return (step.output().detach().double() * step.grad.double()).sum().item()

    torch.manual_seed(1)
    gradients, tensors = step.gradients(), step.tensors()
    for part in ("lora_A", "lora_B", "input "):
        names = [n for n in gradients if part in n]
        length, size = (norm([of[n] for n in names]) for of in (gradients, tensors))
        step_size = 1e-2 * size / length
        values = []
        for moved in (1, -2, 1):
            with torch.no_grad():
                for name in names:
                    tensors[name].add_(gradients[name], alpha=moved * step_size)
            values.append(value())
        found = (values[0] - values[1]) / (2 * step_size * length**2)
        if not abs(found - 1) < 2e-2:
            raise SystemExit(f"{what}: the slope by {part.strip()} is {found:.3f} of what the gradient says")


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def noise(found: Mapping[str, Mapping[str, float]]) -> float:
    """How far the frozen model over its own copy is off 1."""
    return abs(found["frozen, again"]["ratio"] - 1) if "frozen, again" in found else 0.0


def measure(case: Case, ways: list[str], rounds: int, mode: str, runs: int = RUNS) -> dict[str, Any]:
    """``ways``: the ratios of the run with the least noise; ``runs``: how many there were; ``steady``: little noise."""
    floor = frozen(case)
    steps = {way: WAYS[way](floor, case) for way in ways}
    if mode == "compiled":
        steps = {way: compiled(step) for way, step in steps.items()}
    check(case, steps, evaluated(adapted(floor, case, "reference")))
    found: list[dict[str, dict[str, float]]] = []
    while len(found) < runs and (not found or noise(found[-1]) > NOISE):
        found.append(times(steps, rounds))
    best = min(found, key=noise)
    return {"ways": best, "runs": len(found), "steady": noise(best) <= NOISE}


def evaluated(step: Step) -> Step:
    step.model.eval()
    return step


def peak(case: Case, way: str) -> int:
    """Bytes by which a step raises the process's peak."""
    step = WAYS[way](frozen(case), case)
    step()
    for p in step.model.parameters():
        p.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024


def memory(case: Case, ways: list[str]) -> dict[str, int]:
    """The peak of each way, in a process of its own. Small blocks go back to the system at once."""
    found = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for way in ways:
        command = [sys.executable, __file__, "--peak", json.dumps([asdict(case), way])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[way] = int(done.stdout.splitlines()[-1])
    return found


#: What is measured if it is not said: by itself, with ``--quick`` and with ``--all``.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "": {
        "model": ["bert"], "dtype": ["fp32"], "r": [16], "method": ["lora"],
        "way": ["frozen, again", "captured", "lorafx"], "mode": ["eager"], "rounds": 15,
    },
    "quick": {
        "model": ["bert", "llama"], "dtype": ["fp32"], "r": [16], "method": ["lora"],
        "way": ["frozen, again", "captured", "lorafx", "lorafx, torch provider", "peft"], "mode": ["eager"],
        "rounds": 5,
    },
    "all": {
        "model": list(MODELS), "dtype": list(DTYPES), "r": [16, 64], "method": list(SPECS),
        "way": ["frozen, again", "captured", "lorafx", "lorafx, torch provider", "peft", "full"],
        "mode": ["eager", "compiled", "memory"], "rounds": 15,
    },
}  # fmt: skip


def parse() -> argparse.Namespace:
    """The flags; what was not said is the preset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--r", nargs="+", type=int)
    parser.add_argument("--method", nargs="+", choices=SPECS)
    parser.add_argument("--way", nargs="+", choices=WAYS)
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled", "memory"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="BERT and Llama, one layer, beside PEFT")
    preset.add_argument("--all", action="store_true", help="everything that docs/tax.md shows, and more")
    preset.add_argument("--report", action="store_true", help="write what --log holds, and measure nothing")
    parser.add_argument("--calls", action="store_true", help="time apply, set_adapter and merge too")
    parser.add_argument("--log", type=Path, help="what is measured, and what needs no measuring again")
    parser.add_argument("--out", type=Path, help="folder for the table, the numbers and the picture")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name, value in PRESETS["quick" if given.quick else "all" if given.all else ""].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.quick or given.all or given.report:
        given.out = given.out or Path(__file__).parent.parent / "docs"
    given.calls |= given.quick or given.all
    if given.rounds < 2:
        parser.error("--rounds: quartiles need two rounds at least")
    if given.report and not (given.log and given.log.is_file()):
        parser.error(f"--report writes what --log holds, and {given.log or 'no --log'} is not there")
    return given


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    if given.peak:
        case, way = json.loads(given.peak)
        print(peak(Case(**case), way))
        return
    command = shlex.join(["python", "benchmarks/tax.py", *without_folder(sys.argv[1:])])
    known = logged(given.log)
    called = next((line["calls"] for line in reversed(known) if "calls" in line), [])
    known = [line for line in known if "case" in line]
    if given.report:
        tax_report.write(known, called, given.out, "tax", command)
        return
    if given.quick:
        os.environ["TAX_LAYERS"] = "1"
    if given.calls and not called:
        called = calls.measure(calls.QUICK_ROUNDS if given.quick else calls.ROUNDS)
        note(given.log, {"calls": called})
    rows = list[dict[str, Any]]()
    for case, mode in itertools.product(cases_of(given), given.mode):
        asked = identity(case, mode)
        row = next((r for r in known if asked.items() <= r.items() and {*ways_of(mode, given)} <= {*r["ways"]}), None)
        if row is None:
            row = row_of(case, mode, given)
            note(given.log, row)
        rows.append(row)
        if given.out:
            tax_report.write(rows, called, given.out, "tax-quick" if given.quick else "tax", command)


def without_folder(arguments: list[str]) -> list[str]:
    """What says how the table was made, not where it was written."""
    place = arguments.index("--out") if "--out" in arguments else len(arguments)
    return arguments[:place] + arguments[place + 2 :]


def identity(case: Case, mode: str) -> dict[str, Any]:
    """What tells a measurement from others."""
    return {"case": asdict(case), "layers": layers(), "mode": mode, "processor": tax_report.processor()}


def row_of(case: Case, mode: str, given: argparse.Namespace) -> dict[str, Any]:
    """What is measured of one case in one mode, printed as it comes."""
    ways = ways_of(mode, given)
    row = identity(case, mode)
    if mode == "memory":
        row["ways"] = memory(case, ways)
        floor = row["ways"]["frozen"]
        shown = "  ".join(f"{w}: {v / 2**20:.0f} MiB ({v / floor:.3f})" for w, v in row["ways"].items())
    else:
        row |= measure(case, ways, given.rounds, mode, 2 if given.quick else RUNS) | {"rounds": given.rounds}
        shown = "  ".join(
            f"{w}: {v['ratio']:.3f} [{v['low']:.3f}, {v['high']:.3f}] {v['ms']:.0f} ms" for w, v in row["ways"].items()
        )
    print(f"{case} {mode}{tax_report.mark(row)}  {shown}", flush=True)
    return row


def ways_of(mode: str, given: argparse.Namespace) -> list[str]:
    """A model's copy takes the memory that the model takes."""
    return ["frozen", *(w for w in given.way if mode != "memory" or w != "frozen, again")]


def logged(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def note(path: Path | None, line: Mapping[str, Any]) -> None:
    """Add a line to the log, if there is one."""
    if path:
        with path.open("a") as log:
            log.write(json.dumps(line) + "\n")


def cases_of(given: argparse.Namespace) -> list[Case]:
    """Every combination asked for, but VeRA once, at the rank of its paper."""
    every = itertools.product(given.model, given.dtype, given.r, given.method)
    return list(dict.fromkeys(Case(m, d, VERA_RANK if k == "vera" else r, k) for m, d, r, k in every))


if __name__ == "__main__":
    main()
