"""What compression made of a weight holds exactly through training and on the way back."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.quantize_weights import QuantizeWeights
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.constraints import Codebook, Masked
from onnxslim_passes.training.data import TrainingData
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import TrainingProgram, build
from onnxslim_passes.training.trainer import Trainer
from onnxslim_passes.training.writing_back import write_back

Array = npt.NDArray[Any]

INPUTS, HIDDEN, CLASSES = 16, 24, 4


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def network(**changed: Array) -> Model:
    """Two matrices and a kernel, with biases."""
    weights = {
        "w1": noise(INPUTS, HIDDEN, seed=1),
        "b1": noise(HIDDEN, seed=2),
        "w2": noise(8, 6, 2, 2, seed=3),
        "w3": noise(CLASSES, 8, seed=4),
        "shape": np.array([-1, 6, 2, 2]),
        **changed,
    }
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]>
        net (float[N, {INPUTS}] x) => (float[N, {CLASSES}] y) {{
            h = Gemm (x, w1, b1)  a = Tanh (h)  m = Reshape (a, shape)
            c = Conv (m, w2)  f = Flatten (c)  y = Gemm <transB = 1> (f, w3)
        }}"""
    )
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return Model.from_proto(proto)


def data(count: int = 32) -> Samples:
    x = noise(count, INPUTS, seed=9) * 4
    return Samples.from_feeds([{"x": x, "labels": np.argmax(x[:, :CLASSES], axis=1)}])


def values(model: Model, name: str) -> Array:
    return next(constant.values for constant in model.constants() if constant.name == name)


def program_of(model: Model, update: Update | None = None, **parameters: Any) -> TrainingProgram:
    return build(
        model,
        objective=Objective(loss="cross-entropy"),
        update=update or Update(),
        parameters=Parameters(**parameters),
    )


def trained(
    model: Model,
    *,
    steps: int = 5,
    rate: float = 0.03,
    update: Update | None = None,
    **options: Any,
) -> Model:
    """A copy after some steps of training."""
    program = program_of(model, update, **options)
    trainer = Trainer(program)
    with open_session(model) as session:
        inputs = session.inputs
    samples = TrainingData.read(data(), inputs).with_labels_as(program.layout.labels)
    for place in range(steps):
        trainer.step(samples.batch(samples.batches(16, 0, place)[0]), rate)
    tuned = model.copy()
    write_back(tuned, program.constraints, trainer.read())
    with open_session(tuned) as session:
        fed = session.run({"x": noise(3, INPUTS)})
        assert np.isfinite(fed["y"]).all()
    return tuned


def pruned(model: Model, **options: Any) -> Model:
    PruneMagnitude(min_elements=1, **options).apply(model, Context())
    return model


def kinds(model: Model, **parameters: Any) -> dict[str, str]:
    return {c.where: c.kind for c in program_of(model, **parameters).constraints}


UPDATES = [
    Update(optimizer="sgd", momentum=0.9, weight_decay=0.01),
    Update(optimizer="adam"),
    Update(optimizer="adamw", weight_decay=0.1),
]


# ---------------- zeros


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.optimizer)
def test_zeros_stay_and_survivors_move(update: Update) -> None:
    model = pruned(network(), sparsity=0.7)
    tuned = trained(model, update=update)
    for name in ("w1", "w2", "w3"):
        before, after = values(model, name), values(tuned, name)
        assert np.array_equal(before == 0, after == 0)
        assert not np.signbit(after[after == 0]).any()
        assert (before[before != 0] != after[after != 0]).mean() > 0.9
    assert not np.array_equal(values(model, "b1"), values(tuned, "b1"))


def test_a_dense_weight_is_free() -> None:
    assert set(kinds(network()).values()) == {"free"}


def test_a_few_zeros_are_chance() -> None:
    w1 = noise(INPUTS, HIDDEN, seed=1)
    w1[0, 0] = 0
    assert kinds(network(w1=w1))["w1"] == "free"


def test_few_survivors_are_no_codebook() -> None:
    """51 of 512 elements have 51 values, which is little; but no two elements share one."""
    model = pruned(big(noise(64, HIDDEN, seed=7), 0.9), sparsity=0.9, include=["w"])
    assert kinds(model)["w"] == "mask"


