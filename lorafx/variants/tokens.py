"""Rows of a weight that are trained whole: what ``LoraSpec.trainable_token_indices`` makes of an embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafx.variants.base import Start, StartRequest, Update, Variant


class Tokens(Variant):
    """``W' = trainable_tokens_delta [out, in]``: in PEFT, too, that is not a difference but the rows themselves.

    It has neither rank nor scaling, and as an update is of full rank: ``W' - W``, times the identity.
    """

    name = "tokens"
    parameters = ("trainable_tokens_delta",)
    inits = ("base",)
    scales_rows = True

    def default_alpha(self, r: int) -> float:
        """r, which makes the scaling 1."""
        return r

    def scaling(self, alpha: float, r: int, rslora: bool) -> float:
        """1."""
        return 1.0

    def shapes(self, out_features: int, in_features: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """``trainable_tokens_delta [out, in]``."""
        return {"trainable_tokens_delta": (out_features, in_features)}

    def start(self, request: StartRequest) -> Start:
        """The rows as they are."""
        return Start({"trainable_tokens_delta": request.weight.to(request.dtype, copy=True)})

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor], scaling: float) -> Update:
        """The smaller of the two identities on its side of ``W' - W``."""
        rows = tensors["trainable_tokens_delta"]
        change = rows - weight
        identity = torch.eye(min(rows.shape), dtype=change.dtype, device=change.device)
        return Update(identity, change) if rows.shape[0] <= rows.shape[1] else Update(change, identity)
