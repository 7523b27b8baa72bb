"""For transformers' trainers: checkpoints that hold the adapter only, and AdaLoRA's ranks (the extra ``lorafx[hf]``).

What :func:`lorafx.apply` returns trains under the stock ``transformers.Trainer``: mixed precision,
``activation_checkpointing``, ``evaluate`` and ``predict`` need nothing from here. The stock trainer asks
a model's class how to save it, though, and writes the whole state dict of any but its own models, and
PEFT's; of a model with tied weights it cannot write even that. :class:`LoraTrainer` differs in this alone.

The loss is the one that was captured, a mean over each batch. With ``gradient_accumulation_steps`` the
trainer therefore averages the means of the batches, which for language models is not the mean over all
their tokens. Pass ``compute_loss_func`` for that one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from lorafx.checkpoint import CHECKPOINT_NAME, load_checkpoint, save_checkpoint
from lorafx.errors import AdapterError, PassError, SpecError
from lorafx.graph import CapturedModule
from lorafx.ir import Stage, find_adapter, stage
from lorafx.passes.resize import fit_ranks
from lorafx.rank_scheduler import RankScheduler
from lorafx.spec import PEFT_CONFIG_NAME, LoraSpec
from lorafx.state import load_adapter, save_adapter
from lorafx.variants import VARIANTS

#: The file with a rank scheduler's state, beside ``optimizer.pt`` in a checkpoint.
RANKS_NAME = "rank_scheduler.safetensors"


class RankSchedulerCallback(TrainerCallback):
    """AdaLoRA's :class:`~lorafx.rank_scheduler.RankScheduler` for a trainer: ``callbacks=[RankSchedulerCallback()]``.

    It takes the trainer's model and optimizer, adds the gradient of the penalty before each step's first
    backward pass, so that it is averaged and clipped with the loss's, and leaves out steps that a GradScaler skips.
    The losses that the trainer reports are those without the penalty. The checkpoints of :class:`LoraTrainer` hold its
    state too; the stock trainer's do not, and resuming from those is refused.

    Args:
        options: those of :class:`~lorafx.rank_scheduler.RankScheduler` (``target_r=4``); ``total_steps`` is the
            trainer's number of steps, if neither they nor the spec give one.

    Raises:
        AdapterError, SpecError: as RankScheduler, when training begins; the schedule has more steps than the training.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.scheduler: RankScheduler | None = None
        self._resumed: dict[str, Any] | None = None

    def on_train_begin(  # type: ignore[override]  # the trainer passes its parts by keyword
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: CapturedModule,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        if state.global_step > 0 and self._resumed is None:
            raise PassError(
                "RankSchedulerCallback: this checkpoint does not say how far the ranks have come. Resume with "
                f"LoraTrainer from a checkpoint that it wrote with this callback (it holds {RANKS_NAME})"
            )
        options = dict(self.options)
        known = {spec.options.get("total_step") for spec in find_adapter(model, options.get("adapter")).specs}
        if options.get("total_steps") is None and known <= {None}:
            options["total_steps"] = state.max_steps
        scheduler = RankScheduler(model, optimizer, **options)
        if scheduler.schedule.total_steps > state.max_steps:
            raise SpecError(
                f"RankScheduler.total_steps={scheduler.schedule.total_steps} is not allowed: the training has only "
                f"{state.max_steps} steps, and the ranks would not come down. Leave it out (total_step in the spec's "
                "options too), or train for longer."
            )
        if self._resumed is not None:
            scheduler.load_state_dict(self._resumed)
            self._resumed = None
        self.scheduler = scheduler

    def on_step_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        assert self.scheduler is not None
        scaler = getattr(optimizer, "scaler", None)
        self.scheduler.add_penalty_gradient(1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        assert self.scheduler is not None
        if not getattr(optimizer, "step_was_skipped", False):
            self.scheduler.step()

    def save(self, directory: str) -> None:
        """Write the scheduler's state to a checkpoint."""
        if self.scheduler is not None:
            state = self.scheduler.state_dict()
            tensors = {name: tensor.cpu().contiguous() for name, tensor in state.pop("tensors").items()}
            save_file(tensors, Path(directory, RANKS_NAME), metadata={"state": json.dumps(state)})

    def load(self, directory: str) -> None:
        """Read it again, for when training begins."""
        path = Path(directory, RANKS_NAME)
        if not path.is_file():
            raise AdapterError(f"{path}: no such file. The checkpoint was written without a RankSchedulerCallback")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            self._resumed = {**json.loads(file.metadata()["state"]), "tensors": tensors}


class LoraTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints are adapters in PEFT's format.

    ``save_model`` goes through :func:`lorafx.state.save_adapter`. A checkpoint also has the graph's state as it is
    (:mod:`lorafx.checkpoint`), and ``resume_from_checkpoint`` and ``load_best_model_at_end`` read that: PEFT's format
    has no place for a BatchNorm's statistics, and holds what started by PiSSA in another form. With
    ``save_only_model`` they read the adapter. Everything else is the stock trainer's. For another trainer, inherit
    from both::

        class LoraSeq2SeqTrainer(LoraTrainer, Seq2SeqTrainer): ...

    Raises:
        PassError: the model is not an adapted graph, or is to be sharded (FSDP, DeepSpeed).
        AdapterError: a checkpoint cannot be written, or does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (found := stage(self._adapted())) is not Stage.INSERTED:
            raise PassError(f"LoraTrainer: this graph is {found.value}; train what lorafx.apply(model, spec) returns")
        find_adapter(self._adapted())  # refuses several active ones, of which a checkpoint could hold one
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise PassError(
                "LoraTrainer: adapters of a sharded model cannot be saved; train without FSDP and DeepSpeed "
                "(distributed data parallel works)"
            )

    def _adapted(self) -> CapturedModule:
        model: CapturedModule = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = str(output_dir if output_dir is not None else self.args.output_dir)
        super()._save(directory, state_dict={})  # the tokenizer, the arguments; and an empty model
        if self.args.should_save:
            Path(directory, SAFE_WEIGHTS_NAME).unlink()
            save_adapter(self._adapted(), directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _load(self._adapted(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        _load(self._adapted(), str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_checkpoint(self._adapted(), output_dir, step=self.state.global_step, rng=False)
            for callback in self._rank_callbacks():
                callback.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for callback in self._rank_callbacks():
                callback.load(checkpoint)

    def _rank_callbacks(self) -> Iterator[RankSchedulerCallback]:
        return (c for c in self.callback_handler.callbacks if isinstance(c, RankSchedulerCallback))


def _load(gm: CapturedModule, directory: str) -> None:
    """Load a checkpoint, or an adapter, whose ranks may be others than the graph's by now."""
    if Path(directory, CHECKPOINT_NAME).is_file():
        load_checkpoint(gm, directory, rng=False)
        return
    shrinking = [site.name for site in find_adapter(gm).sites if VARIANTS[site.variant].shrinks]
    if shrinking and Path(directory, PEFT_CONFIG_NAME).is_file():
        spec = LoraSpec.from_json(directory)
        fit_ranks(gm, {name: spec.rank_for(name) for name in shrinking})
    load_adapter(gm, directory)
