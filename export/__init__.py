"""Writing a merged graph as ONNX and checking that the file is its twin. Imported as ``lorafx.export``."""
