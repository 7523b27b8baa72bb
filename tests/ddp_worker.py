"""One of two processes that test_ddp.py starts through torchrun; the first writes DIRECTORY/found.json.

``ddp_worker.py DIRECTORY`` trains under DistributedDataParallel and under LoraTrainer, over gloo. In
float64, so that what is left of a difference between one process and two is no rounding.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import lorafx
from conftest import randomize
from lorafx.errors import AdapterError
from lorafx.integrations.huggingface import LoraTrainer
from tolerances import error
from zoo import FAMILIES

FAMILY = FAMILIES["bert"]


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """A batch of four, no two rows alike."""
    generator = torch.Generator().manual_seed(5)
    shape = (4, 9)
    inputs = {
        "input_ids": torch.randint(3, 90, shape, generator=generator),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
    }
    return inputs, torch.arange(4) % 3


def gradients(module: nn.Module, rows: slice) -> dict[str, Tensor]:
    module.zero_grad()
    inputs, labels = batch()
    module(**{n: v[rows] for n, v in inputs.items()}, labels=labels[rows]).loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def logits(module: nn.Module) -> Tensor:
    found: Tensor = module(**batch()[0]).logits.detach()
    return found


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank = dist.get_rank()
    spec = lorafx.LoraSpec(r=3, alpha=6, dropout=0.1)
    gm = lorafx.apply(FAMILY.build().double(), spec, FAMILY.inputs(), seed=0)
    randomize(gm, 0.1)
    alone = copy.deepcopy(gm)
    half = slice(2 * rank, 2 * rank + 2)
    ddp = DistributedDataParallel(gm)
    found: dict[str, Any] = {"providers": sorted({row.provider for row in lorafx.explain(gm).rows})}

    ddp.eval()  # without dropout, whose masks one process draws otherwise than two
    alone.eval()
    found["eval_draws_nothing"] = torch.equal(logits(ddp), logits(ddp))
    together = {n.removeprefix("module."): g for n, g in gradients(ddp, half).items()}
    expected = gradients(alone, slice(0, 4))
    found["same_parameters"] = sorted(expected) == sorted(together)
    found["gradient_error"] = max(error(together[n], expected[n]) for n in expected)

    ddp.train()
    found["train_drops"] = not torch.equal(logits(ddp), logits(ddp))
    gm.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(rank)  # masks of its own in each process
    gradients(ddp, half)
    optimizer.step()
    ddp.eval()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, {n: p.detach() for n, p in gm.named_parameters() if p.requires_grad})
    found["processes_agree_after_a_step"] = all(torch.equal(both[0][n], both[1][n]) for n in both[0])

    lorafx.add_adapter(gm, lorafx.LoraSpec(r=2), "other", seed=1)
    try:
        lorafx.set_adapter(gm, "other")
    except AdapterError as refused:
        found["switch_refused"] = str(refused)
    del ddp
    lorafx.set_adapter(gm, "other")
    randomize(gm, 0.1)
    rewrapped = DistributedDataParallel(gm.eval())
    dist.all_gather_object(both, {n.removeprefix("module."): g for n, g in gradients(rewrapped, half).items()})
    found["switched_parameters"] = sorted(both[0])
    found["processes_agree_after_switching"] = all(torch.equal(both[0][n], both[1][n]) for n in both[0])

    inputs, labels = batch()
    rows = [{**{n: v[i] for n, v in inputs.items()}, "labels": labels[i]} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(directory / "run"),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=1,
        max_steps=2,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = LoraTrainer(alone, arguments, train_dataset=rows)
    trainer.train()
    dist.all_gather_object(both, {n: p.detach() for n, p in alone.named_parameters() if p.requires_grad})
    found["processes_agree_after_the_trainer"] = all(torch.equal(both[0][n], both[1][n]) for n in both[0])
    if rank == 0:
        (directory / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
