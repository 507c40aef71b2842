"""cluster-weights: how many values are left, which weights pay, and what it says."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Context, Decision, PassResult
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.runtime import open_session

Array = npt.NDArray[Any]


def noise(*shape: int, seed: int = 0, scale: float = 0.1, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(dtype)


def network(conv: Array, fc: Array, table: Array | None = None) -> Model:
    """A Conv with a bias, a MatMul of its pooled output, and a table of embeddings."""
    kind = {"float32": "float", "float16": "float16"}[conv.dtype.name]
    table = noise(50, fc.shape[1], dtype=conv.dtype) if table is None else table
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 17]>
        g ({kind}[N, {conv.shape[1]}, 8, 8] x, int64[N] ids) => ({kind}[N, {fc.shape[1]}] y) {{
            h = Conv(x, conv, bias)  p = GlobalAveragePool(h)  f = Flatten(p)
            z = MatMul(f, fc)  e = Gather(table, ids)  y = Add(z, e)
        }}"""
    )
    arrays = {"conv": conv, "fc": fc, "table": table, "bias": noise(600, dtype=conv.dtype)}
    arrays["bias"] = arrays["bias"][: conv.shape[0]]
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def usual(dtype: Any = np.float32) -> Model:
    return network(noise(32, 8, 3, 3, dtype=dtype), noise(32, 60, dtype=dtype))


def cluster(model: Model, seed: int = 0, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    result = ClusterWeights(**options).apply(model, Context(seed=seed))
    return result, {decision.where: decision for decision in result.decisions}


def values(model: Model, name: str) -> Array:
    return next(weight.values for weight in model.weights() if weight.name == name)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 16), ({"bits": 1}, 2), ({"bits": 3}, 8), ({"clusters": 5}, 5)],
)
def test_so_many_values_are_left(options: dict[str, Any], count: int) -> None:
    model = usual()
    result, decisions = cluster(model, **options)
    assert result.changed
    assert [decision.where for decision in result.decisions] == [w.where for w in model.weights()]
    for name in ("conv", "fc", "table"):
        assert np.unique(values(model, name)).size == count
        assert decisions[name].figures["distinct"] == count
        assert decisions[name].figures["clusters"] == count
        assert decisions[name].reason == f"its elements share {count} values"
    assert "a bias" in decisions["bias"].reason
    feed = {"x": noise(2, 8, 8, 8), "ids": np.arange(2)}
    open_session(model).run(feed)


def test_more_bits_err_less() -> None:
    errors = []
    for bits in range(1, 7):
        _, decisions = cluster(usual(), bits=bits)
        errors.append(float(decisions["conv"].figures["sqnr_db"]))
    assert errors == sorted(errors)
    assert errors[3] > 19.0


def test_channels_have_their_own_values() -> None:
    scales = np.geomspace(0.001, 10, 8, dtype=np.float32)
    conv = noise(8, 64, 3, 3) * scales[:, None, None, None]
    one, own = (network(conv, noise(8, 600)) for _ in range(2))
    _, per_tensor = cluster(one, bits=3)
    _, per_channel = cluster(own, bits=3, per="channel")
    assert per_channel["conv"].reason == "each channel along axis 0 shares 8 values"
    assert [np.unique(channel).size for channel in values(own, "conv")] == [8] * 8
    assert per_tensor["conv"].figures["sqnr_db"] != per_channel["conv"].figures["sqnr_db"]
    smallest = np.abs(values(own, "conv")[0] - conv[0]).max()
    assert smallest < 0.5 * np.abs(conv[0]).max()


def test_tables_that_take_more_than_they_save_are_not_made() -> None:
    _, decisions = cluster(usual(), bits=8, per="channel", min_elements=1)
    assert not decisions["conv"].taken
    expected = "32 tables of 256 values and 2304 indices of 8 bits take no less than it does"
    assert decisions["conv"].reason == expected


def test_a_codebook_larger_than_the_weight_is_not_made() -> None:
    model = network(noise(4, 2, 3, 3), noise(4, 20))
    _, decisions = cluster(model, bits=8, min_elements=1)
    assert not decisions["conv"].taken
    assert "the table and 72 indices of 8 bits take no less" in decisions["conv"].reason


@pytest.mark.parametrize("options", [{}, {"method": "gmm"}, {"sqnr_db": 15}, {"per": "channel"}])
def test_zeros_stay_zeros(options: dict[str, Any]) -> None:
    conv = noise(32, 8, 3, 3)
    conv[np.abs(conv) < 0.1] = 0
    model = network(conv, noise(32, 60))
    cluster(model, **({"bits": 3} if "sqnr_db" not in options else {}), **options)
    clustered = values(model, "conv")
    assert np.array_equal(clustered == 0, conv == 0)
    assert not np.signbit(clustered[clustered == 0]).any()


