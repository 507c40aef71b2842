"""Embedding tables as int8 rows with a scale each, shared by the passes that quantize.

``Gather(table, ids)`` becomes ``Cast(Gather(codes, ids)) * Gather(scales, ids)``: a quarter of the
bytes at about 40 dB, and no slower, because the rows that are copied are a quarter, too. Needs no
calibration and works in every graph.
"""

import numpy as np
import onnx

from onnxslim_passes.model import Constant, Node, Use
from onnxslim_passes.numerics.affine import quantize
from onnxslim_passes.numerics.common_codes import kept_grid
from onnxslim_passes.passes.base import Decision

SMALLEST_TABLE = 4096
"""Elements; below, two more nodes cost more than the bytes are worth."""


def is_embedding(node: Node) -> bool:
    """Whether a node gathers from a matrix of numbers that is stored in the file."""
    table = node.inputs[0] if node.op == "Gather" and not node.domain else None
    return isinstance(table, Constant) and len(table.shape) == 2 and table.dtype.kind == "f"


def objection(node: Node) -> str | None:
    """Why an embedding stays in float, or None."""
    table = node.inputs[0]
    if table.dtype != np.dtype(np.float32):
        return f"its table is {table.dtype.name}; only float32 is quantized"
    if table.input_info is not None:
        return "its table is also an input of the model, which a caller may override"
    if int(node.attr("axis", 0)) not in (0, -2):
        return f"it gathers along axis {node.attr('axis')}, not rows"
    if table.size < SMALLEST_TABLE:
        return f"its table has fewer than {SMALLEST_TABLE} elements"
    if not np.isfinite(table.values).all():
        return "its table holds NaN or infinity"
    return None


def keeps_float(use: Use) -> bool:
    """Whether a use of a table is other than that of an embedding that can be rewritten."""
    fit = use.direct and use.input_index == 0 and is_embedding(use.node)
    return not fit or objection(use.node) is not None


class EmbeddingRewriter:
    """Rewrites Gather nodes, storing each table once."""

    def __init__(self) -> None:
        self._tables: dict[Constant, tuple[Constant, Constant]] = {}

    def rewrite(self, node: Node) -> Decision:
        """Replaces one Gather; its output tensor stays the same object."""
        graph, output, indices = node.graph, node.outputs[0], node.inputs[1]
        table, where, hint = node.inputs[0], node.where, node.outputs[0].name
        codes, scale = self._codes(table)
        graph.remove_node(node)
        rows = graph.add_node("Gather", [codes, indices], outputs=[f"{hint}_integer"]).outputs[0]
        scales = graph.add_node("Gather", [scale, indices], outputs=[f"{hint}_scale"]).outputs[0]
        attrs = {"to": onnx.TensorProto.FLOAT}
        rows = graph.add_node("Cast", [rows], outputs=[f"{hint}_cast"], attrs=attrs).outputs[0]
        graph.add_node("Mul", [rows, scales], outputs=[output])
        return Decision(
            where=where,
            taken=True,
            reason="int8 rows with a scale each",
            figures={"weights": table.size, "before_bytes": table.nbytes},
        )

    def _codes(self, table: Constant) -> tuple[Constant, Constant]:
        """int8 codes (R, D) and float32 scales (R, 1)."""
        if table not in self._tables:
            owner = table.owner
            assert owner is not None  # every constant of a loaded model has one
            grid = kept_grid(table.values, np.int8, 0)
            self._tables[table] = (
                owner.add_constant(f"{table.name}_quantized", quantize(table.values, grid)),
                owner.add_constant(f"{table.name}_scale", grid.scale[:, None]),
            )
        return self._tables[table]
