"""Small models, each with one thing that importers and exporters of ONNX graphs lose or break."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Builder = Callable[[], ModelProto]

ZOO: dict[str, Builder] = {}  # name -> what builds the model
EXTERNAL_ZOO: dict[str, Callable[[Path], Path]] = {}  # name -> writes it into a folder, its path

W = np.arange(4, dtype=np.float32).reshape(2, 2)
OPEN = (None, None)  # the shape of a matrix of any size
ML = helper.make_opsetid("ai.onnx.ml", 3)
LOCAL = helper.make_opsetid("local", 1)

FLOAT_TYPES = {
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 21),
    "float16": (TensorProto.FLOAT16, np.float16, 21),
    "float64": (TensorProto.DOUBLE, np.float64, 21),
    "float8e4m3fn": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, 21),
    "float8e4m3fnuz": (TensorProto.FLOAT8E4M3FNUZ, ml_dtypes.float8_e4m3fnuz, 21),
    "float8e5m2": (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2, 21),
    "float8e5m2fnuz": (TensorProto.FLOAT8E5M2FNUZ, ml_dtypes.float8_e5m2fnuz, 21),
    "float8e8m0": (TensorProto.FLOAT8E8M0, ml_dtypes.float8_e8m0fnu, 24),
    "float4e2m1": (TensorProto.FLOAT4E2M1, ml_dtypes.float4_e2m1fn, 24),
}
INTEGER_TYPES = {
    "int4": (TensorProto.INT4, ml_dtypes.int4, 21),
    "uint4": (TensorProto.UINT4, ml_dtypes.uint4, 21),
    "int2": (TensorProto.INT2, ml_dtypes.int2, 25),
    "uint2": (TensorProto.UINT2, ml_dtypes.uint2, 25),
    "int8": (TensorProto.INT8, np.int8, 21),
    "uint8": (TensorProto.UINT8, np.uint8, 21),
    "int16": (TensorProto.INT16, np.int16, 21),
    "uint16": (TensorProto.UINT16, np.uint16, 21),
    "int32": (TensorProto.INT32, np.int32, 21),
    "uint32": (TensorProto.UINT32, np.uint32, 21),
    "int64": (TensorProto.INT64, np.int64, 21),
    "uint64": (TensorProto.UINT64, np.uint64, 21),
    "bool": (TensorProto.BOOL, np.bool_, 21),
}
COMPLEX_TYPES = {
    "complex64": (TensorProto.COMPLEX64, np.complex64, 21),
    "complex128": (TensorProto.COMPLEX128, np.complex128, 21),
}
ALL_TYPES = {**FLOAT_TYPES, **INTEGER_TYPES, **COMPLEX_TYPES}


def zoo(build: Builder) -> Builder:
    """Enters a builder into `ZOO` under its own name."""
    ZOO[build.__name__] = build
    return build


def external(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Enters a writer into `EXTERNAL_ZOO` under its own name."""
    EXTERNAL_ZOO[write.__name__] = write
    return write


# ---------------- the pieces


