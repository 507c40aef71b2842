"""Training steps as graphs of ONNX's own operators, which stock ONNX Runtime runs.

`lower` makes the copy of a model that training works on, an `Emitter` adds to it, `gradients`
goes back from a loss to the weights.
"""

from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.gradients import Gradients, check_differentiable, gradients
from onnxslim_passes.training.lowering import Lowered, StateTensor, lower

__all__ = [
    "Emitter",
    "Gradients",
    "Lowered",
    "StateTensor",
    "check_differentiable",
    "gradients",
    "lower",
]
