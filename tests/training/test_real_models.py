"""Networks as they came from their frameworks."""

import itertools
from pathlib import Path

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import load
from onnxslim_passes.passes.base import Context
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.options import Course, Objective, Parameters, Update
from onnxslim_passes.training.tuning import prepare, run


def test_one_step_of_the_lstm_of_silero_lowers_the_loss(shared_models: Path) -> None:
    """Half of the convolutions' weights are gone; the LSTM alone, inside an If, makes up for it."""
    model = load(shared_models / "models" / "silero_vad_16k_op15.onnx")
    source = Samples.open(f"{shared_models / 'tasks.py'}:calibration_silero_vad_16k_op15")
    feed = next(itertools.islice(source.feeds(open_session(model).inputs), 31, None))
    pruned = model.copy()
    PruneMagnitude(sparsity=0.5).apply(pruned, Context())
    session = prepare(
        pruned,
        Samples.from_feeds([feed]),
        validation=Samples.from_feeds([feed]),
        objective=Objective(loss="distill"),
        update=Update(),
        parameters=Parameters(include=("*rnn*",)),
        course=Course(epochs=1, learning_rate=1e-4, schedule="constant"),
        teacher=model,
    )
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    moved = {constraint.where for constraint in session.program.constraints}
    assert moved == {f"model.decoder.rnn.{part}" for part in parts}
    before, after = run(session).epochs
    assert after.validation_loss is not None
    assert before.validation_loss is not None
    assert after.validation_loss < 0.9 * before.validation_loss
