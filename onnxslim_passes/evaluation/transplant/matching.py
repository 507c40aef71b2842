"""Which tensors of two models are the same, before and after compression."""

from onnx import TensorProto

from onnxslim_passes.evaluation.transplant.side import Side

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

# Operators that move or select values: what they do to an error says nothing, so that they belong
# to the layers that take their results.
_MOVING = frozenset(
    (
        *("Cast", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool"),
        *("Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    )
)

# What a layer with weights can take in.
_AFFINE = frozenset(("Add", "BatchNormalization", "Div", "Mul", "Sub"))

_CLAMPS = frozenset(("Clip", "Max", "Min", "Relu"))


def matched(a: Side, b: Side) -> dict[str, str]:
    """Float tensors that both make from their inputs: name in A -> name in B, in A's order."""
    twins: dict[str, str] = {}
    for name in a.made:
        if name not in b.maker:
            continue
        twin = b.before_pair(name)
        if twin in a.maker or a.before_pair(name) != name:
            twin = name
        meant = _meant(a, b, name, twin)
        moving = a.node(meant).op_type in _MOVING and meant not in a.outputs
        fixed = meant in a.fixed or twin in b.fixed
        if not moving and not fixed and _alike(a, b, meant, twin):
            twins.setdefault(meant, twin)
    order = {name: number for number, name in enumerate(a.made)}
    return dict(sorted(twins.items(), key=lambda pair: order[pair[0]]))


def _meant(a: Side, b: Side, name: str, twin: str) -> str:
    """The tensor of A that the one called `name` in B is.

    A convolution that a BatchNormalization was merged into makes what that one made, under its own
    name. One that a Relu was removed behind, because saturation does its work, may have the
    Relu's.
    """
    maker = a.node(name)
    if maker.op_type in _CLAMPS and b.node(twin).op_type not in _CLAMPS:
        before = maker.input[0]
        same = before in a.maker and before not in b.maker
        if same and a.node(before).op_type == b.node(twin).op_type:
            return str(before)
    taken = b.results_of(twin)
    meant = name
    while (taker := a.only_taker(meant)) is not None:
        made = taker.output[0]
        others = {entry for entry in taker.input if entry and entry != meant}
        if made in b.maker or taker.op_type not in _AFFINE or not others <= a.fixed:
            break
        meant = made
    ours = {output for node in a.takers.get(meant, ()) for output in node.output}
    return meant if meant != name and (taken & ours or meant in a.outputs) else name


def _alike(a: Side, b: Side, name: str, twin: str) -> bool:
    """Whether both are floats, of shapes that may be the same."""
    if twin not in b.maker:
        return False
    ours, theirs = a.types.get(name), b.types.get(twin) or b.types.get(name)
    if ours is None or theirs is None:
        return False
    if ours.elem_type not in FLOATS or theirs.elem_type not in FLOATS:
        return False
    if ours.shape is None or theirs.shape is None:
        return True
    return len(ours.shape) == len(theirs.shape) and not any(
        isinstance(x, int) and isinstance(y, int) and x != y
        for x, y in zip(ours.shape, theirs.shape, strict=True)
    )
