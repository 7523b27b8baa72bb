"""RankScheduler: takes ranks away from AdaLoRA sites while they train, where they matter least (arXiv 2303.10512).

    for batch in data:
        (gm(**batch).loss + scheduler.penalty()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

Each rank of a site is a triplet of a value (``lora_E``) and two vectors (a row of ``lora_A``, a column of ``lora_B``).
With the gradient g of step t, each element w of them has (the paper's importance-aware rank allocation)

    I = |w g|                                   sensitivity
    S = beta1 S + (1 - beta1) I                 smoothed
    U = beta2 U + (1 - beta2) |I - S|           uncertainty
    s = S U                                     importance

and a triplet the sum of its value's and its vectors' means (:func:`lorafx.variants.adalora.scores`). The budget of
ranks falls from what the sites have, b0, to ``target_r`` times the number of sites, bT, over ``total_steps = T``:

    b(t) = b0                                                   t <= tinit
           bT + (b0 - bT) (1 - (t - tinit) / (T - tfinal - tinit))^3
           bT                                                   t >= T - tfinal

Every ``deltaT`` steps the b(t) triplets with the highest scores, of all sites together, are kept, and the values of the
others are set to zero. Steps count from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafx.errors import AdapterError, SpecError
from lorafx.graph import CapturedModule
from lorafx.ir import Adapter, Site, find_adapter
from lorafx.passes.resize import fit_ranks, refuse_unsliceable, resize
from lorafx.variants import VARIANTS
from lorafx.variants.adalora import Schedule, orthogonality, scores

#: How the variant calls ``total_steps`` among its options, as PEFT does.
_OPTION = {"total_steps": "total_step"}


class RankScheduler:
    """Takes ranks away from the AdaLoRA sites of an adapter while it trains; see the module's docstring.

    ``step()`` belongs after ``loss.backward()`` and ``optimizer.step()`` and before ``zero_grad()``, once for each
    step of the optimizer. (Under a Hugging Face Trainer,
    :class:`lorafx.integrations.huggingface.RankSchedulerCallback` makes the calls.) The gradients must be whole: with
    accumulation those of all parts, with a GradScaler unscaled ones, as they are after ``scaler.step(optimizer)``; a
    step that it skipped is none for the scheduler either.

    Ranks that were taken are at first masked: their value is zero, and it may grow again, so that they can come back at
    the next allocation. With ``shrink``, parameters are sliced, the graph rewritten and the optimizer's state kept
    (:func:`lorafx.passes.resize.resize`), down to a site without any node:

    - ``"end"``: at the last allocation, when nothing can come back. Until then the numbers are those of the paper and
      of PEFT, which never slices while it trains.
    - ``"always"``: at each allocation. Faster, and another algorithm: what is gone is gone.
    - ``False``: only by :meth:`finish`.

    Where several processes train (torch.distributed with more than one), parameters must not be replaced: those of
    DistributedDataParallel would go on being reduced, and the new ones would silently differ from process to process.
    There, ``"end"`` masks to the end and leaves shrinking to :meth:`finish`, and ``"always"`` is refused.
    Importance needs no communication, since the gradients are the same in all processes.

    Args:
        gm: a graph from :func:`lorafx.apply` with a spec of variant ``"adalora"``.
        optimizer: what trains it; all the sites' parameters are in it.
        total_steps, target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight: None: as the options of the spec
            say (``total_steps`` is PEFT's ``total_step``).
        shrink: see above.
        adapter: which one; None: the one that is active.

    Raises:
        AdapterError: the adapter has no AdaLoRA sites, or they do not train with this optimizer; ``"always"``
            where several processes train.
        SpecError: a value is not allowed, or the values leave nothing to schedule.
    """

    def __init__(
        self,
        gm: CapturedModule,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        target_r: int | None = None,
        tinit: int | None = None,
        tfinal: int | None = None,
        deltaT: int | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        orth_reg_weight: float | None = None,
        shrink: Literal["end", "always", False] = "end",
        adapter: str | None = None,
    ) -> None:
        found = find_adapter(gm, adapter)
        given = {
            "total_steps": total_steps, "target_r": target_r, "tinit": tinit, "tfinal": tfinal, "deltaT": deltaT,
            "beta1": beta1, "beta2": beta2, "orth_reg_weight": orth_reg_weight,
        }  # fmt: skip
        self.gm = gm
        self.optimizer = optimizer
        self.adapter = found.name
        self.schedule = _schedule(found, {n: value for n, value in given.items() if value is not None})
        self.steps = 0
        self.finished = False
        if shrink not in ("end", "always", False):
            raise SpecError(f"RankScheduler.shrink={shrink!r} is not allowed: expected 'end', 'always' or False.")
        self.shrink = shrink
        self._first = {site.name: site.r for site in self._sites()}
        self._kept: dict[str, list[bool]] = {}
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._sliceable = shrink is False
        self._check()

    @property
    def budget(self) -> int:
        """How many ranks all sites may have together now."""
        return self._budget(self.steps)

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks that each site has kept, by name, whether the others are masked or gone."""
        return {s.name: sum(self._kept[s.name]) if s.name in self._kept else s.r for s in self._sites()}

    def step(self) -> None:
        """Take account of this step's gradients and, where the schedule says so, take ranks away.

        Raises:
            AdapterError: a gradient is missing, NaN or Inf; the adapter is not active; the optimizer's state could not
                be sliced (at the first step); or :meth:`finish` was called. Nothing is changed.
        """
        if self.finished:
            raise AdapterError(
                "RankScheduler: finish() was called, so there are no ranks to schedule; call step() no more. (A "
                "DistributedDataParallel around the graph from before must be made anew.)"
            )
        if self.adapter not in self.gm.meta.get("active", ()):
            raise AdapterError(
                f"RankScheduler: adapter '{self.adapter}' is not active (or merged in place), so no gradient of this "
                "step is its own: call step() only after steps in which it trained"
            )
        step, last = self.steps + 1, self.schedule.last
        if self.shrink == "always":
            _refuse_processes()
        if not self._sliceable:  # the optimizer has its state by now; better told at the first step than at the last
            refuse_unsliceable(self.gm, self.adapter, self.optimizer)
            self._sliceable = True
        if step < last:
            self._observe()
        if self.schedule.allocates(step):
            self._allocate(self._budget(step))
        elif step > last:
            self._mask()
        self.steps = step
        if step >= last:
            self._sensitivity.clear()
            self._uncertainty.clear()
        if self.shrink == "always" or (self.shrink == "end" and step == last and _processes() == 1):
            self._slice()

    def penalty(self) -> Tensor:
        """``orth_reg_weight`` times how far from orthogonal the factors are on average, to be added to the loss.

        ``mean over all P and Q of ||P^T P - I||`` and ``||Q Q^T - I||`` (Frobenius), as in PEFT; a scalar in
        float32 or better. (The paper's has squares.)
        """
        sites = self._sites()
        device = next(iter(sites[0].parameters(self.gm).values())).device
        with torch.autocast(device.type, enabled=False):
            gaps = [orthogonality(site.parameters(self.gm)).to(device) for site in sites]
        return self.schedule.orth_reg_weight * torch.stack(gaps).sum() / (2 * len(gaps))

    def add_penalty_gradient(self, scale: float = 1.0) -> None:
        """Add the gradient of ``scale * penalty()`` to the parameters', for loops whose loss is not at hand.

        Call it before the first backward of a step, in every process: it is then averaged, accumulated and clipped as
        if the penalty were a part of the loss, and runs no hooks.
        """
        parameters = [p for s in self._sites() if s.r for n, p in s.parameters(self.gm).items() if n != "lora_E"]
        if not parameters:
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.penalty() * scale, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def finish(self) -> None:
        """Slice away what the last allocation did not keep, and end the schedule.

        For when ranks were masked only, after training, or before going on without the scheduler. A
        DistributedDataParallel around the graph must not be used any more afterwards: wrap the graph again.
        """
        self._mask()
        self._slice()
        self.finished = True

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: plain JSON data, and tensors by name under ``"tensors"``.

        It goes into a checkpoint with the graph's state dict (or the adapter) and the optimizer's.
        """
        tensors = {f"sensitivity.{n}": t for n, t in self._sensitivity.items()}
        tensors |= {f"uncertainty.{n}": t for n, t in self._uncertainty.items()}
        return {
            "schedule": asdict(self.schedule),
            "shrink": self.shrink,
            "steps": self.steps,
            "finished": self.finished,
            "first": dict(self._first),
            "ranks": {site.name: site.r for site in self._sites()},
            "kept": {name: list(mask) for name, mask in self._kept.items()},
            "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Load the graph's values and the optimizer's state afterwards.

        The sites get the ranks that they had; the optimizer's parameters follow.

        Raises:
            AdapterError: the state is of other settings or other sites, and which. Nothing is changed.
        """
        if differing := _differences(state, self):
            raise AdapterError(f"RankScheduler: the state is not of this run: {'; '.join(differing)}")
        fit_ranks(self.gm, state["ranks"], self.adapter, self.optimizer)
        self.steps, self.finished = int(state["steps"]), bool(state["finished"])
        self._first = dict(state["first"])
        self._kept = {name: list(mask) for name, mask in state["kept"].items()}
        parameters = {n: p for site in self._sites() for n, p in self._named(site).items()}
        for what, store in (("sensitivity", self._sensitivity), ("uncertainty", self._uncertainty)):
            store.clear()
            for name, parameter in parameters.items():
                if (value := state["tensors"].get(f"{what}.{name}")) is not None:
                    store[name] = value.detach().to(parameter.device).clone()

    # Steps

    def _sites(self) -> list[Site]:
        found = find_adapter(self.gm, self.adapter)
        return [site for site in found.sites if VARIANTS[site.variant].shrinks]

    def _named(self, site: Site) -> dict[str, nn.Parameter]:
        """A site's parameters by their names in the state dict."""
        return {site.parameter_names[n]: p for n, p in site.parameters(self.gm).items()}

    def _budget(self, step: int) -> int:
        first = sum(self._first.values())
        return self.schedule.budget(step, first, self.schedule.target_r * len(self._first))

    def _observe(self) -> None:
        """Update sensitivity and uncertainty of every element."""
        parameters = {n: p for site in self._sites() if site.r for n, p in self._named(site).items()}
        gradients: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if parameter.grad is None:
                raise AdapterError(
                    f"RankScheduler.step: '{name}' has no gradient. Call step() after loss.backward() and "
                    "optimizer.step(), before zero_grad(), with the adapter active"
                )
            gradients[name] = parameter.grad
        if gradients and not bool(nn.utils.get_total_norm(gradients.values()).isfinite()):
            odd = next((n for n, g in gradients.items() if not bool(g.isfinite().all())), "all together")
            raise AdapterError(
                f"RankScheduler.step: the gradient of '{odd}' holds NaN or Inf. Where a GradScaler skips the "
                "optimizer's step, leave out this one too; otherwise lower the learning rate"
            )
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        with torch.no_grad():
            for name, parameter in parameters.items():
                wide = torch.promote_types(parameter.dtype, torch.float32)
                new = (parameter.to(wide) * gradients[name].to(wide)).abs()
                if name not in self._sensitivity:
                    self._sensitivity[name], self._uncertainty[name] = torch.zeros_like(new), torch.zeros_like(new)
                smoothed = self._sensitivity[name].mul_(beta1).add_(new, alpha=1 - beta1)
                self._uncertainty[name].mul_(beta2).add_((new - smoothed).abs(), alpha=1 - beta2)

    def _scores(self, site: Site) -> Tensor:
        names = site.parameter_names
        return scores({n: self._sensitivity[name] * self._uncertainty[name] for n, name in names.items()})

    def _allocate(self, budget: int) -> None:
        """Keep the ``budget`` ranks with the highest scores; of equal ones the first."""
        sites = [site for site in self._sites() if site.r]
        if not sites:
            return
        of_sites = [self._scores(site) for site in sites]
        scored = torch.cat([s.to(of_sites[0].device, torch.float64) for s in of_sites])
        kept = torch.zeros(len(scored), dtype=torch.bool)
        kept[scored.sort(descending=True, stable=True).indices[:budget].cpu()] = True
        masks = torch.split(kept, [site.r for site in sites])
        self._kept.update({s.name: mask.tolist() for s, mask in zip(sites, masks, strict=True)})
        self._mask()

    def _mask(self) -> None:
        """Set the values of the ranks that were not kept to zero."""
        with torch.no_grad():
            for site in self._sites():
                if not all(kept := self._kept.get(site.name, [])):
                    values = site.parameters(self.gm)["lora_E"]
                    values.masked_fill_(~torch.tensor(kept, device=values.device).unsqueeze(-1), 0.0)

    def _slice(self) -> None:
        """Take away the ranks that were not kept."""
        sites = [site for site in self._sites() if not all(self._kept.get(site.name, []))]
        left = {s.name: [i for i, kept in enumerate(self._kept[s.name]) if kept] for s in sites}
        resize(self.gm, left, self.adapter, self.optimizer)
        for site in sites:
            for parameter, name in site.parameter_names.items():
                dim = -1 if parameter == "lora_B" else -2
                for store in (self._sensitivity, self._uncertainty):
                    if (value := store.pop(name, None)) is not None and left[site.name]:
                        store[name] = value.index_select(dim, torch.tensor(left[site.name], device=value.device))
            self._kept[site.name] = [True] * len(left[site.name])

    def _check(self) -> None:
        """Refuse what could not be scheduled to the end."""
        if self.shrink == "always":
            _refuse_processes()
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in ((n, p) for site in self._sites() if site.r for n, p in self._named(site).items()):
            if type(parameter) is not nn.Parameter:
                raise AdapterError(
                    f"'{name}' is a {type(parameter).__name__}: importance is that of whole rows and columns, which "
                    "parts of a sharded parameter do not tell. Train without sharding (DistributedDataParallel works)"
                )
            if not parameter.requires_grad or id(parameter) not in held:
                why = "is not in the optimizer" if parameter.requires_grad else "does not require a gradient"
                raise AdapterError(
                    f"'{name}' {why}: make the adapter the active one (set_adapter), and the optimizer one of "
                    "[p for p in gm.parameters() if p.requires_grad]"
                )


def _schedule(adapter: Adapter, given: Mapping[str, Any]) -> Schedule:
    """The settings: as given, otherwise as the options of the adapter's specs say; checked."""
    specs = [spec for spec in adapter.specs if VARIANTS[spec.variant].shrinks]
    if not specs or not any(VARIANTS[site.variant].shrinks for site in adapter.sites):
        raise AdapterError(
            f"adapter '{adapter.name}' has no AdaLoRA sites, whose ranks could be scheduled: apply "
            'LoraSpec(variant="adalora", r=12, ...)'
        )
    options = VARIANTS[specs[0].variant].options
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Schedule)):
        option, where = _OPTION.get(name, name), f"RankScheduler.{name}"
        said = dict.fromkeys([given[name]] if name in given else (spec.options[option] for spec in specs))
        if len(said) > 1:
            raise SpecError(f"{where}: the specs of adapter '{adapter.name}' say {list(said)}; give one value for all.")
        values[name] = options[option].check(where, next(iter(said)))
        if values[name] is None:
            raise SpecError(f"{where} is missing: say how many steps of the optimizer the training has.")
    schedule = Schedule(**values)
    if schedule.last <= max(schedule.tinit, 1):
        raise SpecError(
            f"RankScheduler: total_steps={schedule.total_steps}, tinit={schedule.tinit} and tfinal={schedule.tfinal} "
            "leave no steps to take ranks away in: tinit + tfinal must be below total_steps."
        )
    if all(spec.r <= schedule.target_r for spec in specs):
        raise SpecError(
            f"RankScheduler.target_r={schedule.target_r} is not allowed: the sites start with r={specs[0].r}, so no "
            "rank would be taken away. Start with about half as many again (LoraSpec.r), or lower target_r."
        )
    return schedule


