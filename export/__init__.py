"""Writing a merged graph as ONNX and checking that the file is its twin. Imported as ``lorafx.export``.

In the order in which data goes through: :mod:`~lorafx.export.export` (the calls users make),
:mod:`~lorafx.export.translate` and :mod:`~lorafx.export.weights` (a graph becomes an ONNX model, its weights last),
:mod:`~lorafx.export.write` (the file), :mod:`~lorafx.export.verify` with :mod:`~lorafx.export.compare`,
:mod:`~lorafx.export.parity` and :mod:`~lorafx.export.widen` (the checks), :mod:`~lorafx.export.report`; and
:mod:`~lorafx.export.files` for two files that are there already.
"""