def test_a_mixture_errs_more_than_the_least_squares() -> None:
    best, mixed = usual(), usual()
    _, least = cluster(best)
    _, decisions = cluster(mixed, method="gmm")
    assert np.unique(values(mixed, "conv")).size == 16
    assert float(decisions["conv"].figures["sqnr_db"]) < float(least["conv"].figures["sqnr_db"])


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("target", [6.0, 20.0])
def test_the_fewest_bits_that_hold_the_ratio(target: float, per: str) -> None:
    conv = noise(8, 64, 3, 3)
    model = network(conv, noise(8, 600))
    _, decisions = cluster(model, sqnr_db=target, per=per)
    figures = decisions["conv"].figures
    assert float(figures["sqnr_db"]) >= target
    less = network(conv, noise(8, 600))
    bits = int(figures["bits"])
    _, one_less = cluster(less, bits=max(1, bits - 1), per=per)
    assert bits == 1 or float(one_less["conv"].figures["sqnr_db"]) < target


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("part", [0.3, 0.06, 0.02])
def test_the_fewest_bits_that_hold_the_largest_error(part: float, per: str) -> None:
    scales = np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None, None, None]
    conv = noise(8, 64, 3, 3) * scales
    model = network(conv, noise(8, 600))
    _, decisions = cluster(model, max_error=part, per=per)
    assert decisions["conv"].taken
    moved = np.abs(values(model, "conv") - conv).reshape(8, -1).max(axis=1)
    largest = np.abs(conv).reshape(8, -1).max(axis=1)
    assert (moved <= part * (largest if per == "channel" else largest.max())).all()
    # Even intervals need 1 / part values: these are at most as many, to a power of two.
    assert int(decisions["conv"].figures["bits"]) <= np.ceil(np.log2(1 / part))


def test_a_target_out_of_reach_is_said() -> None:
    model = network(noise(32, 64, 3, 3), noise(32, 600))
    result, decisions = cluster(model, sqnr_db=90, exclude=("table",))
    assert not result.changed
    assert decisions["conv"].reason == "indices of 8 bits do not hold sqnr_db=90.0"
    _, decisions = cluster(model, max_error=1e-6, exclude=("table",))
    assert decisions["conv"].reason == "indices of 8 bits do not hold max_error=1e-06"


def test_a_target_leaves_weights_alone_that_would_need_too_large_tables() -> None:
    model = network(noise(32, 8, 3, 3), noise(32, 60))
    _, decisions = cluster(model, sqnr_db=40, per="channel")
    assert "take no less than it does" in decisions["conv"].reason
    assert np.unique(values(model, "conv")).size == 32 * 72


@pytest.mark.parametrize("target", [{"sqnr_db": 18}, {"max_error": 0.05}])
def test_a_second_run_towards_a_target_changes_nothing(target: dict[str, Any]) -> None:
    model = usual()
    first, _ = cluster(model, **target)
    second, decisions = cluster(model, **target)
    assert first.changed
    assert not second.changed
    assert "values already" in decisions["conv"].reason


def test_blocks_have_their_own_values() -> None:
    conv = noise(8, 64, 3, 3) * np.geomspace(0.01, 1, 64, dtype=np.float32)[:, None, None]
    model = network(conv, noise(8, 600))
    _, decisions = cluster(model, bits=2, per="block", block_size=64)
    assert decisions["conv"].reason == (
        "each block of 64 elements of a channel along axis 0 shares 4 values"
    )
    blocks = values(model, "conv").reshape(-1, 64)
    assert max(np.unique(block).size for block in blocks) == 4


@settings(max_examples=12)
@given(
    st.sampled_from(["optimal", "linear", "density", "kmeans++"]),
    st.sampled_from(["tensor", "channel", "block"]),
    st.integers(2, 20),
    st.integers(0, 100),
)
def test_a_second_run_changes_nothing(init: str, per: str, clusters: int, seed: int) -> None:
    model = network(noise(4, 40, 3, 3, seed=seed), noise(4, 300, seed=seed))
    options = {"init": init, "per": per, "clusters": clusters}
    first, _ = cluster(model, **options)
    saved = model.to_proto().SerializeToString(deterministic=True)
    second, decisions = cluster(model, **options)
    assert first.changed
    assert not second.changed
    assert "already" in decisions["conv"].reason
    assert model.to_proto().SerializeToString(deterministic=True) == saved


