"""Checkpoints that hold the adapter only, for transformers' trainers (the extra ``lorafx[hf]``).

What :func:`lorafx.apply` returns trains under the stock ``transformers.Trainer``: mixed precision,
``activation_checkpointing``, ``evaluate`` and ``predict`` need nothing from here. The stock trainer asks
a model's class how to save it, though, and writes the whole state dict of any but its own models, and
PEFT's; of a model with tied weights it cannot write even that. :class:`LoraTrainer` differs in this alone.

The loss is the one that was captured, a mean over each batch. With ``gradient_accumulation_steps`` the
trainer therefore averages the means of the batches, which for language models is not the mean over all
their tokens. Pass ``compute_loss_func`` for that one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from lorafx.errors import PassError
from lorafx.graph import CapturedModule
from lorafx.ir import Stage, stage
from lorafx.state import load_adapter, save_adapter


class LoraTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints are adapters in PEFT's format.

    ``save_model``, ``resume_from_checkpoint`` and ``load_best_model_at_end`` go through
    :func:`lorafx.state.save_adapter` and :func:`lorafx.state.load_adapter`; buffers that training updates
    outside ``modules_to_save`` (BatchNorm's) are therefore not in a checkpoint. Everything else is the
    stock trainer's. For another trainer, inherit from both::

        class LoraSeq2SeqTrainer(LoraTrainer, Seq2SeqTrainer): ...

    Raises:
        PassError: the model is not an adapted graph, or is to be sharded (FSDP, DeepSpeed).
        AdapterError: a checkpoint cannot be written, or does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (found := stage(self._adapted())) is not Stage.INSERTED:
            raise PassError(f"LoraTrainer: this graph is {found.value}; train what lorafx.apply(model, spec) returns")
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
        load_adapter(self._adapted(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self._adapted(), str(self.state.best_model_checkpoint))
