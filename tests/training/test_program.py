"""What is in the graphs, what is trained, and the way back into the model."""

import numpy as np
import onnx
import pytest

from onnxslim_passes.errors import DifferentiationError, UnknownNameError, UnsupportedModelError
from onnxslim_passes.model import Model, check_model
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.forward import dropout_ratios
from onnxslim_passes.training.layout import Layout
from onnxslim_passes.training.lowering import lower
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import build, find_constraints
from onnxslim_passes.training.writing_back import write_back
from tests.training.nets import ENDING, MLP, mlp, points, with_weights


def made(model=None, **options):
    return build(
        model or mlp(),
        objective=options.pop("objective", Objective(loss="cross-entropy")),
        update=options.pop("update", Update()),
        parameters=options.pop("parameters", Parameters()),
        **options,
    )


def test_graphs_hold_no_weights_and_only_standard_operators():
    wide = MLP.replace("5]", "90]").replace("[5,", "[90,")
    program = made(mlp(wide), teacher=mlp(wide, seed=1), with_gradients=True)
    for graph in (program.training, program.evaluation, program.gradients):
        check_model(graph)
        assert {node.domain for node in graph.nodes()} <= {""}
        assert max(constant.size for constant in graph.constants()) <= 256


def test_large_weights_of_the_teacher_are_inputs_that_never_change():
    wide = MLP.replace("5]", "90]").replace("[5,", "[90,")
    program = made(mlp(wide), teacher=mlp(wide, seed=1))
    frozen = [spec for spec in program.layout.state if spec.role == "frozen"]
    assert [spec.input for spec in frozen] == ["teacher/w1", "teacher/w2"]
    assert all(spec.output is None for spec in frozen)
    with open_session(program.evaluation) as session:
        assert {spec.name for spec in session.inputs} >= {"teacher/w1", "w1/value"}


def test_the_layout_survives_its_file():
    layout = made(teacher=mlp(seed=1)).layout
    again = Layout.from_text(layout.to_text({"graphs": ["a.onnx"]}), "training.json")
    assert again.to_text() == layout.to_text()


def test_inputs_and_outputs_are_those_of_the_layout():
    program = made()
    layout = program.layout
    names = [spec.name for spec in layout.inputs]
    assert names == ["x"]
    assert layout.labels.shape == ("N",)
    with open_session(program.training) as session:
        taken = {spec.name for spec in session.inputs}
        given = {spec.name for spec in session.outputs}
    state = {spec.input for spec in layout.state}
    # A step without dropout and without Adam's bias would not need its number.
    assert taken == {*names, "labels", "learning_rate", "step", *state}
    assert given == {"loss", "metric", *(spec.output for spec in layout.changing())}


def test_patterns_choose_what_is_trained():
    program = made(parameters=Parameters(include=("second",)))
    assert [row["weight"] for row in program.layout.weights] == ["w2", "b2"]
    reasons = {d.where: d.reason for d in program.decisions if not d.taken}
    assert reasons == {"w1": "not matched by include", "b1": "not matched by include"}
    with pytest.raises(UnknownNameError, match="Did you mean 'second'"):
        made(parameters=Parameters(include=("secnd",)))


def test_numbers_that_are_not_learned_are_left_alone():
    text = MLP.replace("(a, w2, b2)", "(s, w2, b2)").replace(
        "    [second]", "    m = Add (a, mask)\n    s = Mul (m, half)\n    [second]"
    )
    text = text.replace("float[3] b2", "float[3] b2, float[1, 5] mask, float half")
    model = mlp(text, half=0.5, mask=np.zeros((1, 5)))
    reasons = {d.where: d.reason for d in made(model).decisions if not d.taken}
    assert "single number" in reasons["half"]


def test_a_weight_that_the_loss_does_not_meet_stays():
    text = MLP.replace("float[N, 3] y)", "float[N, 3] y, float[N, 2] z)").replace(
        "b2)\n}", "b2)\n    z = MatMul (a, w3)\n}"
    )
    model = mlp(text.replace("float[3] b2", "float[3] b2, float[5, 2] w3"))
    program = made(model)
    reasons = {d.where: d.reason for d in program.decisions if not d.taken}
    assert "no gradient from the loss" in reasons["w3"]
    assert not [spec for spec in program.layout.state if "w3" in spec.input and spec.output]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model.from_proto(with_weights("""
            <ir_version: 9, opset_import: ["" : 18]>
            g (float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }""")), "no floating-point"),
        (Model.from_proto(with_weights("""
            <ir_version: 9, opset_import: ["" : 18]>
            g (float[N, 32] x) => (float[N, 32] y) <int8[32, 32] w>
            {
                q, scale, zero = DynamicQuantizeLinear (x)
                p = MatMulInteger (q, w, zero)
                f = Cast <to = 1> (p)
                y = Mul (f, scale)
            }""")), "weights are integers"),
    ],
    ids=["none", "integers"],
)  # fmt: skip
def test_a_model_without_weights_to_train_is_refused(model, message):
    with pytest.raises(UnsupportedModelError, match=f"no weight to train: .*{message}"):
        made(model, objective=Objective(loss="mse"))


