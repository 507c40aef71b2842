"""Room of onnxslim_passes."""
