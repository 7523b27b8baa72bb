"""Writing a merged graph as ONNX and checking that the file is its twin. Imported as ``lorafx.export``.

In the order in which data goes through: :mod:`~lorafx.export.export` (the calls users make),
:mod:`~lorafx.export.settings` and :mod:`~lorafx.export.job` (what is asked for, and what it means for a graph),
:mod:`~lorafx.export.cast` (another precision),
:mod:`~lorafx.export.translate` and :mod:`~lorafx.export.weights` (a graph becomes an ONNX model, its weights last),
:mod:`~lorafx.export.operators` (what torch.onnx has no translation of),
:mod:`~lorafx.export.pack` (those that stay packed),
:mod:`~lorafx.export.write` with :mod:`~lorafx.export.pipe` (the files), :mod:`~lorafx.export.commit` (their names),
:mod:`~lorafx.export.check`, :mod:`~lorafx.export.verify` with :mod:`~lorafx.export.compare`,
:mod:`~lorafx.export.parity` and :mod:`~lorafx.export.widen` (the checks), :mod:`~lorafx.export.report`,
:mod:`~lorafx.export.provenance`; and
for files that are there already :mod:`~lorafx.export.onnx_file` (reading them),
:mod:`~lorafx.export.onnx_uses`, :mod:`~lorafx.export.onnx_parts`, :mod:`~lorafx.export.onnx_targets`,
:mod:`~lorafx.export.changes`, :mod:`~lorafx.export.edits` and :mod:`~lorafx.export.merge_onnx` (an adapter folded into
one), :mod:`~lorafx.export.prove`, :mod:`~lorafx.export.diff` and :mod:`~lorafx.export.diff_runs`; running them:
:mod:`~lorafx.export.load` and :mod:`~lorafx.export.runtime`.
"""
