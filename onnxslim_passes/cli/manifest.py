"""The manifest of a compressed model, as the pipeline leaves it in `metadata_props`."""

MANIFEST_KEY = "onnxslim_passes"
