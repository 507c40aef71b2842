"""Which elements of which tensors and weights belong to one channel, through a whole model.

`trace` follows channels from layer to layer; `constants` finds channels whose value no input
changes; `cutting` takes channels out of everything that carries them.
"""

from onnxslim_passes.passes.channels.constants import constant_channels
from onnxslim_passes.passes.channels.cutting import cut_channels, fold_into_bias
from onnxslim_passes.passes.channels.labels import Channels, Labels
from onnxslim_passes.passes.channels.layers import Layer
from onnxslim_passes.passes.channels.state import Trace
from onnxslim_passes.passes.channels.tracing import trace_channels

__all__ = [
    "Channels",
    "Labels",
    "Layer",
    "Trace",
    "constant_channels",
    "cut_channels",
    "fold_into_bias",
    "trace_channels",
]