def test_n_of_m_is_recognised_and_kept_when_decided_again() -> None:
    model = pruned(network(), n_of_m="2:4")
    program = program_of(model, regrow_steps=2)
    assert {c.where: c.table().get("n_of_m") for c in program.constraints}["w1"] == "2:4"
    tuned = trained(model, steps=6, rate=0.3, regrow_steps=2)
    before, after = values(model, "w1") != 0, values(tuned, "w1") != 0
    assert (after.reshape(INPUTS // 4, 4, HIDDEN).sum(axis=1) == 2).all()
    assert (before != after).any()


def test_regrowth_keeps_the_number_of_survivors() -> None:
    model = pruned(network(), sparsity=0.7)
    tuned = trained(model, steps=8, rate=0.3, regrow_steps=2)
    changed = False
    for name in ("w1", "w2", "w3"):
        before, after = values(model, name) != 0, values(tuned, name) != 0
        assert before.sum() == after.sum()
        changed = changed or not np.array_equal(before, after)
    assert changed


def test_latent_weights_move_behind_zeros() -> None:
    program = program_of(pruned(network(), sparsity=0.7), regrow_steps=100)
    trainer = Trainer(program)
    held = next(c for c in program.constraints if c.where == "w1")
    assert isinstance(held, Masked)
    with open_session(network()) as session:
        samples = TrainingData.read(data(), session.inputs)
    samples = samples.with_labels_as(program.layout.labels)
    trainer.step(samples.batch(samples.batches(16, 0, 0)[0]), 0.1)
    latent = trainer.read()["w1/value"]
    assert (latent[~held.mask] != 0).mean() > 0.9


# ---------------- ties


def twins(weight: Array) -> Model:
    """Two layers whose weights are equal, written twice."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]>
        net (float[N, {INPUTS}] x) => (float[N, {CLASSES}] y) {{
            h = MatMul (x, one)  a = Tanh (h)  i = MatMul (a, other)  b = Tanh (i)
            y = MatMul (b, last)
        }}"""
    )
    weights = {"one": weight, "other": weight, "last": noise(INPUTS, CLASSES, seed=2)}
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    return Model.from_proto(proto)


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_equal_weights_stay_equal(sparsity: float) -> None:
    weight = noise(INPUTS, INPUTS, seed=1)
    weight[np.abs(weight) < np.quantile(np.abs(weight), sparsity)] = 0
    model = twins(weight)
    assert kinds(model)["one"] == ("mask" if sparsity else "tied")
    assert "other" not in kinds(model)
    tuned = trained(model)
    assert not np.array_equal(values(tuned, "one"), weight)
    assert np.array_equal(values(tuned, "one"), values(tuned, "other"))
    assert np.array_equal(values(tuned, "one") == 0, weight == 0)


# ---------------- shared values


def partition(array: Array) -> Array:
    """Which elements are equal, as the first place where each value stands."""
    _, first, inverse = np.unique(array, return_index=True, return_inverse=True)
    return first[inverse.reshape(array.shape)]


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_clusters_move_as_one(per: str, sparsity: float) -> None:
    model = pruned(network(), sparsity=sparsity)
    ClusterWeights(clusters=3, per=per, min_elements=1).apply(model, Context())
    assert kinds(model)["w1"] == "codebook"
    tuned = trained(model)
    for name in ("w1", "w2"):
        before, after = values(model, name), values(tuned, name)
        assert np.array_equal(partition(before), partition(after))
        assert np.array_equal(before == 0, after == 0)
        assert not np.signbit(after[after == 0]).any()
        assert (before[before != 0] != after[after != 0]).mean() > 0.9


def test_centroids_get_the_sum_of_their_elements_gradients() -> None:
    """One step of plain gradient descent: a centroid moves by the sum over its elements."""
    model = network()
    ClusterWeights(clusters=4, min_elements=1, include=["w1"]).apply(model, Context())
    plain = Update(optimizer="sgd", momentum=0.0)
    clustered = trained(model, steps=1, rate=0.1, update=plain)
    free = network(w1=values(model, "w1") + noise(INPUTS, HIDDEN, seed=5) * 1e-6)
    moved = values(trained(free, steps=1, rate=0.1, update=plain), "w1") - values(free, "w1")
    before, after = values(model, "w1"), values(clustered, "w1")
    for value in np.unique(before):
        expected = moved[before == value].sum()
        assert (after - before)[before == value][0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_elements_join_the_nearest_value_again() -> None:
    model = pruned(network(), sparsity=0.5)
    ClusterWeights(clusters=4, min_elements=1).apply(model, Context())
    tuned = trained(model, steps=10, rate=0.1, reassign_steps=2)
    before, after = values(model, "w1"), values(tuned, "w1")
    assert np.array_equal(before == 0, after == 0)
    assert np.unique(after).size <= np.unique(before).size
    assert not np.array_equal(partition(before), partition(after))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_reassignment_finds_the_nearest_value_of_the_same_table(
    seed: int, count: int, by_channel: bool
) -> None:
    rng = np.random.default_rng(seed)
    tables = np.repeat(np.arange(3 if by_channel else 1), count).astype(np.int32)
    centroids = rng.normal(size=tables.size).astype(np.float32)
    rows = rng.integers(0, count + 1, (3, 20))
    shift = np.arange(3)[:, None] * count if by_channel else 0
    assignments = np.where(rows == 0, 0, rows + shift).astype(np.int32)
    latent = rng.normal(size=(3, 20)).astype(np.float32)
    held = Codebook(
        (), (), 1, centroids, assignments, tables, 0 if by_channel else None, latent=True
    )
    arrays = {"centroids": centroids, "assignments": assignments, "value": latent}
    fresh = held.refreshed(arrays).get("assignments", assignments)
    assert np.array_equal(fresh == 0, assignments == 0)
    for place in np.argwhere(fresh != 0):
        chosen, old = fresh[tuple(place)] - 1, assignments[tuple(place)] - 1
        assert tables[chosen] == tables[old]
        mine = centroids[tables == tables[old]].astype(np.float64)
        distance = np.abs(mine - latent[tuple(place)])
        assert abs(centroids[chosen] - np.float64(latent[tuple(place)])) <= distance.min() + 1e-12
    assert held.refreshed(arrays | {"assignments": fresh}) == {}


# ---------------- grids


FORMATS = {
    "8 bits a channel": QuantizeWeights(bits=8, include=["w"]),
    "4 bits a channel": QuantizeWeights(bits=4, include=["w"]),
    "4 bits a block": QuantizeWeights(bits=4, per="block", block_size=8, include=["w"]),
    "asymmetric": QuantizeWeights(bits=4, scheme="asymmetric", include=["w"]),
    "ternary": QuantizeWeights(bits=2, include=["w"]),
    "binary": QuantizeWeights(bits=1, include=["w"]),
    "one scale": QuantizeWeights(bits=4, per="tensor", include=["w"]),
}


@pytest.mark.parametrize("pass_", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("sparse", [False, True])
def test_weights_stay_on_their_grids(pass_: QuantizeWeights, sparse: bool) -> None:
    model = big(noise(64, HIDDEN, seed=7), 0.8 * sparse)
    pass_.apply(model, Context())
    assert kinds(model)["w"] == "grid"
    tuned = trained(model, steps=6)
    before, after = values(model, "w"), values(tuned, "w")
    assert not np.array_equal(before, after)
    again = tuned.copy()
    result = pass_.apply(again, Context())
    assert not result.changed, "a weight on the grid is left alone by its own pass"
    if sparse:
        assert (after[before == 0] == 0).all()
    assert not np.signbit(after[after == 0]).any()


def big(weight: Array, sparsity: float) -> Model:
    """One layer of a weight that is large enough to be seen as quantized."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]>
        net (float[N, {INPUTS}] x) => (float[N, {CLASSES}] y) {{
            h = MatMul (x, first)  a = Relu (h)  m = MatMul (a, w)  y = MatMul (m, last)
        }}"""
    )
    weights = {
        "first": noise(INPUTS, weight.shape[0], seed=1),
        "w": weight,
        "last": noise(weight.shape[1], CLASSES, seed=2),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    model = Model.from_proto(proto)
    if sparsity:
        pruned(model, sparsity=sparsity, include=["w"])
    return model
