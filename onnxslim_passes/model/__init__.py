"""Load, save, and every question or edit of a graph; the only room that knows graphsurgeon's edges.

The graph that passes edit is made of onnx-graphsurgeon's classes (`ir`). `importing` and
`exporting` translate from and to ONNX messages such that what nobody touches is written as it was
read; graphsurgeon's own importer, exporter, sorting and folding are not used.
"""

from onnxslim_passes.model.checking import check_model
from onnxslim_passes.model.ir import Constant, Graph, Node, Variable
from onnxslim_passes.model.model import Model
from onnxslim_passes.model.reading import load
from onnxslim_passes.model.shortening import Shortened, restore_names, short_names, shorten
from onnxslim_passes.model.types import TensorType, Types
from onnxslim_passes.model.weights import FLOAT_DTYPES, Role, Use, Weight

__all__ = [
    "FLOAT_DTYPES",
    "Constant",
    "Graph",
    "Model",
    "Node",
    "Role",
    "Shortened",
    "TensorType",
    "Types",
    "Use",
    "Variable",
    "Weight",
    "check_model",
    "load",
    "restore_names",
    "short_names",
    "shorten",
]