def test_a_rate_weight_makes_codes_shorter_and_counts_all_errors_alike() -> None:
    samples = Samples.from_feeds([{"x": noise(1, 8, 8, 8), "ids": np.zeros(1, np.int64)}])
    plain, short, again = usual(), usual(), usual()
    _, before = cluster(plain, bits=5)
    _, after = cluster(short, bits=5, rate_weight=0.01)
    result = ClusterWeights(bits=5, rate_weight=0.01).apply(again, Context(samples=samples))
    shares = np.unique(values(plain, "conv"), return_counts=True)[1] / values(plain, "conv").size
    entropy = -np.sum(shares * np.log2(shares))
    assert after["conv"].figures["entropy_bits"] < entropy - 0.4
    assert after["conv"].figures["sqnr_db"] < before["conv"].figures["sqnr_db"]
    assert "a bit of code counts 0.01 of the mean square" in after["conv"].reason
    assert tuple(after.values()) == result.decisions


def test_one_seed_gives_one_result() -> None:
    first, again, other = usual(), usual(), usual()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        cluster(model, seed=seed, init="kmeans++", bits=6)
    assert np.array_equal(values(first, "conv"), values(again, "conv"))
    assert not np.array_equal(values(first, "conv"), values(other, "conv"))


def test_half_precision_stays() -> None:
    model = usual(np.float16)
    cluster(model)
    assert values(model, "conv").dtype == np.float16
    assert np.unique(values(model, "conv")).size == 16


@pytest.mark.parametrize("number", [0.0, 0.25])
def test_one_value_is_few_enough(number: float) -> None:
    model = network(np.full((32, 8, 3, 3), number, np.float32), noise(32, 60))
    _, decisions = cluster(model)
    assert decisions["conv"].reason == "has no more than 16 values already"
    assert decisions["conv"].figures["distinct"] == 1


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_left_alone(bad: float) -> None:
    conv = noise(32, 8, 3, 3)
    conv[1, 2, 0, 0] = bad
    model = network(conv, noise(32, 60))
    _, decisions = cluster(model)
    assert decisions["conv"].reason.startswith(f"conv[1, 2, 0, 0] is {bad}")
    assert decisions["fc"].taken


def test_a_shared_weight_is_clustered_once() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 32] x) => (float[N, 32] y) { h = MatMul(x, w)  y = MatMul(h, w) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(32, 32), "w"))
    result, decisions = cluster(Model.from_proto(proto))
    assert len(result.decisions) == 1
    assert decisions["w"].taken


def test_uses_that_agree_on_no_channel_share_one_set() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 32] x) => (float[N, 32] y) {
            h = MatMul(x, w)  t = Transpose<perm = [1, 0]>(w)  y = MatMul(h, t)
        }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(32, 32), "w"))
    _, decisions = cluster(Model.from_proto(proto), per="channel")
    assert "its uses agree on no channel axis" in decisions["w"].reason


def scaled_channels() -> Array:
    return noise(32, 8, 3, 3) * np.geomspace(0.01, 10, 32, dtype=np.float32)[:, None, None, None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": "channel"}, "one table of 16 int8 values, and each channel along axis 0 has"),
        (
            {"scales": "channel", "group": 2, "bits": 3},
            "one table of 64 int8 groups of 2 values, and each channel along axis 0 has a scale",
        ),
        (
            {"scales": "block", "block_size": 24},
            "one table of 16 int8 values, and each block of 24 elements of a channel along axis 0",
        ),
    ],
)
def test_channels_share_a_table_and_have_scales(options: dict[str, Any], words: str) -> None:
    one, scaled = (network(scaled_channels(), noise(32, 600)) for _ in range(2))
    _, plain = cluster(one, bits=options.get("bits", 4))
    _, decisions = cluster(scaled, **options)
    assert decisions["conv"].reason.startswith(words)
    gained = float(decisions["conv"].figures["sqnr_db"]) - float(plain["conv"].figures["sqnr_db"])
    assert gained > 1
    again, decisions = cluster(scaled, **options)
    assert not again.changed
    assert "already" in decisions["conv"].reason


