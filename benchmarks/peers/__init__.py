"""The parts of quantization_peers.py: data, workers, measuring and the tables."""
