"""What a trainer opens: what never moves is built in, where the runtime can lay it out once."""

import pytest

from onnxslim_passes.model import Model
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training import trainer as module
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import build
from onnxslim_passes.training.trainer import Trainer
from tests.training.nets import with_weights

NET = """<ir_version: 9, opset_import: ["" : 18]>
net (float[N, 24] x) => (float[N, 24] y) <float[24, 24] v, float[24, 24] w>
{ h = MatMul (x, v) r = Relu (h) y = MatMul (r, w) }"""


def test_frozen_weights_are_no_inputs_of_the_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    program = build(
        Model.from_proto(with_weights(NET)),
        objective=Objective(loss="mse"),
        update=Update(),
        parameters=Parameters(exclude=("v",)),
    )
    frozen = {spec.input for spec in program.layout.state if spec.role == "frozen"}
    assert frozen
    opened = []

    def watched(model: Model, **options: int):
        opened.append(open_session(model, **options))
        return opened[-1]

    monkeypatch.setattr(module, "open_session", watched)
    Trainer(program)
    assert len(opened) == 2
    for session in opened:
        assert frozen.isdisjoint(spec.name for spec in session.inputs)
    exported = {str(tensor.name) for tensor in program.training.graph.inputs}
    assert frozen <= exported, "the exported graph holds no weights"