def _differences(state: Mapping[str, Any], scheduler: RankScheduler) -> list[str]:
    """What a state has otherwise than a scheduler, for people."""
    own = scheduler.state_dict()
    if absent := [key for key in own if key not in state]:
        return [f"it has no {', '.join(absent)}"]
    pairs = [(n, state["schedule"].get(n), value) for n, value in own["schedule"].items()]
    pairs.append(("shrink", state["shrink"], own["shrink"]))
    found = [f"{name} is {theirs!r} there and {ours!r} here" for name, theirs, ours in pairs if theirs != ours]
    sites = {site.name: site for site in scheduler._sites()}
    found += [f"site '{n}' is only there" for n in state["ranks"] if n not in sites]
    found += [f"site '{n}' is only here" for n in sites if n not in state["ranks"]]
    if found:
        return found
    for name, site in sites.items():
        shapes = replace(site, r=state["ranks"][name]).parameter_shapes()
        for parameter, shape in shapes.items():
            for what in ("sensitivity", "uncertainty"):
                value = state["tensors"].get(f"{what}.{site.parameter_names[parameter]}")
                if value is not None and tuple(value.shape) != shape:
                    found.append(
                        f"site '{name}': {what} of {parameter} is {list(value.shape)} there and {list(shape)} here"
                    )
    return found


def _processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _refuse_processes() -> None:
    if (count := _processes()) > 1:
        raise AdapterError(
            f"RankScheduler: shrink='always' would replace parameters while {count} processes train together, and "
            "DistributedDataParallel would go on reducing the old ones: the new ones would silently differ from "
            "process to process. Use shrink='end', which masks ranks there, and call finish() after training"
        )
