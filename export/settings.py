"""Settings of an export that mean nothing, or contradict each other: refused before any work is done."""

from __future__ import annotations

from lorafx.errors import ExportError


def check_settings(
    opset: object = None,
    external_data: bool | None = None,
    data_name: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Refuse settings that are no settings; as for :func:`lorafx.merge_and_export`.

    Raises:
        ExportError: ``opset`` is no whole number; or weights are to stay in the ``.onnx``, and what is said of their
            files would mean nothing.
    """
    if opset is not None and (not isinstance(opset, int) or isinstance(opset, bool)):
        raise ExportError(
            f"opset={opset!r} is of type {type(opset).__name__}: give a whole number, as opset=20, or leave it out"
        )
    for name, value in (("data_name", data_name), ("max_shard_size", max_shard_size)):
        if external_data is False and value is not None:
            raise ExportError(
                f"external_data=False keeps the weights in the .onnx, and {name}={value!r} is about files beside it: "
                "leave out one of them"
            )