@pytest.mark.parametrize("scales", ["none", "channel"])
@pytest.mark.parametrize("group", [2, 4, 8])
def test_groups_share_an_index(group: int, scales: str) -> None:
    model = network(noise(32, 64, 3, 3), noise(32, 640))
    _, decisions = cluster(model, group=group, bits=1, scales=scales)
    assert decisions["conv"].figures["bits"] == 1
    assert decisions["conv"].figures["clusters"] <= 1 << group
    again, decisions = cluster(model, group=group, bits=1, scales=scales)
    assert not again.changed
    assert f"groups of {group} values already" in decisions["conv"].reason


def test_groups_without_a_size_have_indices_of_a_byte() -> None:
    model = network(noise(32, 64, 3, 3), noise(32, 640))
    _, decisions = cluster(model, group=4)
    assert decisions["conv"].figures["clusters"] == 256
    assert decisions["conv"].reason == "its elements share 256 groups of 4 values"


def test_errors_count_by_the_inputs_where_samples_are_given() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 64] x) => (float[N, 32] y) { y = MatMul(x, w) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(noise(64, 32), "w"))
    # Of 64 inputs 8 matter: 256 weights, for which alone 8 values fit better.
    feed = {"x": noise(200, 64) * np.where(np.arange(64) % 8, 0.1, 10).astype(np.float32)}
    exact, errors = open_session(proto).run(feed)["y"], {}
    for weighting in ("inputs", "none"):
        model = Model.from_proto(proto)
        context = Context(samples=Samples.from_feeds([feed]))
        (decision,) = ClusterWeights(bits=3, weighting=weighting).apply(model, context).decisions
        assert ("output_sqnr_db" in decision.figures) == (weighting == "inputs")
        assert decision.reason.endswith("counted by its inputs") == (weighting == "inputs")
        errors[weighting] = np.sum((open_session(model).run(feed)["y"] - exact) ** 2)
    assert errors["inputs"] < 0.9 * errors["none"]


def test_a_group_that_does_not_divide() -> None:
    model = network(noise(25, 7, 3, 3), noise(25, 640))
    _, decisions = cluster(model, group=2, bits=2, scales="channel")
    assert decisions["conv"].reason == "group=2 does not divide the 63 elements of a channel"
    _, decisions = cluster(model, group=2, bits=2)
    assert decisions["conv"].reason == "group=2 does not divide the 1575 elements of the weight"
    even = network(noise(26, 7, 3, 3), noise(26, 640))
    _, decisions = cluster(even, group=2, bits=2)
    # Across channels: the weight's elements can be grouped, its channels' cannot.
    assert decisions["conv"].taken


def test_scales_of_half_precision() -> None:
    model = network(scaled_channels().astype(np.float16), noise(32, 600, dtype=np.float16))
    _, decisions = cluster(model, scales="channel")
    assert decisions["conv"].taken
    assert values(model, "conv").dtype == np.float16
    assert float(decisions["conv"].figures["sqnr_db"]) > 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "greater than or equal to 1"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"clusters": 1}, "greater than or equal to 2"),
        ({"clusters": 257}, "less than or equal to 256"),
        ({"bits": 4, "clusters": 16}, "exclude each other"),
        ({"per": "row"}, "'tensor', 'channel' or 'block'"),
        ({"init": "random"}, "'optimal', 'linear', 'density' or 'kmeans\\+\\+'"),
        ({"sqnr_db": 20, "bits": 3}, "bits and sqnr_db exclude each other"),
        ({"max_error": 1.5}, "less than 1"),
        ({"max_error": 0.1, "method": "gmm"}, "max_error has a k-means of its own"),
        ({"max_error": 0.1, "init": "linear"}, "max_error has a k-means of its own"),
        ({"group": 3}, "1, 2, 4 or 8"),
        ({"group": 4, "bits": 3}, "groups of 4 needs indices of more than 8 bits"),
        ({"group": 2, "per": "channel"}, "per=channel gives each its own table"),
        ({"scales": "block", "per": "block"}, "per=block gives each its own table"),
        ({"group": 2, "method": "gmm"}, "method=gmm is for single values without scales"),
        ({"group": 2, "init": "linear"}, "init is for single values"),
        ({"scales": "channel", "max_error": 0.1}, "max_error is for single values"),
        ({"rate_weight": -0.1}, "greater than or equal to 0"),
        ({"rate_weight": 0.1, "scales": "channel"}, "rate_weight is for k-means of single values"),
        ({"rate_weight": 0.1, "method": "gmm"}, "rate_weight is for k-means of single values"),
        ({"rate_weight": 0.1, "max_error": 0.1}, "leave rate_weight out"),
        ({"block_size": 64}, "block_size is for per=block or scales=block"),
        ({"bitz": 4}, "bitz"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        ClusterWeights(**options)