def test_a_way_without_gradient_names_its_nodes():
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    net (float[N, 4, 4] x) => (float[N] y) <float[4, 4] w>
    { h = MatMul (x, w)
      [volume] y = Det (h) }
    """
    with pytest.raises(DifferentiationError, match="'volume' \\(Det\\)"):
        made(mlp(text), objective=Objective(loss="mse"))
    frozen = Parameters(freeze_unsupported=True)
    with pytest.raises(UnsupportedModelError, match="depends on none of the weights"):
        made(mlp(text), objective=Objective(loss="mse"), parameters=frozen)


def test_an_unknown_output_comes_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'h'"):
        made(objective=Objective(loss="mse", output="hh"))


def tuned_model(model, *, seed=0):
    """The model with every trained weight moved a bit."""
    program = made(model)
    random = np.random.default_rng(seed)
    state = {
        name: array + random.standard_normal(array.shape).astype(np.float32)
        if array.dtype.kind == "f"
        else array
        for name, array in program.state.items()
    }
    work = model.copy()
    return work, write_back(work, program.constraints, state)


def without_values(model):
    proto = model.to_proto()
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
    return proto


def test_writing_back_changes_values_only():
    model = mlp()
    model.set_metadata("vocabulary", "a b c")
    tuned, decisions = tuned_model(model)
    assert without_values(tuned) == without_values(model)
    assert all(decision.taken for decision in decisions)
    assert not np.array_equal(next(tuned.constants()).values, next(model.constants()).values)


def test_weights_in_branches_go_back_to_their_branches(if_model):
    model = Model.from_proto(if_model)
    flag = {"flag": np.array(True)}
    objective = Objective(loss="mse")
    program = made(model, objective=objective, fixed_inputs=flag)
    state = {name: array + 1 for name, array in program.state.items()}
    work = model.copy()
    write_back(work, program.constraints, state)
    taken = {row["weight"] for row in program.layout.weights}
    assert taken
    assert any("then_branch" in where for where in taken)
    for before, after in zip(model.constants(), work.constants(), strict=True):
        moved = not np.array_equal(before.values, after.values)
        assert moved == (before.where in taken), before.where


def test_scalers_in_front_become_plain_operators():
    text = """
    <ir_version: 9, opset_import: ["" : 18, "ai.onnx.ml" : 1]>
    net (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w1>
    { s = ai.onnx.ml.Scaler <offset = [1.0, 2.0, 3.0, 4.0], scale = [0.5, 0.5, 2.0, 2.0]> (x)
      y = MatMul (s, w1) }
    """
    model = mlp(text)
    program = made(model)
    assert {node.domain for node in program.training.nodes()} == {""}
    x, labels = points(6)
    feed = {"x": x, "labels": labels, **program.state}
    with open_session(program.evaluation) as session, open_session(model) as original:
        loss = session.run({s.name: feed[s.name] for s in session.inputs})["loss"]
        y = original.run({"x": x})["y"].astype(np.float64)
    logp = y - np.log(np.exp(y).sum(1, keepdims=True))
    assert loss == pytest.approx(-logp[np.arange(6), labels].mean(), rel=1e-5)


def test_dropout_in_front_of_a_pruned_layer_drops_less():
    text = ENDING["dropout"].replace("float[3] b2", "float[3] b2, float ratio")
    model = mlp(text, ratio=0.5)
    constraints, _ = find_constraints(model, Parameters())
    sparse = [Sparse(c) if c.where == "w2" else c for c in constraints]
    assert dropout_ratios(lower(model), constraints) == {"d": 0.5}
    assert dropout_ratios(lower(model), sparse) == {"d": pytest.approx(0.25)}


class Sparse:
    """A weight of which a quarter is left."""

    density = 0.25

    def __init__(self, inner):
        self.replaces = inner.replaces


def test_names_that_the_model_has_already_are_avoided():
    proto = with_weights(MLP.replace("] a = Relu", "] step = Relu").replace("(a, w2", "(step, w2"))
    layout = made(Model.from_proto(proto)).layout
    assert layout.step != "step"
    onnx.checker.check_model(made(Model.from_proto(proto)).training.to_proto())


def test_half_precision_weights_stay_half_precision():
    text = MLP.replace("float[", "float16[")
    tuned, _ = tuned_model(mlp(text))
    assert {constant.dtype.name for constant in tuned.constants()} == {"float16"}


def test_running_statistics_move_along_when_asked():
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    net (float[N, 4] x) => (float[N, 4] y)
    <float[4] scale, float[4] bias, float[4] mean, float[4] var>
    { y = BatchNormalization <momentum = 0.5> (x, scale, bias, mean, var) }
    """
    model = mlp(text, mean=np.zeros(4), var=np.ones(4))
    program = made(
        model, objective=Objective(loss="mse"), parameters=Parameters(batch_norm="batch")
    )
    x = points(20)[0]
    feed = {"x": x, "labels": x, **program.state}
    feed |= {"step": np.array(0), "learning_rate": np.array(0.0, np.float32)}
    with open_session(program.training) as session:
        found = session.run({s.name: feed[s.name] for s in session.inputs})
    np.testing.assert_allclose(found["next/mean"], x.mean(0) / 2, rtol=1e-5, atol=1e-6)
    work = model.copy()
    write_back(work, program.constraints, program.state | {"mean": found["next/mean"]})
    values = {constant.name: constant.values for constant in work.constants()}
    np.testing.assert_array_equal(values["mean"], found["next/mean"])
