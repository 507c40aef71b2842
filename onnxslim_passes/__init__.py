"""Compress any ONNX model, believing nothing that ONNX Runtime has not run."""
