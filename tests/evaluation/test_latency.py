"""Latency: two models in turn."""

import numpy as np
import onnx.parser
import pytest

from onnxslim_passes.evaluation import compare_latency
from onnxslim_passes.runtime import Session, open_session


def chain(length: int) -> Session:
    nodes = "".join(f"t{i + 1} = Exp(t{i}) " for i in range(length))
    return open_session(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 18]>'
            f"g (float[N] t0) => (float[N] t{length}) {{ {nodes} }}"
        )
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_the_longer_chain_is_slower(threads: int) -> None:
    feed = {"t0": np.zeros(100_000, np.float32)}
    found = compare_latency(chain(20), chain(2), feed, seconds=0.05, threads=threads)
    assert found.runs >= 5
    assert found.threads == threads
    assert found.candidate_s > 0
    # Ten times the work; a factor of two is left to the machine's moods.
    assert found.speedup > 2
    assert found.speedup == pytest.approx(found.reference_s / found.candidate_s)
