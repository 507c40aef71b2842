"""What does not fold, or folds to something else, is undone; everything else stays."""

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxslim_passes.errors import RuntimeRefusedError
from onnxslim_passes.model import Model
from onnxslim_passes.storage import ENCODINGS
from onnxslim_passes.storage.base import Expression, Literal, Payload, Site, step
from onnxslim_passes.storage.contents import Contents
from onnxslim_passes.storage.folding import settle
from onnxslim_passes.storage.writer import Replacement, Writer, short_names

SITE = Site(17)
RNG = np.random.default_rng(0)
WEIGHTS = {
    name: RNG.integers(0, 3, (32, 32)).astype(np.float32) for name in ("w0", "w1", "w2", "w3")
}


def chain() -> Model:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 32] x) => (float[N, 32] y) {
            a = MatMul(x, w0)  b = MatMul(a, w1)  c = MatMul(b, w2)  y = MatMul(c, w3)
        }""")
    proto.graph.initializer.extend(
        numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()
    )
    return Model.from_proto(proto)


def payload(values: np.ndarray) -> Payload:
    return Payload(values.shape, values.dtype, values.nbytes, lambda: values)


def never_folded(values: np.ndarray) -> Expression:
    """The right values, by way of random numbers, which ONNX Runtime does not fold."""
    random = step("RandomUniformLike", payload(values))
    return step("Add", payload(values), step("Mul", random, Literal.of(0, np.float32)))


def other_values(values: np.ndarray) -> Expression:
    """Folds, but not to the weight."""
    return step("Add", payload(values), Literal.of(1, np.float32))


def packed(values: np.ndarray) -> Expression:
    (plan,) = ENCODINGS["codebook-packed"].plans(Contents(values), SITE)
    return plan.root


def replacements(model: Model, roots: dict[str, Expression]) -> list[Replacement]:
    writer = Writer(model, model.graph, short_names())
    constants = {constant.name: constant for constant in model.constants()}
    return [Replacement(constants[name], root, writer) for name, root in roots.items()]


def test_folding_replacements_stay() -> None:
    model = chain()
    rejected = settle(model, replacements(model, {n: packed(w) for n, w in WEIGHTS.items()}))
    assert not rejected
    assert not {constant.name for constant in model.constants()} & set(WEIGHTS)


@pytest.mark.parametrize(
    ("wrong", "reason"), [(never_folded, "does not fold"), (other_values, "other operators")]
)
def test_only_the_wrong_one_is_undone(wrong, reason: str) -> None:  # type: ignore[no-untyped-def]
    model = chain()
    roots = {name: packed(values) for name, values in WEIGHTS.items()}
    roots["w2"] = wrong(WEIGHTS["w2"])
    rejected = settle(model, replacements(model, roots))
    assert [each.constant.name for each in rejected] == ["w2"]
    assert reason in next(iter(rejected.values()))
    names = {constant.name for constant in model.constants()}
    assert names & set(WEIGHTS) == {"w2"}
    assert not [node for node in model.nodes() if node.op in ("RandomUniformLike", "Add")]


def test_undone_in_reverse_the_model_is_as_it_was() -> None:
    model = chain()
    before = model.to_proto().SerializeToString()
    made = replacements(model, {name: packed(values) for name, values in WEIGHTS.items()})
    for each in made:
        each.apply()
    assert model.nbytes() < len(before) / 4
    for each in reversed(made):
        each.undo()
    assert model.to_proto().SerializeToString() == before


def test_a_model_the_runtime_refuses_proves_nothing() -> None:
    model = chain()
    next(model.nodes()).domain = "nobody.knows"
    with pytest.raises(RuntimeRefusedError):
        settle(model, replacements(model, {"w1": packed(WEIGHTS["w1"])}))