def value(
    name: str, shape: Sequence[int | str | None] | None = (2, 2), elem_type: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    """A graph input or output, or an entry of `value_info`."""
    return helper.make_tensor_value_info(name, elem_type, shape)


def constant(name: str, array: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node; names stand in one string, separated by spaces, "-" for an empty one."""
    names = [[("" if n == "-" else n) for n in text.split()] for text in (inputs, outputs)]
    return helper.make_node(op, *names, **attributes)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[TensorProto] = (),
    **fields: Any,
) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", inputs, outputs, constants, **fields)


def model(
    main: onnx.GraphProto,
    *,
    opset: int = 21,
    ir: int = 10,
    domains: Sequence[onnx.OperatorSetIdProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> ModelProto:
    imports = [helper.make_opsetid("", opset), *domains]
    return helper.make_model(main, opset_imports=imports, ir_version=ir, functions=functions)


def matmul(**fields: Any) -> ModelProto:
    """y = x @ W with one initializer: what most entries change in one place."""
    constants = fields.pop("constants", [constant("W", W)])
    main = graph([node("MatMul", "x W", "y", name="mm")], [value("x")], [value("y")], constants)
    return model(main, **fields)


def raw_attribute(owner: NodeProto, name: str, kind: int) -> AttributeProto:
    """An attribute of a kind that `helper.make_node` cannot make."""
    attribute = owner.attribute.add()
    attribute.name, attribute.type = name, kind
    return attribute


def note(entries: Any, key: str, text: str) -> None:
    """One more entry of a `metadata_props`."""
    entry = entries.add()
    entry.key, entry.value = key, text


def branches(then_body: onnx.GraphProto, else_body: onnx.GraphProto) -> NodeProto:
    return node("If", "c", "y", name="if", then_branch=then_body, else_branch=else_body)


CONDITION = value("c", [], TensorProto.BOOL)


def body(text: str, out: str, constants: Sequence[TensorProto] = ()) -> onnx.GraphProto:
    """The body of an If branch; `text` has one "Op in... -> out" a line."""
    nodes = []
    for line in filter(None, map(str.strip, text.split(";"))):
        left, _, right = line.partition("->")
        op, _, inputs = left.strip().partition(" ")
        nodes.append(node(op, inputs, right))
    return graph(nodes, [], [value(out, OPEN)], constants)


def conditional(
    then_body: onnx.GraphProto,
    else_body: onnx.GraphProto,
    constants: Sequence[TensorProto] = (),
    before: Sequence[NodeProto] = (),
    **fields: Any,
) -> ModelProto:
    """A model with one If; x (2, 2) and the condition c are its inputs."""
    nodes = [*before, branches(then_body, else_body)]
    return model(graph(nodes, [CONDITION, value("x")], [value("y", OPEN)], constants), **fields)


# ---------------- what is written about a model


@zoo
def metadata_everywhere() -> ModelProto:
    proto = matmul(ir=11)
    proto.domain, proto.model_version, proto.doc_string = "com.example", 7, "doc"
    proto.producer_name, proto.producer_version = "producer", "1.2"
    note(proto.metadata_props, "author", "someone")
    main = proto.graph
    note(main.metadata_props, "graph", "1")
    note(main.node[0].metadata_props, "node", "2")
    note(main.input[0].metadata_props, "input", "3")
    note(main.output[0].metadata_props, "output", "4")
    note(main.initializer[0].metadata_props, "weight", "5")
    main.doc_string, main.node[0].doc_string = "graph doc", "node doc"
    main.input[0].doc_string, main.output[0].doc_string = "input doc", "output doc"
    main.initializer[0].doc_string = "weight doc"
    return proto


@zoo
def metadata_repeated_key() -> ModelProto:
    proto = matmul()
    note(proto.metadata_props, "author", "")
    note(proto.metadata_props, "", "no key")
    return proto


@zoo
def denotations() -> ModelProto:
    proto = matmul()
    for entry in (proto.graph.input[0], proto.graph.output[0]):
        entry.type.denotation = "IMAGE"
        entry.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    return proto


@zoo
def value_info_documented() -> ModelProto:
    info = value("t")
    info.doc_string, info.type.denotation = "between", "TENSOR"
    note(info.metadata_props, "k", "v")
    nodes = [node("Relu", "x", "t"), node("Neg", "t", "y")]
    return model(graph(nodes, [value("x")], [value("y")], value_info=[info]))


@zoo
def value_info_without_shape() -> ModelProto:
    nodes = [node("Relu", "x", "t"), node("Neg", "t", "y")]
    return model(graph(nodes, [value("x")], [value("y")], value_info=[value("t", None)]))


@zoo
def value_info_of_initializer() -> ModelProto:
    proto = matmul()
    proto.graph.value_info.append(value("W"))
    return proto


@zoo
def value_info_of_nothing() -> ModelProto:
    proto = matmul()
    proto.graph.value_info.append(value("no_such_tensor"))
    return proto


@zoo
def value_info_of_input_and_output() -> ModelProto:
    proto = matmul()
    proto.graph.value_info.extend([value("x"), value("y")])
    return proto


@zoo
def quantization_annotation() -> ModelProto:
    constants = [constant("W", W), constant("s", np.float32(1)), constant("z", np.uint8(0))]
    proto = matmul(constants=constants)
    annotation = proto.graph.quantization_annotation.add()
    annotation.tensor_name = "x"
    note(annotation.quant_parameter_tensor_names, "SCALE_TENSOR", "s")
    note(annotation.quant_parameter_tensor_names, "ZERO_POINT_TENSOR", "z")
    return proto


@zoo
def training_info() -> ModelProto:
    proto = matmul()
    information = proto.training_info.add()
    first = node("Constant", "", "c0", value=constant("", W))
    information.initialization.CopyFrom(graph([first], [], [value("c0")]))
    information.algorithm.CopyFrom(graph([node("Neg", "W", "new")], [], [value("new")]))
    note(information.initialization_binding, "W", "c0")
    note(information.update_binding, "W", "new")
    return proto


@zoo
def device_configurations() -> ModelProto:
    proto = matmul(ir=11)
    configuration = proto.configuration.add()
    configuration.name, configuration.num_devices = "pair", 2
    configuration.device.extend(["a", "b"])
    placed = proto.graph.node[0].device_configurations.add()
    placed.configuration_id, placed.pipeline_stage = "pair", 1
    sharding = placed.sharding_spec.add()
    sharding.tensor_name = "W"
    sharding.device.extend([0, 1])
    axis = sharding.sharded_dim.add()
    axis.axis = 0
    axis.simple_sharding.add(dim_value=2, num_shards=2)
    return proto


@zoo
def domain_spelt_out() -> ModelProto:
    proto = matmul()
    proto.opset_import[0].domain = proto.graph.node[0].domain = "ai.onnx"
    return proto


@zoo
def domain_unused() -> ModelProto:
    return matmul(domains=[ML, helper.make_opsetid("com.unused", 3)])


@zoo
def domain_unknown() -> ModelProto:
    custom = node("Anything", "x W", "y", domain="com.example", strange=[1.5, 2.5], name="a")
    main = graph([custom], [value("x")], [value("y")], [constant("W", W)])
    return model(main, domains=[helper.make_opsetid("com.example", 1)])


def _opset(version: int, ir: int) -> ModelProto:
    return matmul(opset=version, ir=ir)


for _version in range(7, onnx.defs.onnx_opset_version() + 1):
    ZOO[f"opset_{_version}"] = functools.partial(_opset, _version, 4 if _version < 10 else 10)


# ---------------- constants


def typed_constant(name: str, size: int = 5) -> ModelProto:
    """A constant of `size` elements (odd: the last byte of packed types is half full)."""
    elem_type, dtype, opset = ALL_TYPES[name]
    tensor = constant("W", (np.arange(size) % 3 % 2).astype(np.float32).astype(dtype))
    nodes = [node("Cast", "W", "w", to=TensorProto.FLOAT), node("Add", "x w", "y")]
    out = value("y", (size,))
    if name in COMPLEX_TYPES:
        nodes, out = [node("Identity", "W", "y")], value("y", (size,), elem_type)
    ir = {21: 10, 24: 12, 25: 13}[opset]
    return model(graph(nodes, [value("x", (size,))], [out], [tensor]), opset=opset, ir=ir)


def _typed_constant_node(name: str) -> ModelProto:
    """The same constant in a Constant node."""
    proto = typed_constant(name)
    tensor = proto.graph.initializer.pop()
    proto.graph.node.insert(0, node("Constant", "", "W", value=tensor))
    return proto


def _typed_input(name: str) -> ModelProto:
    """An input of the type, and a `value_info` of it."""
    elem_type, _, opset = ALL_TYPES[name]
    nodes = [node("Cast", "q", "y", to=TensorProto.FLOAT)]
    out = value("y", (5,))
    if name in COMPLEX_TYPES:
        nodes, out = [node("Identity", "q", "y")], value("y", (5,), elem_type)
    ir = {21: 10, 24: 12, 25: 13}[opset]
    return model(graph(nodes, [value("q", (5,), elem_type)], [out]), opset=opset, ir=ir)


for _name in ALL_TYPES:
    ZOO[f"constant_{_name}"] = functools.partial(typed_constant, _name)
    ZOO[f"constant_node_{_name}"] = functools.partial(_typed_constant_node, _name)
    ZOO[f"input_{_name}"] = functools.partial(_typed_input, _name)


def _typed_data(elem_type: int, values: Sequence[Any]) -> ModelProto:
    """A constant in a typed field (`float_data`, `int32_data`...) instead of `raw_data`."""
    tensor = helper.make_tensor("W", elem_type, [len(values)], values)
    nodes = [node("Cast", "W", "w", to=TensorProto.FLOAT), node("Add", "x w", "y")]
    shape = (len(values),)
    return model(graph(nodes, [value("x", shape)], [value("y", shape)], [tensor]), opset=25, ir=13)


for _kind in ("FLOAT", "DOUBLE", "INT32", "INT64", "UINT64", "FLOAT16", "BFLOAT16", "INT8", "BOOL"):
    ZOO[f"typed_data_{_kind.lower()}"] = functools.partial(
        _typed_data, TensorProto.DataType.Value(_kind), [0, 1, 1, 0, 1]
    )
for _kind in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT4E2M1"):
    ZOO[f"typed_data_{_kind.lower()}"] = functools.partial(
        _typed_data, TensorProto.DataType.Value(_kind), [0, 1, 1, 0, 1]
    )


def _float6(elem_type: int, dtype: Any) -> ModelProto:
    """The newest element types, which no operator takes yet."""
    custom = node("Anything", "x W", "y", domain="com.example")
    tensor = constant("W", np.array([0, 1, 0.5, 2, 1]).astype(dtype))
    assert tensor.data_type == elem_type
    main = graph([custom], [value("x", (5,))], [value("y", (5,))], [tensor])
    return model(main, domains=[helper.make_opsetid("com.example", 1)], ir=13)


for _kind, _dtype in (("FLOAT6E2M3", "float6_e2m3fn"), ("FLOAT6E3M2", "float6_e3m2fn")):
    if _kind in TensorProto.DataType.keys():  # noqa: SIM118  an enumeration, not a dict
        ZOO[f"constant_{_kind.lower()}"] = functools.partial(
            _float6, TensorProto.DataType.Value(_kind), getattr(ml_dtypes, _dtype)
        )


@zoo
def special_floats() -> ModelProto:
    """NaNs with payloads, infinities, negative zero and denormals keep their bits."""
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000], np.uint32)
    return matmul(constants=[constant("W", bits.view(np.float32).reshape(2, 2))])


@zoo
def scalar_and_empty() -> ModelProto:
    nodes = [node("Mul", "x s", "t"), node("Concat", "t e", "y", axis=0)]
    constants = [constant("s", np.float32(2)), constant("e", np.zeros((0, 2), np.float32))]
    return model(graph(nodes, [value("x")], [value("y")], constants))


@zoo
def strings_initializer() -> ModelProto:
    tensor = helper.make_tensor("W", TensorProto.STRING, [2], [b"a", "\u00e9".encode()])
    out = value("y", [2], TensorProto.BOOL)
    inputs = [value("x", [2], TensorProto.STRING)]
    return model(graph([node("Equal", "x W", "y")], inputs, [out], [tensor]))


@zoo
def strings_not_utf8() -> ModelProto:
    tensor = helper.make_tensor("W", TensorProto.STRING, [2], [b"\xff\xfe", b""])
    out = value("y", [2], TensorProto.BOOL)
    inputs = [value("x", [2], TensorProto.STRING)]
    return model(graph([node("Equal", "x W", "y")], inputs, [out], [tensor]))


def _constant_list(attribute: str, content: Any, elem_type: int) -> ModelProto:
    """A Constant node with `value_int`, `value_floats` and the like."""
    nodes = [node("Constant", "", "k", **{attribute: content}), node("Identity", "k", "y")]
    shape = (len(content),) if isinstance(content, list) else ()
    return model(graph(nodes, [], [value("y", shape, elem_type)]))


for _attribute, _content, _elem in (
    ("value_int", 3, TensorProto.INT64),
    ("value_ints", [3, -4], TensorProto.INT64),
    ("value_float", 0.1, TensorProto.FLOAT),
    ("value_floats", [0.1, 2.0], TensorProto.FLOAT),
    ("value_string", "a", TensorProto.STRING),
    ("value_strings", ["a", "b"], TensorProto.STRING),
):
    ZOO[f"constant_{_attribute}"] = functools.partial(_constant_list, _attribute, _content, _elem)


@zoo
def constant_empty_list() -> ModelProto:
    empty = node("Constant", "", "c")
    raw_attribute(empty, "value_floats", AttributeProto.FLOATS)
    nodes = [empty, node("Concat", "x c", "y", axis=0)]
    return model(graph(nodes, [value("x", (2,))], [value("y", (2,))]))


@zoo
def constant_node_is_output() -> ModelProto:
    nodes = [node("Constant", "", "k", value=constant("", W)), node("Add", "x k", "y")]
    return model(graph(nodes, [value("x")], [value("y"), value("k")]))


@zoo
def constant_node_documented() -> ModelProto:
    known = node("Constant", "", "k", name="the_constant", value=constant("inner", W))
    known.doc_string = "about the constant"
    note(known.metadata_props, "k", "v")
    return model(graph([known, node("Add", "x k", "y")], [value("x")], [value("y")]), ir=11)


@zoo
def constant_node_ir3() -> ModelProto:
    nodes = [node("Constant", "", "k", value=constant("", W)), node("Add", "x k", "y")]
    return model(graph(nodes, [value("x")], [value("y")]), opset=8, ir=3)


@zoo
def constant_node_after_use() -> ModelProto:
    """Not sorted: the runtime takes it or not, but the values stay."""
    nodes = [node("Add", "x k", "y"), node("Constant", "", "k", value=constant("", W))]
    return model(graph(nodes, [value("x")], [value("y")]))


@zoo
def constant_node_unused() -> ModelProto:
    nodes = [node("Constant", "", "k", value=constant("", W)), node("Relu", "x", "y")]
    return model(graph(nodes, [value("x")], [value("y")]))


def sparse_tensor(
    name: str, *, raw: bool, coordinates: bool, dtype: Any = np.float32
) -> onnx.SparseTensorProto:
    """[[0, 1.5], [2.5, 0]] (or its integer part) as a sparse tensor."""
    values = np.array([1.5, 2.5]).astype(dtype)
    indices = np.array([[0, 1], [1, 0]] if coordinates else [1, 2], np.int64)
    tensors = [constant(name, values), constant(f"{name}_indices", indices)]
    if not raw:
        tensors = [
            helper.make_tensor(t.name, t.data_type, t.dims, numpy_helper.to_array(t).ravel())
            for t in tensors
        ]
    return helper.make_sparse_tensor(*tensors, [2, 2])


def _sparse_initializer(raw: bool, coordinates: bool) -> ModelProto:
    proto = matmul(constants=[])
    sparse = sparse_tensor("W", raw=raw, coordinates=coordinates)
    proto.graph.sparse_initializer.append(sparse)
    return proto


for _raw in (False, True):
    for _coordinates in (False, True):
        _form = f"{'raw' if _raw else 'typed'}_{'coordinates' if _coordinates else 'linear'}"
        ZOO[f"sparse_{_form}"] = functools.partial(_sparse_initializer, _raw, _coordinates)


@zoo
def sparse_float16() -> ModelProto:
    sparse = sparse_tensor("W", raw=True, coordinates=False, dtype=np.float16)
    nodes = [node("Cast", "W", "w", to=TensorProto.FLOAT), node("MatMul", "x w", "y")]
    proto = model(graph(nodes, [value("x")], [value("y")]))
    proto.graph.sparse_initializer.append(sparse)
    return proto


@zoo
def sparse_all_zero() -> ModelProto:
    proto = matmul(constants=[])
    values, indices = constant("W", np.zeros(0, np.float32)), constant("i", np.zeros(0, np.int64))
    sparse = helper.make_sparse_tensor(values, indices, [2, 2])
    proto.graph.sparse_initializer.append(sparse)
    return proto


@zoo
def sparse_in_branch() -> ModelProto:
    then_body = body("MatMul x W -> t", "t")
    then_body.sparse_initializer.append(sparse_tensor("W", raw=True, coordinates=False))
    return conditional(then_body, body("Neg x -> e", "e"))


@zoo
def sparse_documented() -> ModelProto:
    proto = _sparse_initializer(True, False)
    proto.graph.sparse_initializer[0].values.doc_string = "pruned"
    return proto


@zoo
def sparse_constant_node() -> ModelProto:
    sparse = node("Constant", "", "W")
    attribute = raw_attribute(sparse, "sparse_value", AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.CopyFrom(sparse_tensor("", raw=False, coordinates=False))
    nodes = [sparse, node("MatMul", "x W", "y")]
    return model(graph(nodes, [value("x")], [value("y")]))


@zoo
def initializer_is_input_ir3() -> ModelProto:
    proto = matmul(opset=8, ir=3)
    proto.graph.input.append(value("W"))
    return proto


@zoo
def initializer_is_input() -> ModelProto:
    proto = matmul()
    proto.graph.input.append(value("W"))
    return proto


@zoo
def initializer_is_first_input() -> ModelProto:
    proto = matmul()
    proto.graph.input.insert(0, value("W"))
    return proto


@zoo
def initializer_is_unused_input() -> ModelProto:
    proto = matmul(constants=[constant("W", W), constant("V", W)])
    proto.graph.input.append(value("V"))
    return proto


@zoo
def initializer_unused() -> ModelProto:
    return matmul(constants=[constant("W", W), constant("unused", W)])


@zoo
def initializer_is_output() -> ModelProto:
    proto = matmul()
    proto.graph.output.append(value("W"))
    return proto


@zoo
def initializer_is_all() -> ModelProto:
    return model(graph([], [], [value("W")], [constant("W", W)]))


@zoo
def initializer_shared() -> ModelProto:
    nodes = [node("MatMul", "x W", "t"), node("MatMul", "t W", "y")]
    return model(graph(nodes, [value("x")], [value("y")], [constant("W", W)]))


@zoo
def initializers_equal() -> ModelProto:
    nodes = [node("MatMul", "x V", "t"), node("MatMul", "t W", "y")]
    constants = [constant("V", W), constant("W", W)]
    return model(graph(nodes, [value("x")], [value("y")], constants))


# ---------------- graphs


@zoo
def input_is_output() -> ModelProto:
    proto = matmul()
    proto.graph.output.append(value("x"))
    return proto


@zoo
def empty_graph() -> ModelProto:
    return model(graph([], [value("x")], [value("x")]))


@zoo
def input_unused() -> ModelProto:
    proto = matmul()
    proto.graph.input.append(value("u"))
    return proto


@zoo
def output_twice() -> ModelProto:
    proto = matmul()
    proto.graph.output.append(value("y"))
    return proto


@zoo
def output_used_inside() -> ModelProto:
    nodes = [node("Relu", "x", "y"), node("Neg", "y", "z")]
    return model(graph(nodes, [value("x")], [value("y"), value("z")]))


@zoo
def input_used_twice_by_a_node() -> ModelProto:
    return model(graph([node("Mul", "x x", "y")], [value("x")], [value("y")]))


@zoo
def node_names_repeated() -> ModelProto:
    nodes = [node("Relu", "x", "a", name="n"), node("Neg", "a", "y", name="n")]
    return model(graph(nodes, [value("x")], [value("y")]))


@zoo
def nodes_equal() -> ModelProto:
    nodes = [node("Relu", "x", "a"), node("Relu", "x", "b"), node("Add", "a b", "y")]
    return model(graph(nodes, [value("x")], [value("y")]))


@zoo
def node_unused() -> ModelProto:
    nodes = [node("Relu", "x", "y"), node("Neg", "x", "nobody_uses_it")]
    return model(graph(nodes, [value("x")], [value("y")]))


@zoo
def symbolic_dimensions() -> ModelProto:
    inputs, outputs = [value("x", ("batch", None))], [value("y", ("batch", "seq+1"))]
    return model(graph([node("Relu", "x", "y")], inputs, outputs))


@zoo
def negative_dimension() -> ModelProto:
    return model(graph([node("Relu", "x", "y")], [value("x", (-1, 2))], [value("y", (-1, 2))]))


@zoo
def zero_dimension() -> ModelProto:
    return model(graph([node("Relu", "x", "y")], [value("x", (0, 2))], [value("y", (0, 2))]))


@zoo
def shapes_unknown() -> ModelProto:
    return model(graph([node("Relu", "x", "y")], [value("x", None)], [value("y", None)]))


@zoo
def scalars_in_and_out() -> ModelProto:
    return model(graph([node("Relu", "x", "y")], [value("x", ())], [value("y", ())]))


@zoo
def optional_input_in_the_middle() -> ModelProto:
    constants = [constant("m", np.float32(1))]
    return model(graph([node("Clip", "x - m", "y")], [value("x")], [value("y")], constants))


@zoo
def optional_inputs_at_the_end() -> ModelProto:
    return model(graph([node("Clip", "x - -", "y")], [value("x")], [value("y")]))


@zoo
def optional_output_at_the_end() -> ModelProto:
    pool = node("MaxPool", "x", "y -", kernel_shape=[1, 1])
    return model(graph([pool], [value("x", (1, 1, 2, 2))], [value("y", (1, 1, 2, 2))]))


@zoo
def optional_output_in_the_middle() -> ModelProto:
    shapes = {"W": (1, 4, 2), "R": (1, 4, 1)}
    weights = [constant(name, np.ones(shape, np.float32)) for name, shape in shapes.items()]
    lstm = node("LSTM", "x W R - - -", "- - y", hidden_size=1)
    return model(graph([lstm], [value("x", (3, 1, 2))], [value("y", (1, 1, 1))], weights))


@zoo
def reversed_order() -> ModelProto:
    """2,000 nodes, the last first: recursive sorting fails on it."""
    nodes = [node("Relu", f"t{i}", f"t{i + 1}", name=f"n{i}") for i in range(2000)]
    return model(graph(nodes[::-1], [value("t0")], [value("t2000")]))


@zoo
def names_odd() -> ModelProto:
    """Names of tensors and nodes with spaces, slashes, colons, colliding suffixes, no ASCII."""
    nodes = [
        helper.make_node("MatMul", ["in put:0", "a/b//c"], ["\u00e9\u4e2d"], name="a b"),
        helper.make_node("Relu", ["\u00e9\u4e2d"], ["y_0"], name="y_0"),
    ]
    return model(graph(nodes, [value("in put:0")], [value("y_0")], [constant("a/b//c", W)]))


@zoo
def no_nodes_named() -> ModelProto:
    nodes = [node("Relu", "x", "onnx_graphsurgeon_tensor_0"), node("Neg", "x", "y")]
    return model(graph(nodes, [value("x")], [value("y")]))


# ---------------- bodies


@zoo
def body_captures_initializer() -> ModelProto:
    els = body("MatMul x W -> m; Add m b -> e", "e", [constant("b", np.float32(1))])
    return conditional(body("MatMul x W -> t", "t"), els, [constant("W", W)])


@zoo
def body_captures_value() -> ModelProto:
    before = [node("Exp", "x", "v")]
    return conditional(body("Neg v -> t", "t"), body("Relu v -> e", "e"), before=before)


@zoo
def body_declares_captured() -> ModelProto:
    """A `value_info` in the body about a tensor outside of it."""
    then_body = body("Neg v -> t", "t")
    then_body.value_info.append(value("v"))
    return conditional(then_body, body("Relu v -> e", "e"), before=[node("Exp", "x", "v")])


@zoo
def body_captures_value_defined_later() -> ModelProto:
    proto = conditional(body("Neg v -> t", "t"), body("Relu v -> e", "e"))
    proto.graph.node.append(node("Exp", "x", "v"))
    return proto


@zoo
def body_outputs_initializer() -> ModelProto:
    return conditional(body("Identity x -> t", "t"), body("", "k", [constant("k", W)]))


@zoo
def body_outputs_captured() -> ModelProto:
    return conditional(body("Identity x -> t", "t"), body("", "x"))


@zoo
def body_outputs_constant_node() -> ModelProto:
    els = graph([node("Constant", "", "k", value=constant("", W))], [], [value("k", OPEN)])
    return conditional(body("Identity x -> t", "t"), els)


@zoo
def bodies_with_the_same_names() -> ModelProto:
    then_body = body("MatMul x V -> o", "o", [constant("V", W)])
    else_body = body("MatMul x V -> o", "o", [constant("V", W * 3)])
    return conditional(then_body, else_body)


@zoo
def bodies_with_the_same_names_other_shapes() -> ModelProto:
    then_body = body("Mul x V -> o", "o", [constant("V", W[0])])
    else_body = body("Mul x V -> o", "o", [constant("V", np.float32(2))])
    return conditional(then_body, else_body)


@zoo
def bodies_with_the_same_constant_nodes() -> ModelProto:
    bodies = []
    for factor in (1, 2):
        known = node("Constant", "", "V", value=constant("", W * factor))
        nodes = [known, node("MatMul", "x V", "o")]
        bodies.append(graph(nodes, [], [value("o", OPEN)]))
    return conditional(*bodies)


@zoo
def body_documented() -> ModelProto:
    then_body = body("MatMul x W -> t", "t", [constant("W", W)])
    then_body.name, then_body.doc_string = "then", "a body"
    note(then_body.metadata_props, "k", "v")
    then_body.node[0].doc_string, then_body.initializer[0].doc_string = "n", "i"
    then_body.value_info.append(value("t"))
    then_body.quantization_annotation.add().tensor_name = "t"
    return conditional(then_body, body("Neg x -> e", "e"), ir=11)


@zoo
def if_in_if_in_if() -> ModelProto:
    """Weights owned at each of four levels, used at the innermost."""
    inner = body("MatMul x A -> i1; Add i1 B -> i2; Mul i2 C -> i3; Sub i3 D -> i", "i",
                 [constant("D", W + 4)])  # fmt: skip
    other = body("Neg x -> n", "n")
    for name, offset in (("C", 3), ("B", 2)):
        deeper = node("If", "c", f"y{name}", then_branch=inner, else_branch=other)
        outputs = [value(f"y{name}", OPEN)]
        inner = graph([deeper], [], outputs, [constant(name, W + offset)])
    return conditional(inner, other, [constant("A", W)])


def _loop_body(extra: Sequence[NodeProto], constants: Sequence[TensorProto]) -> onnx.GraphProto:
    """A body that keeps the condition; state in "st", out "so", scan output "sc"."""
    flag = functools.partial(value, shape=[], elem_type=TensorProto.BOOL)
    inputs = [value("it", [], TensorProto.INT64), flag("cd"), value("st")]
    nodes = [node("Identity", "cd", "co"), *extra, node("Identity", "so", "sc")]
    return graph(nodes, inputs, [flag("co"), value("so"), value("sc")], constants)


@zoo
def loop_with_weights() -> ModelProto:
    inner = _loop_body([node("MatMul", "st V", "m"), node("Add", "m W", "so")], [constant("V", W)])
    loop = node("Loop", "n - x", "y z", body=inner)
    constants = [constant("n", np.int64(3)), constant("W", W)]
    return model(graph([loop], [value("x")], [value("y"), value("z", (None, 2, 2))], constants))


@zoo
def loop_body_input_has_initializer() -> ModelProto:
    """A default for a body's input: legal, though a Loop always feeds it."""
    inner = _loop_body([node("Add", "st x", "so")], [constant("st", W)])
    loop = node("Loop", "n - x", "y z", body=inner)
    constants = [constant("n", np.int64(2))]
    return model(graph([loop], [value("x")], [value("y"), value("z", (None, 2, 2))], constants))


@zoo
def if_in_loop_in_if() -> ModelProto:
    choose = node("If", "c", "so", then_branch=body("Add st W -> a", "a"),
                  else_branch=body("Mul st V -> b", "b", [constant("V", W)]))  # fmt: skip
    loop = node("Loop", "n - x", "ly lz", body=_loop_body([choose], []))
    then_body = graph([loop], [], [value("ly", OPEN)], [constant("n", np.int64(3))])
    return conditional(then_body, body("Neg x -> e", "e"), [constant("W", W)])


@zoo
def scan_with_weights() -> ModelProto:
    nodes = [
        node("MatMul", "row W", "m"),
        node("Add", "state m", "so"),
        node("Identity", "so", "r"),
    ]
    pairs = [value(name, (2,)) for name in ("state", "row", "so", "r")]
    inner = graph(nodes, pairs[:2], pairs[2:])
    scan = node("Scan", "s x", "y z", body=inner, num_scan_inputs=1, scan_input_axes=[0])
    constants = [constant("s", np.zeros(2, np.float32)), constant("W", W)]
    outs = [value("y", (2,)), value("z", (2, 2))]
    return model(graph([scan], [value("x")], outs, constants))


@zoo
def body_reuses_names_of_sibling_values() -> ModelProto:
    """The two branches and a node after the If all make a tensor of another name "m"."""
    then_body = body("Relu x -> m; Neg m -> t", "t")
    else_body = body("Exp x -> m; Neg m -> t", "t")
    proto = conditional(then_body, else_body)
    proto.graph.node[0].output[0] = "z"
    proto.graph.node.append(node("Identity", "z", "y"))
    return proto


@zoo
def attribute_graphs() -> ModelProto:
    """An attribute that is a list of graphs, in a domain that no runtime knows."""
    custom = node("Choose", "x", "y", domain="com.example", name="choose")
    attribute = raw_attribute(custom, "branches", AttributeProto.GRAPHS)
    attribute.graphs.append(body("MatMul x W -> a", "a"))
    attribute.graphs.append(body("Mul x V -> b", "b", [constant("V", W)]))
    main = graph([custom], [value("x")], [value("y")], [constant("W", W)])
    return model(main, domains=[helper.make_opsetid("com.example", 1)])


# ---------------- types


def _typed(name: str, proto_type: onnx.TypeProto) -> onnx.ValueInfoProto:
    return helper.make_value_info(name, proto_type)


PAIR = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
MAP = helper.make_map_type_proto(
    TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
)


@zoo
def sequence_input() -> ModelProto:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [None, 2])
    constants = [constant("i", np.int64(0))]
    return model(graph([node("SequenceAt", "s i", "y")], [sequence], [value("y", OPEN)], constants))


@zoo
def sequence_output_and_between() -> ModelProto:
    sequence = helper.make_sequence_type_proto(PAIR)
    nodes = [node("SequenceConstruct", "x x", "t"), node("Identity", "t", "y")]
    infos = [_typed("t", sequence)]
    return model(graph(nodes, [value("x", (2,))], [_typed("y", sequence)], value_info=infos))


@zoo
def optional_tensor_input() -> ModelProto:
    optional = _typed("o", helper.make_optional_type_proto(PAIR))
    return model(graph([node("OptionalGetElement", "o", "y")], [optional], [value("y", (2,))]))


@zoo
def optional_sequence_input() -> ModelProto:
    sequence = helper.make_sequence_type_proto(PAIR)
    optional = _typed("o", helper.make_optional_type_proto(sequence))
    out = value("y", [], TensorProto.BOOL)
    return model(graph([node("OptionalHasElement", "o", "y")], [optional], [out]))


@zoo
def map_input() -> ModelProto:
    nodes = [node("DictVectorizer", "m", "y", domain="ai.onnx.ml", int64_vocabulary=[0, 1])]
    return model(graph(nodes, [_typed("m", MAP)], [value("y", (1, 2))]), domains=[ML])


@zoo
def sequence_of_maps_output() -> ModelProto:
    zipped = node("ZipMap", "x", "z", domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    out = _typed("z", helper.make_sequence_type_proto(MAP))
    return model(graph([zipped], [value("x")], [out]), domains=[ML])


@zoo
def sparse_tensor_input() -> ModelProto:
    kind = helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [2, 2])
    custom = node("Densify", "s", "y", domain="com.example")
    main = graph([custom], [_typed("s", kind)], [value("y")])
    return model(main, domains=[helper.make_opsetid("com.example", 1)])


@zoo
def opaque_input() -> ModelProto:
    kind = onnx.TypeProto()
    kind.opaque_type.domain, kind.opaque_type.name = "com.example", "Blob"
    custom = node("Read", "s", "y", domain="com.example")
    main = graph([custom], [_typed("s", kind)], [value("y")])
    return model(main, domains=[helper.make_opsetid("com.example", 1)])


# ---------------- attributes


@zoo
def attribute_type() -> ModelProto:
    optional = node("Optional", "", "o")
    optional.attribute.append(helper.make_attribute("type", PAIR))
    nodes = [optional, node("OptionalHasElement", "o", "y0"), node("Identity", "x", "y1")]
    outputs = [value("y0", [], TensorProto.BOOL), value("y1")]
    return model(graph(nodes, [value("x")], outputs))


@zoo
def attribute_not_utf8() -> ModelProto:
    odd = node("StringNormalizer", "x", "y", stopwords=[b"caf\xe9"], is_case_sensitive=1)
    inputs, outputs = (
        [value("x", [2], TensorProto.STRING)],
        [value("y", (None,), TensorProto.STRING)],
    )
    return model(graph([odd], inputs, outputs))


@zoo
def attribute_empty_list() -> ModelProto:
    total = node("ReduceSum", "x", "y", keepdims=1)
    raw_attribute(total, "axes", AttributeProto.INTS)
    return model(graph([total], [value("x")], [value("y", OPEN)]), opset=11, ir=7)


@zoo
def attribute_documented() -> ModelProto:
    leaky = node("LeakyRelu", "x", "y", alpha=0.1)
    leaky.attribute[0].doc_string = "the slope"
    return model(graph([leaky], [value("x")], [value("y")]))


@zoo
def attributes_of_every_kind() -> ModelProto:
    """Scalars of value zero, negative zero, empty strings, lists, tensors and lists of tensors."""
    custom = node("Everything", "x", "y", domain="com.example", f=0.0, i=0, s="", fs=[-0.0, 0.1],
                  ints=[0, -1, 2**62], ss=["", "a"], t=constant("inner", W))  # fmt: skip
    custom.attribute[-1].t.doc_string = "an inner tensor"
    raw_attribute(custom, "ts", AttributeProto.TENSORS).tensors.extend([constant("a", W)] * 2)
    raw_attribute(custom, "tps", AttributeProto.TYPE_PROTOS).type_protos.extend([PAIR, MAP])
    raw_attribute(custom, "no_strings", AttributeProto.STRINGS)
    sparse = sparse_tensor("q", raw=True, coordinates=True)
    raw_attribute(custom, "sp", AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse)
    raw_attribute(custom, "sps", AttributeProto.SPARSE_TENSORS).sparse_tensors.append(sparse)
    raw_attribute(custom, "g", AttributeProto.GRAPH).g.CopyFrom(body("Neg x -> n", "n"))
    main = graph([custom], [value("x")], [value("y")])
    return model(main, domains=[helper.make_opsetid("com.example", 1)])


@zoo
def attribute_tensor_int4() -> ModelProto:
    custom = node("Table", "x", "y", domain="com.example",
                  t=constant("", np.array([1, 0, -1], ml_dtypes.int4)))  # fmt: skip
    main = graph([custom], [value("x")], [value("y")])
    return model(main, domains=[helper.make_opsetid("com.example", 1)])


# ---------------- functions


def function(
    name: str, nodes: Sequence[NodeProto], overload: str = "", **fields: Any
) -> onnx.FunctionProto:
    """A function of the domain "local" from "a" to "b"."""
    imports = [helper.make_opsetid("", 21), LOCAL]
    made = helper.make_function("local", name, ["a"], ["b"], nodes, imports, **fields)
    made.overload = overload
    return made


def call(op: str, inputs: str, outputs: str, overload: str = "", **attributes: Any) -> NodeProto:
    made = node(op, inputs, outputs, domain="local", **attributes)
    made.overload = overload
    return made


def with_functions(
    nodes: Sequence[NodeProto], *functions: onnx.FunctionProto, **fields: Any
) -> ModelProto:
    main = graph(nodes, [value("x")], [value("y", OPEN)], **fields)
    return model(main, domains=[LOCAL], functions=functions)


@zoo
def function_overloads() -> ModelProto:
    nodes = [call("f", "x", "t", "A", name="n1"), call("f", "t", "y", "B", name="n2")]
    functions = [function("f", [node(op, "a", "b")], overload) for op, overload in
                 (("Relu", "A"), ("Neg", "B"))]  # fmt: skip
    for made in functions:
        made.doc_string = f"overload {made.overload}"
        note(made.metadata_props, "k", made.overload)
        made.value_info.append(value("b"))
    return with_functions(nodes, *functions)


@zoo
def function_attribute_reference() -> ModelProto:
    leaky = node("LeakyRelu", "a", "b")
    raw_attribute(leaky, "alpha", AttributeProto.FLOAT).ref_attr_name = "slope"
    made = function("f", [leaky], attributes=["slope"])
    return with_functions([call("f", "x", "y", slope=0.5)], made)


@zoo
def function_attribute_default() -> ModelProto:
    leaky = node("LeakyRelu", "a", "b")
    raw_attribute(leaky, "alpha", AttributeProto.FLOAT).ref_attr_name = "slope"
    made = function("f", [leaky], attribute_protos=[helper.make_attribute("slope", 0.25)])
    return with_functions([call("f", "x", "y")], made)


@zoo
def function_constant_by_reference() -> ModelProto:
    """A Constant node in a function whose value is the caller's attribute: never an initializer."""
    known = node("Constant", "", "k")
    raw_attribute(known, "value_float", AttributeProto.FLOAT).ref_attr_name = "amount"
    made = function("f", [known, node("Add", "a k", "b")], attributes=["amount"])
    return with_functions([call("f", "x", "y", amount=2.5)], made)


@zoo
def function_with_weight() -> ModelProto:
    known = node("Constant", "", "k", name="weight", value=constant("", W))
    made = function("f", [known, node("MatMul", "a k", "b")])
    return with_functions([call("f", "x", "t"), call("f", "t", "y")], made)


@zoo
def function_constant_lists() -> ModelProto:
    """Constant nodes in a function that say their values in other ways than a tensor."""
    floats = node("Constant", "", "k", value_floats=[1.0, 2.0])
    number = node("Constant", "", "n", value_int=1)
    nodes = [floats, number, node("Add", "a k", "t"), node("CumSum", "t n", "b")]
    return with_functions([call("f", "x", "y")], function("f", nodes))


@zoo
def function_nested() -> ModelProto:
    inner = function("g", [node("Neg", "a", "b")])
    outer = function("f", [call("g", "a", "t"), node("Relu", "t", "b")])
    return with_functions([call("f", "x", "y")], outer, inner)


@zoo
def function_with_body() -> ModelProto:
    truth = node("Constant", "", "c", value=constant("", np.array(True)))
    known = node("Constant", "", "V", value=constant("", W))
    then_body = body("MatMul a V -> t", "t")
    else_body = body("Add a k -> e", "e", [constant("k", np.float32(1))])
    choose = node("If", "c", "b", then_branch=then_body, else_branch=else_body)
    return with_functions([call("f", "x", "y")], function("f", [truth, known, choose]))


@zoo
def function_called_in_body() -> ModelProto:
    then_body = graph([call("f", "x", "t")], [], [value("t", OPEN)])
    proto = conditional(then_body, body("Neg x -> e", "e"), domains=[LOCAL])
    proto.functions.append(function("f", [node("Relu", "a", "b")]))
    return proto


@zoo
def function_unused() -> ModelProto:
    return with_functions([node("Relu", "x", "y")], function("f", [node("Neg", "a", "b")]))


@zoo
def function_output_is_input() -> ModelProto:
    imports = [helper.make_opsetid("", 21)]
    made = helper.make_function("local", "f", ["a"], ["a"], [], imports)
    return with_functions([call("f", "x", "t"), node("Relu", "t", "y")], made)


@zoo
def function_with_optional_input() -> ModelProto:
    clip = node("Clip", "a lo hi", "b")
    imports = [helper.make_opsetid("", 21)]
    made = helper.make_function("local", "f", ["a", "lo", "hi"], ["b"], [clip], imports)
    proto = with_functions([call("f", "x - m", "y")], made)
    proto.graph.initializer.append(constant("m", np.float32(1)))
    return proto


@zoo
def function_of_another_opset() -> ModelProto:
    """The function was written for opset 11, where Squeeze has its axes as an attribute."""
    made = function("f", [node("Squeeze", "a", "b", axes=[0])])
    made.opset_import[0].version = 11
    proto = with_functions([call("f", "x", "y")], made)
    proto.graph.input[0].CopyFrom(value("x", (1, 2)))
    return proto


@zoo
def function_overrides_operator() -> ModelProto:
    """A function with an operator's own name: legal, and used instead of it."""
    imports = [helper.make_opsetid("", 21)]
    made = helper.make_function("", "Relu", ["a"], ["b"], [node("Neg", "a", "b")], imports)
    return model(graph([node("Relu", "x", "y")], [value("x")], [value("y")]), functions=[made])


# ---------------- external data


def _external(tensor: TensorProto, location: str, offset: int | None, length: int | None) -> None:
    """Turns `tensor` into a reference to bytes in the file `location`."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    keys = {"location": location, "offset": offset, "length": length}
    for key, content in keys.items():
        if content is not None:
            note(tensor.external_data, key, str(content))


def write_external(
    folder: Path, places: Sequence[tuple[str, int | None, int | None]], pad: int = 0
) -> Path:
    """A chain of MatMuls whose weights lie at `places` (file, offset, length) below `folder`."""
    nodes, constants = [], []
    for index, (location, offset, length) in enumerate(places):
        array = W + index
        path = folder / location
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(offset or 0)
            file.write(array.tobytes() + bytes(pad))
        tensor = constant(f"W{index}", array)
        _external(tensor, location, offset, length)
        constants.append(tensor)
        nodes.append(node("MatMul", f"t{index} W{index}", f"t{index + 1}"))
    proto = model(graph(nodes, [value("t0")], [value(f"t{len(places)}")], constants))
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@external
def one_file_one_tensor(folder: Path) -> Path:
    return write_external(folder, [("weights.bin", 0, 16)])


@external
def one_file_several_tensors(folder: Path) -> Path:
    return write_external(folder, [("w", 0, 16), ("w", 4096, 16), ("w", 64, 16)])


@external
def several_files(folder: Path) -> Path:
    return write_external(folder, [("a.bin", 0, 16), ("b.bin", 8, 16)])


@external
def in_a_sub_folder(folder: Path) -> Path:
    return write_external(folder, [("data/deep/w.bin", 0, 16)])


@external
def no_length(folder: Path) -> Path:
    return write_external(folder, [("w.bin", None, None)])


@external
def offset_without_length(folder: Path) -> Path:
    return write_external(folder, [("w.bin", 32, None)])


@external
def two_tensors_at_one_place(folder: Path) -> Path:
    path = write_external(folder, [("w.bin", 0, 16), ("w.bin", 32, 16)])
    proto = onnx.load(path, load_external_data=False)
    _external(proto.graph.initializer[1], "w.bin", 0, 16)
    path.write_bytes(proto.SerializeToString())
    return path


@external
def checksum_and_unknown_keys(folder: Path) -> Path:
    path = write_external(folder, [("w.bin", 0, 16)])
    proto = onnx.load(path, load_external_data=False)
    note(proto.graph.initializer[0].external_data, "checksum", "0" * 40)
    path.write_bytes(proto.SerializeToString())
    return path


@external
def in_a_body(folder: Path) -> Path:
    path = write_external(folder, [("w.bin", 0, 16)])
    tensor = onnx.load(path, load_external_data=False).graph.initializer[0]
    proto = conditional(body("MatMul x W0 -> t", "t", [tensor]), body("Neg x -> e", "e"))
    path.write_bytes(proto.SerializeToString())
    return path


@external
def in_a_constant_node(folder: Path) -> Path:
    path = write_external(folder, [("w.bin", 0, 16)])
    tensor = onnx.load(path, load_external_data=False).graph.initializer[0]
    nodes = [node("Constant", "", "k", value=tensor), node("MatMul", "x k", "y")]
    proto = model(graph(nodes, [value("x")], [value("y")]))
    path.write_bytes(proto.SerializeToString())
    return path


@external
def name_with_spaces_and_accents(folder: Path) -> Path:
    return write_external(folder, [("the weights \u00e9.bin", 0, 16)])


@external
def empty_tensor(folder: Path) -> Path:
    path = write_external(folder, [("w.bin", 0, 16)])
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer.add()
    tensor.name, tensor.data_type = "empty", TensorProto.FLOAT
    tensor.dims.extend([0, 2])
    _external(tensor, "w.bin", 0, 0)
    path.write_bytes(proto.SerializeToString())
    return path
