"""Which constants of a model belong to decoders already, so that storing twice changes nothing."""

import ml_dtypes
import numpy as np

from onnxslim_passes.model import Constant, Model, Node, Variable

# What decoders are built of (`fill`, `narrow`, `codebook`, `grid`).
_DECODER_OPS = frozenset(
    [
        *("Add", "Cast", "Div", "Expand", "Gather", "GatherElements"),
        *("Mod", "Mul", "Range", "Reshape", "Slice", "Sub", "Transpose"),
    ]
)
_NARROW = frozenset(
    np.dtype(kind)
    for kind in (
        *(np.int8, np.uint8, np.float16, ml_dtypes.bfloat16),
        *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
)


def decoder_constants(model: Model) -> set[Constant]:
    """The constants under a decoder.

    That is an Expand of one value, a Gather by codes, a Cast to a wider type, or a product of codes
    and scales.

    A Gather with constant indices is a decoder only if its codes pass through another node, as
    they do in every codebook; a table of positions taken by constant indices is not.
    """
    known: dict[Variable | Constant, bool] = {}
    found: set[Constant] = set()
    for node in model.nodes():
        if not _may_be_root(node):
            continue
        if all(_is_rebuilt(tensor, known) for tensor in node.inputs):
            found.update(_leaves(node))
    return found


def _may_be_root(node: Node) -> bool:
    if node.domain or not node.inputs:
        return False
    if node.op == "Cast":
        return isinstance(node.inputs[0], Constant) and node.inputs[0].dtype in _NARROW
    if len(node.inputs) != 2:
        return False
    data, second = node.inputs
    if node.op == "Expand":
        return isinstance(data, Constant) and data.size == 1 and isinstance(second, Constant)
    if node.op == "Mul":
        makers = [maker.op for tensor in node.inputs for maker in tensor.inputs]
        return len(makers) == 2 and set(makers) <= {"Reshape", "Sub"}
    return node.op in ("Gather", "GatherElements") and isinstance(second, Variable)


def _is_rebuilt(start: Variable | Constant, known: dict[Variable | Constant, bool]) -> bool:
    """Whether a tensor depends on constants alone, through the operators of decoders."""
    pending = [start]
    while pending:
        tensor = pending[-1]
        if tensor in known:
            pending.pop()
        elif isinstance(tensor, Constant):
            known[tensor] = tensor.input_info is None
        elif not tensor.inputs or tensor.inputs[0].op not in _DECODER_OPS:
            known[tensor] = False
        else:
            inputs = tensor.inputs[0].inputs
            unknown = [operand for operand in inputs if operand not in known]
            pending.extend(unknown)
            if not unknown:
                known[tensor] = all(known[operand] for operand in inputs)
    return known[start]


def _leaves(root: Node) -> set[Constant]:
    leaves: set[Constant] = set()
    pending = list(root.inputs)
    seen: set[Variable | Constant] = set()
    while pending:
        tensor = pending.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        if isinstance(tensor, Constant):
            leaves.add(tensor)
        else:
            pending.extend(tensor.inputs[0].inputs)
    return leaves
