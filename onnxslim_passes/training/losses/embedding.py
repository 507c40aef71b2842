"""A model of its own inside the training graph: an alignment, a loss of the user's."""

from collections.abc import Mapping

from onnxslim_passes.model import Model
from onnxslim_passes.model.merging import merge
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.shapes import Tensor

__all__ = ["embed"]


def embed(
    emit: Emitter, model: Model, *, prefix: str, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Puts a model into the graph under construction; it is empty afterwards.

    Args:
        emit: the graph.
        model: of the same opset.
        prefix: of all names that come in.
        inputs: a tensor of the graph for each of the model's inputs.

    Returns:
        The model's outputs by their names in the model.
    """
    names = [str(tensor.name) for tensor in model.graph.outputs]
    tensors = merge(emit.model, model, prefix=prefix, inputs=inputs)
    emit.learn()
    return {name: tensors[name] for name in names}
