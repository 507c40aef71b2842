"""Every pass of the list goes through the common battery, with its defaults and some options."""

from typing import Any

import pytest

from onnxslim_passes.passes import PASSES
from tests.battery import check_class, check_idle, check_on_model, check_recipe
from tests.zoo_small import IDLE, SMALL

# Options with which a pass does more, or other things, on small networks than by default.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "fold-constants": [{"max_growth": 0, "unpack": False}, {"max_growth": 1 << 20}],
    "dedupe-weights": [{"min_bytes": 1}],
    "prune-magnitude": [
        {"sparsity": 0.8, "min_elements": 1, "embeddings": True},
        {"scope": "global", "sparsity": 0.6, "min_elements": 1},
        {"threshold": 1.0, "min_elements": 1},
        {"n_of_m": "2:4", "min_elements": 1},
        {"block": (4, 2), "sparsity": 0.4, "min_elements": 1, "embeddings": True},
    ],
    "cluster-weights": [
        {"sqnr_db": 15, "method": "gmm", "per": "channel", "min_elements": 1},
        {"max_error": 0.1, "per": "block", "block_size": 64},
        {"scales": "channel", "group": 2, "bits": 2, "min_elements": 1},
    ],
    "quantize-static": [
        {"placement": "everywhere"},
        {"placement": "everywhere", "per_channel": False, "activations": "int8"},
        {"placement": "everywhere", "activations": "int16"},
    ],
    "quantize-dynamic": [{"per_channel": False}, {"reduce_range": True, "embeddings": False}],
    "quantize-weights": [
        {"bits": 4, "per": "block", "scheme": "asymmetric", "min_elements": 1},
        {"bits": 1, "per": "tensor", "scales": "max"},
        {"bits": 2},
    ],
    "quantize-to-rate": [
        {"rate": 2.0, "min_elements": 1},
        {"allocation": "equal", "max_inputs": 8, "min_elements": 1},
    ],
    "convert-float": [{"weights_only": False}, {"type": "float8_e4m3fn"}, {"type": "bfloat16"}],
    "smooth-activations": [
        {"min_gain_db": 0.01, "insert_below_db": 200.0},
        {"alpha": 0.5, "min_gain_db": 0.01},
    ],
    "store-weights": [{"encodings": ["sparse"]}, {"min_elements": 2}],
}

CASES = [
    pytest.param(name, options, id=f"{name}-{number}" if number else name)
    for name in PASSES
    for number, options in enumerate([{}, *VARIANTS.get(name, [])])
]


@pytest.mark.parametrize("name", PASSES)
def test_class(name: str) -> None:
    check_class(PASSES[name])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_recipe(name: str, options: dict[str, Any]) -> None:
    check_recipe(PASSES[name](**options))


# Passes that train take seconds on a network: a few of different kinds.
TRAINED = ("conv_bn_opset13", "transformer", "weights_shared_and_equal", "if_weights")


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_on_small_network(name: str, options: dict[str, Any], network: str) -> None:
    if PASSES[name].needs_training and network not in TRAINED:
        pytest.skip("trained on a few networks only")
    check_on_model(PASSES[name](**options), SMALL[network]())


@pytest.mark.parametrize("network", IDLE)
@pytest.mark.parametrize("name", PASSES)
def test_idle(name: str, network: str) -> None:
    check_idle(PASSES[name](), IDLE[network]())


def test_variants_are_of_passes() -> None:
    assert VARIANTS.keys() <= PASSES.keys()
