"""One of two processes that test_rank_scheduler.py starts through torchrun; the first writes DIRECTORY/found.json.

``rank_scheduler_worker.py DIRECTORY`` trains AdaLoRA under DistributedDataParallel, over gloo, each process on
its half of the batch.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import lorafx
from lorafx import AdapterError, LoraSpec, RankScheduler
from planted import planted

STEPS = 8
OPTIONS = {"target_r": 1, "tinit": 2, "tfinal": 2, "total_step": STEPS}


def same(value: Any) -> bool:
    """Whether the processes have equal values."""
    both: list[Any] = [None, None]
    dist.all_gather_object(both, value)
    return bool(both[0] == both[1])


def message(call: Any) -> str:
    try:
        call()
    except AdapterError as error:
        return str(error)
    return ""


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    task = planted(examples=64)
    spec = LoraSpec(variant="adalora", r=3, target_modules=r"layers\.\d+", options=OPTIONS)
    gm = lorafx.apply(task.base, spec, task.inputs[:4], seed=0)
    joint = copy.deepcopy(gm)
    half = slice(32 * dist.get_rank(), 32 * dist.get_rank() + 32)
    found: dict[str, Any] = {}

    ddp = DistributedDataParallel(gm)
    optimizer = AdamW([p for p in gm.parameters() if p.requires_grad], lr=1e-2)
    found["refusal"] = message(lambda: RankScheduler(gm, optimizer, shrink="always"))
    scheduler = RankScheduler(gm, optimizer)
    agree = []
    for step in range(STEPS):
        (task.loss(ddp, half) + scheduler.penalty()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step == STEPS - 3:
            found["masked"] = {s.name: int(s.parameters(gm)["lora_E"].count_nonzero()) for s in lorafx.sites(gm)}
        agree.append(same((scheduler.state_dict()["kept"], [p.tolist() for p in ddp.parameters()])))
    found["masks_agree"] = all(agree)
    found["ranks"] = scheduler.ranks
    found["first"] = [site.r for site in lorafx.sites(gm)]

    alone = AdamW([p for p in joint.parameters() if p.requires_grad], lr=1e-2)
    of_one = RankScheduler(joint, alone, shrink=False)
    for _ in range(STEPS):
        (task.loss(joint) + of_one.penalty()).backward()
        alone.step()
        of_one.step()
        alone.zero_grad()
    found["ranks_of_one_process"] = of_one.ranks

    with torch.no_grad():
        before = gm(task.inputs)
        scheduler.finish()
        found["change"] = float((gm(task.inputs) - before).abs().max() / before.abs().max())
    found["finished"] = {site.name: site.r for site in lorafx.sites(gm)}
    found["after"] = message(scheduler.step)
    again = DistributedDataParallel(gm)
    for _ in range(2):  # a parameter that nothing used would fail the second time
        task.loss(again, half).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["agree_when_wrapped_anew"] = same([p.tolist() for p in again.parameters()])
    if dist.get_rank() == 0:
        (directory / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
