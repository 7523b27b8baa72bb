"""What a file's optional inputs are called."""

from __future__ import annotations

import re
from collections.abc import Callable

from lorafx.errors import ExportError

#: What names inputs: from a site's path and a role.
Naming = Callable[[str, str], str]

A, B, GAIN, SHIFT = "lora_A", "lora_B", "lora_gain", "lora_shift"
#: The role of a tensor that is an input as a whole, which keeps its own name, if a naming has any for it.
WHOLE = "whole"

_RANK, _WIDTH = ".rank", ".out."

_GENAI_ENDING = ".MatMul.weight"
#: How inputs of a layer end that only make sense together, under each naming.
PAIRS = ((A, B), (A + _GENAI_ENDING, B + _GENAI_ENDING))

#: The decoder layers that onnxruntime-genai's model builder has names for: the basenames of ``make_attention`` and
#: ``make_mlp_proj``, to which ``make_matmul_lora`` adds ``lora_A`` and ``lora_B`` before the last part, and
#: ``make_matmul_float`` ``weight`` (its src/python/py/models/builder.py). What it does for other MLPs (fc1, fc2),
#: experts or packed projections is not the same for all models, and is refused.
_GENAI = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:self_(attn\.[qkvo]_proj)|(mlp\.(?:gate|up|down)_proj))")


def rank_size(site: str) -> str:
    """What the dimension of a rank is called."""
    return f"{site}{_RANK}"


def width_size(site: str, out: int) -> str:
    """What B's other dimension is called: 1 without an adapter, and ``out`` with one."""
    return f"{site}{_WIDTH}{out}"


def is_rank(size: int | str) -> bool:
    """Whether a dimension of an input is a rank."""
    return isinstance(size, str) and size.endswith(_RANK)


def allows(size: int | str, given: int) -> bool:
    """Whether an adapter may give a dimension of an input this size."""
    if isinstance(size, int):
        return size == given
    _, named, width = size.rpartition(_WIDTH)
    return not named or width == str(given)


def site_name(site: str, role: str) -> str:
    """lorafx's own names: ``model.layers.0.self_attn.q_proj.lora_A``."""
    return f"{site}.{role}"


def genai_name(site: str, role: str) -> str:
    """The names that onnxruntime-genai's model builder gives: ``model.layers.0.attn.q_proj.lora_A.MatMul.weight``.

    Raises:
        ExportError: it has none for this.
    """
    found = _GENAI.fullmatch(site)
    if found is None or role not in (A, B):
        what = f"'{site}'" if found is None else f"the {role.removeprefix('lora_')} of '{site}'"
        raise ExportError(
            f"onnxruntime-genai has no name for {what}: it knows lora_A and lora_B of q, k, v, o, gate, up and "
            "down_proj of a decoder's layers. Export with naming='lorafx'"
        )
    number, attention, mlp = found.groups()
    return f"model.layers.{number}.{attention or mlp}.{role}{_GENAI_ENDING}"
