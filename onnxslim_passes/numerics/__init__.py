"""Arithmetic of compression on plain arrays: NumPy and scikit-learn, nothing of ONNX.

- `affine`: scales and zero points, quantize and dequantize, int32 biases;
- `bits`: codes of 1 to 8 bits packed into bytes;
- `clustering`: 1-D k-means on a weighted histogram, codebooks;
- `sparsity`: masks by magnitude, thresholds over many arrays, entropy bounds;
- `weight_formats`: weights of 1 to 8 bits with a scale for each block, grids found in values;
- `distortion`: signal-to-quantization-noise ratio of changed values.

Every function takes float16, bfloat16, float32 or float64, leaves its arguments unchanged, gives
the same result for the same seed, and raises `ValueError` with the position for NaN or infinity.
"""
