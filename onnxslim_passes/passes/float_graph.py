"""Lets the nodes of a graph compute in float16.

A node is converted if its operator is declared for the type and nothing fixes its float32: an
attribute with a type, a body, `keep`. Between converted and other nodes stand Casts, one for each
tensor and direction. Bodies of If, Loop and Scan and functions stay in float32 as they are.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.model import Constant, Model, Node, Variable
from onnxslim_passes.passes.base import Decision, PassResult

_FLOAT = onnx.TensorProto.FLOAT

# Their output type comes from an attribute, or their float inputs carry scales and sizes.
_FIXED = frozenset(
    [
        *("Bernoulli", "Cast", "CastLike", "ConstantOfShape", "DequantizeLinear"),
        *("DynamicQuantizeLinear", "EyeLike", "Multinomial", "QuantizeLinear", "RandomNormal"),
        *("RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Resize"),
        *("SequenceEmpty", "Upsample"),
    ]
)

_SHORT_FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

_Tensor = Variable | Constant


def check_keep(model: Model, keep: Sequence[str]) -> None:
    """Raises UnknownNameError for what is neither an operator nor a node of the model."""
    nodes = list(model.nodes())
    known = {label for node in nodes for label in (node.op, node.name, node.where)}
    for pattern in keep:
        if not any(_matches(pattern, label) for label in known):
            raise unknown_name("operator or node in `keep`:", pattern, known - {""})


def _matches(pattern: str, label: str) -> bool:
    return bool(label) and (pattern == label or fnmatchcase(label, pattern))


class GraphConverter:
    """Converts the main graph of one model, in place.

    Args:
        model: the model.
        dtype: a shorter float type in which the runtime computes: float16.
        keep: operators, names or patterns of nodes that stay in float32.
        keep_io: whether inputs and outputs of the model stay float32.
    """

    def __init__(
        self, model: Model, dtype: np.dtype[Any], keep: Sequence[str], *, keep_io: bool
    ) -> None:
        self._model = model
        self._graph = model.graph
        self._dtype = dtype
        self._elem_type = int(helper.np_dtype_to_tensor_dtype(dtype))
        self._largest = float(ml_dtypes.finfo(dtype).max)
        self._smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
        self._keep = keep
        self._keep_io = keep_io
        self._types = model.types()
        self._cast: dict[tuple[_Tensor, int], _Tensor] = {}

    def run(self) -> PassResult:
        """Converts all nodes that can be."""
        decisions, taken = [], []
        for node in self._model.nodes():
            reason = self._place_objection(node)
            if not reason and not self._has_float(node):
                continue
            reason = reason or self._refusal(node)
            if not reason:
                taken.append(node)
            done = reason or f"computes in {self._dtype}"
            decisions.append(Decision(where=node.where, taken=not reason, reason=done))
        if taken:
            self._convert(taken)
            self._model.remove_unused()
        return PassResult(bool(taken), tuple(decisions))

    def _place_objection(self, node: Node) -> str:
        if node.graph is not self._graph:
            return "bodies and functions stay as they are"
        short = next((t for t in node.inputs if t.dtype in _SHORT_FLOATS), None)
        if short is not None and not self._has_float(node):
            return f"computes in {short.dtype} already"
        return ""

    def _has_float(self, node: Node) -> bool:
        return any(self._is_float(tensor) for tensor in (*node.inputs, *node.outputs))

    def _is_float(self, tensor: _Tensor) -> bool:
        known = self._types.of(tensor)
        return known is not None and known.elem_type == _FLOAT

    def _refusal(self, node: Node) -> str:
        """Why a node stays in float32, or an empty text."""
        kept = next((p for p in self._keep if _kept_by(p, node)), None)
        if kept is not None:
            return f"kept in float32 by {kept!r}"
        if node.domain:
            return f"operators of {node.domain} are left as they are"
        if any(True for _ in node.bodies()):
            return "has bodies, which stay as they are"
        if node.op in _FIXED:
            return f"{node.op} says its own types"
        tensors = [t for t in (*node.inputs, *node.outputs) if not t.is_empty()]
        if any(self._types.of(tensor) is None for tensor in tensors):
            return "the type of one of its tensors is not known"
        return self._schema_objection(node) or self._unfit_constant(node)

    def _schema_objection(self, node: Node) -> str:
        try:
            schema = onnx.defs.get_schema(node.op, self._graph.opset, "")
        except onnx.defs.SchemaError:
            return "its operator is not known to ONNX"
        wanted = f"tensor({self._dtype})"
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        formal = [*zip(node.inputs, _formals(schema.inputs), strict=False)]
        formal += [*zip(node.outputs, _formals(schema.outputs), strict=False)]
        for tensor, parameter in formal:
            if self._is_float(tensor) and wanted not in allowed.get(parameter.type_str, ()):
                return f"{node.op} of opset {self._graph.opset} is not declared for {self._dtype}"
        return ""

    def _unfit_constant(self, node: Node) -> str:
        """Why a constant of the node does not survive in the shorter type, or an empty text."""
        for tensor in node.inputs:
            if not isinstance(tensor, Constant) or not self._is_float(tensor):
                continue
            values = tensor.values
            peak = float(np.abs(values[np.isfinite(values)]).max(initial=0))
            if peak > self._largest:
                return (
                    f"its constant {tensor.name!r} holds {peak:.6g}, more than the largest "
                    f"{self._dtype}, {self._largest:.6g}"
                )
            if 0 < peak < self._smallest:
                return (
                    f"its constant {tensor.name!r} holds no more than {peak:.6g}, less than the "
                    f"smallest {self._dtype}, {self._smallest:.6g}"
                )
        return ""

    # ---- edits

    def _convert(self, taken: Sequence[Node]) -> None:
        converted = set(taken)
        outputs = {id(tensor) for tensor in self._graph.outputs}
        floats = {t for node in taken for t in node.outputs if self._is_float(t)}
        floats |= {t for node in taken for t in node.inputs if self._is_float(t)}
        if not self._keep_io:
            self._convert_inputs(floats, converted)
        for node in taken:
            for index, tensor in enumerate(node.inputs):
                if tensor in floats and not self._made_by(tensor, converted):
                    node.inputs[index] = self._short(tensor)
        for node in taken:
            for tensor in list(node.outputs):
                if tensor in floats and not tensor.is_empty():
                    self._convert_output(node, tensor, converted, is_output=id(tensor) in outputs)

    def _made_by(self, tensor: _Tensor, converted: set[Node]) -> bool:
        if isinstance(tensor, Constant):
            return False
        makers = list(tensor.inputs)
        if not makers:
            return tensor.dtype == self._dtype  # an input that was converted
        return makers[0] in converted

    def _convert_inputs(self, floats: set[_Tensor], converted: set[Node]) -> None:
        """Float inputs of the model that a converted node takes become the shorter type."""
        for tensor in self._graph.inputs:
            if isinstance(tensor, Variable) and tensor in floats:
                self._declare(tensor)
                for node in dict.fromkeys(tensor.outputs):
                    if node not in converted:
                        wide = self._wide(tensor)
                        self._model.replace_uses(tensor, wide, only=[node])

    def _short(self, tensor: _Tensor) -> _Tensor:
        """The tensor in the shorter type: a constant of its own, or a Cast."""
        key = (tensor, self._elem_type)
        if key not in self._cast:
            if isinstance(tensor, Constant):
                with np.errstate(over="ignore"):
                    values = tensor.values.astype(self._dtype)
                hint = f"{tensor.name}_{self._dtype}"
                self._cast[key] = self._graph.add_constant(hint, values)
            else:
                self._cast[key] = self._added_cast(tensor, self._elem_type, str(self._dtype))
        return self._cast[key]

    def _wide(self, tensor: _Tensor) -> _Tensor:
        key = (tensor, int(_FLOAT))
        if key not in self._cast:
            self._cast[key] = self._added_cast(tensor, int(_FLOAT), "float32")
        return self._cast[key]

    def _added_cast(self, tensor: _Tensor, elem_type: int, hint: str) -> Variable:
        made: Variable = self._graph.add_node(
            "Cast", [tensor], outputs=[f"{tensor.name}_{hint}"], attrs={"to": elem_type}
        ).outputs[0]
        return made

    def _convert_output(
        self, node: Node, tensor: Variable, converted: set[Node], *, is_output: bool
    ) -> None:
        """Gives a float output the shorter type, and a Cast to those that want it long."""
        consumers = list(dict.fromkeys(tensor.outputs))
        others = [user for user in consumers if user not in converted]
        if is_output and not self._keep_io:
            self._declare(tensor)
            is_output = False
        if not is_output and not others:
            if tensor not in self._graph.outputs:
                tensor.forget_type()
            return
        if tensor in self._graph.outputs and not is_output:
            wide = self._wide(tensor)
            self._model.replace_uses(tensor, wide, only=others)
            return
        # The tensor keeps its name and its type, for outputs and bodies; the node makes another.
        short = Variable(self._graph.fresh_name(f"{tensor.name}_{self._dtype}"))
        for index, made in enumerate(node.outputs):
            if made is tensor:
                node.outputs[index] = short
        for user in consumers:
            if user in converted:
                self._model.replace_uses(tensor, short, only=[user])
        self._graph.add_node("Cast", [short], outputs=[tensor], attrs={"to": int(_FLOAT)})

    def _declare(self, tensor: Variable) -> None:
        """Declares an input or output of the model to be of the shorter type."""
        declared = self._graph.output_infos.get(tensor.name)
        for known in (tensor.info, declared):
            if known is not None:
                info = onnx.ValueInfoProto()
                info.CopyFrom(known)
                info.type.tensor_type.elem_type = self._elem_type
                tensor.info = info
        if declared is not None and tensor.info is not None:
            self._graph.output_infos[tensor.name] = tensor.info
        tensor.dtype = self._dtype


def _kept_by(pattern: str, node: Node) -> bool:
    return pattern == node.op or any(_matches(pattern, name) for name in (node.name, node.where))


def _formals(parameters: Sequence[Any]) -> Iterable[Any]:
    """The declared parameters, the last one without end if it is variadic."""
    for parameter in parameters:
        yield parameter
        while parameter.option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
            yield parameter
