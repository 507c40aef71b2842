"""Weights of integers: trained as floats, written as integers of the same type."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.data import TrainingData
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import TrainingProgram, build
from onnxslim_passes.training.trainer import Trainer
from onnxslim_passes.training.writing_back import write_back

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def quantized(kind: Any = np.int8, *, channel: bool = True, block: int = 0) -> Model:
    """QDQ as a static quantizer writes it: activations, a weight, a bias of int32."""
    info = ml_dtypes.iinfo(kind)
    most = min(int(info.max), 127)
    weight = noise(12, 8, seed=1)
    if block:
        blocks = np.abs(weight.reshape(12 // block, block, 8)).max(axis=1)
        scale = (blocks / most).astype(np.float32)
        spread = np.repeat(scale, block, axis=0)
        attributes = f"<axis = 0, block_size = {block}>"
    else:
        peaks = np.abs(weight).max(axis=0) if channel else np.abs(weight).max()
        scale = np.asarray(peaks / most, np.float32)
        spread = scale
        attributes = "<axis = 1>" if channel else ""
    codes = np.rint(weight / spread).astype(kind)
    x_scale = np.float32(0.02)
    with_bias = not block
    bias = "ba = DequantizeLinear <axis = 0> (b, sb)" if with_bias else ""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 11, opset_import: ["": 23]>
        net (float[N, 12] x) => (float[N, 4] y) {{
            q = QuantizeLinear (x, sx, zx)
            d = DequantizeLinear (q, sx, zx)
            wf = DequantizeLinear {attributes} (w, s)
            {bias}
            h = Gemm (d, wf{", ba" if with_bias else ""})
            a = Relu (h)
            y = MatMul (a, last)
        }}"""
    )
    constants: dict[str, Any] = {
        "sx": x_scale,
        "zx": np.int8(3),
        "w": codes,
        "s": scale,
        "last": noise(8, 4, seed=2),
    }
    if with_bias:
        sb = np.broadcast_to(x_scale * scale, 8).astype(np.float32)
        constants |= {"sb": sb, "b": np.arange(-40, 40, 10, dtype=np.int32)}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()
    )
    return Model.from_proto(proto)


def program_of(model: Model, **parameters: Any) -> TrainingProgram:
    return build(
        model,
        objective=Objective(loss="cross-entropy"),
        update=Update(),
        parameters=Parameters(**parameters),
    )


def trained(model: Model, *, steps: int = 6, **parameters: Any) -> tuple[Model, list[float]]:
    """A copy after some steps, and the losses on the way."""
    program = program_of(model, **parameters)
    trainer = Trainer(program)
    x = noise(64, 12, seed=9) * 4
    samples = Samples.from_feeds([{"x": x, "labels": np.argmax(x[:, :4], axis=1)}])
    with open_session(model) as session:
        data = TrainingData.read(samples, session.inputs).with_labels_as(program.layout.labels)
    batch = data.batch(data.in_order(64)[0])
    losses = [trainer.step(batch, 0.02).loss for _ in range(steps)]
    tuned = model.copy()
    write_back(tuned, program.constraints, trainer.read())
    return tuned, losses


def constants(model: Model) -> dict[str, Array]:
    return {str(constant.name): constant.values for constant in model.constants()}


KINDS = {
    "int8": {"kind": np.int8},
    "int8, one scale": {"kind": np.int8, "channel": False},
    "int4": {"kind": ml_dtypes.int4},
    "int4 in blocks": {"kind": ml_dtypes.int4, "block": 4},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_integers_stay_integers_and_learn(options: dict[str, Any]) -> None:
    model = quantized(**options)
    tuned, losses = trained(model, steps=20)
    before, after = constants(model), constants(tuned)
    assert losses[-1] < losses[0]
    assert after["w"].dtype == before["w"].dtype
    assert after["w"].shape == before["w"].shape
    assert not np.array_equal(after["w"], before["w"])
    assert (after["s"] > 0).all()
    assert not np.array_equal(after["s"], before["s"])
    steps = after["w"].astype(int)
    assert np.abs(steps).max() <= np.abs(before["w"].astype(int)).max()
    assert np.array_equal(after["sx"], before["sx"])
    nodes = [(node.op, node.name) for node in model.nodes()]
    assert [(node.op, node.name) for node in tuned.nodes()] == nodes


@pytest.mark.parametrize("options", [KINDS["int8"], KINDS["int8, one scale"]])
def test_the_scale_of_a_bias_is_that_of_its_products(options: dict[str, Any]) -> None:
    tuned, _ = trained(quantized(**options), steps=20)
    after = constants(tuned)
    expected = np.broadcast_to(after["sx"] * after["s"], 8)
    assert np.allclose(after["sb"], expected, rtol=1e-5)
    assert after["b"].dtype == np.int32
    assert not np.array_equal(after["b"], np.arange(-40, 40, 10))


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_what_is_trained_is_what_is_written(options: dict[str, Any]) -> None:
    """The loss that training saw is that of the integers, but for products in another order."""
    model = quantized(**options)
    program = program_of(model)
    trainer = Trainer(program)
    x = noise(32, 12, seed=3) * 4
    labels = np.argmax(x[:, :4], axis=1)
    samples = Samples.from_feeds([{"x": x, "labels": labels}])
    with open_session(model) as session:
        data = TrainingData.read(samples, session.inputs).with_labels_as(program.layout.labels)
    for _ in range(5):
        trainer.step(data.batch(data.in_order(32)[0]), 0.02)
    seen = trainer.evaluate(data, 32).loss
    tuned = model.copy()
    write_back(tuned, program.constraints, trainer.read())
    with open_session(tuned, optimize="none") as session:
        logits = session.run({"x": x})["y"].astype(np.float64)
    spread = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(32), labels]
    assert spread.mean() == pytest.approx(seen, rel=1e-4)


def test_a_scale_that_others_take_stays() -> None:
    model = quantized(channel=False)
    scale = next(constant for constant in model.constants() if constant.name == "s")
    model.graph.add_node("Identity", [scale], outputs=["other"])
    model.graph.outputs.append(model.graph.nodes[-1].outputs[0])
    tuned, _ = trained(model)
    before, after = constants(model), constants(tuned)
    assert np.array_equal(before["s"], after["s"])
    assert not np.array_equal(before["w"], after["w"])


def test_without_training_nothing_changes() -> None:
    model = quantized()
    program = program_of(model)
    tuned = model.copy()
    write_back(tuned, program.constraints, program.state)
    for name, array in constants(tuned).items():
        assert np.array_equal(array, constants(model)[name]), name


def test_names_leave_integers_out() -> None:
    program = program_of(quantized(), exclude=["w"])
    told = {decision.where: decision.reason for decision in program.decisions}
    assert told["w"] == "excluded by 'w'"
    assert {constraint.where for constraint in program.constraints} == {"last"}


def test_binary_and_ternary_integers() -> None:
    for values in ([-1, 1], [-1, 0, 1]):
        model = quantized(channel=False)
        codes = np.random.default_rng(0).choice(values, (12, 8)).astype(np.int8)
        for constant in model.constants():
            if constant.name == "w":
                constant.values = codes
            if constant.name == "s":
                constant.values = np.float32(0.3)
        tuned, _ = trained(model, steps=15)
        found = constants(tuned)["w"]
        assert set(np.unique(found)) <= set(values)
        assert not np.array_equal(found, codes)
