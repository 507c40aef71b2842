"""Whole runs: deterministic, resumable, and stopped when they go wrong."""

import numpy as np
import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import TrainingError, UsageError
from onnxslim_passes.training.options import Course, Objective, Parameters, Update
from onnxslim_passes.training.tuning import Listener, prepare, run
from tests.training.nets import ENDING, mlp, samples

COURSE = Course(epochs=4, batch_size=8, learning_rate=0.02, validation_split=0.2)


def session(course=COURSE, text=None, **options):
    return prepare(
        mlp(text) if text else mlp(),
        options.pop("samples", samples()),
        objective=options.pop("objective", Objective()),
        update=options.pop("update", Update()),
        parameters=Parameters(),
        course=course,
        **options,
    )


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def test_training_learns_and_keeps_the_best():
    course = Course(epochs=12, batch_size=8, learning_rate=0.02, validation_split=0.3)
    tuned = run(session(course, samples=samples(120)))
    assert tuned.epochs[tuned.best].validation_metric > tuned.epochs[0].validation_metric + 20
    best = max(epoch.validation_metric for epoch in tuned.epochs)
    assert tuned.epochs[tuned.best].validation_metric == best


def test_one_seed_gives_the_same_bits_and_another_does_not():
    one, two = run(session(seed=1)), run(session(seed=1))
    assert same(one.state, two.state)
    assert one.epochs == two.epochs
    assert not same(one.state, run(session(seed=2)).state)


def test_dropout_is_a_part_of_that():
    text = ENDING["dropout"]
    ratio = {"ratio": np.float32(0.5)}

    def tuned(**options):
        model = mlp(text.replace("float[3] b2", "float[3] b2, float ratio"), **ratio)
        return run(
            prepare(
                model,
                samples(),
                objective=Objective(),
                update=Update(),
                parameters=Parameters(**options),
                course=COURSE,
            )
        )

    assert same(tuned().state, tuned().state)
    assert not same(tuned().state, tuned(dropout=False).state)


class KilledError(Exception):
    """The process is gone."""


@pytest.mark.parametrize("at", [3, 6, 13])
def test_a_run_that_was_cut_off_ends_in_the_same_bits(tmp_path, at):
    """The file on disk is all that a killed process leaves; see also the command's test."""
    whole = run(session())
    path = tmp_path / "run.safetensors"
    done = []

    def kill(loss):
        done.append(loss)
        if len(done) == at:
            raise KilledError

    with pytest.raises(KilledError):
        run(session(), checkpoint=path, checkpoint_steps=2, listener=Listener(on_step=kill))
    tuned = run(session(), checkpoint=path, checkpoint_steps=2)
    assert tuned.resumed == (at - 1) // 2 * 2 or tuned.resumed == (at - 1) // 6 * 6
    assert same(tuned.state, whole.state)
    assert tuned.epochs == whole.epochs


def test_each_epoch_trains_on_its_own_samples(tmp_path):
    """Weights hardly move: the loss is that of the epoch's labels, validation's stays."""
    path = tmp_path / "turning.py"
    path.write_text(
        "import numpy as np\n"
        "def feeds(epoch):\n"
        "    x = np.random.default_rng(1).standard_normal((40, 4)).astype(np.float32)\n"
        "    yield {'x': x, 'labels': np.full(40, epoch % 3)}\n"
    )
    course = Course(epochs=4, batch_size=8, learning_rate=1e-9, validation_split=0.2)
    tuned = run(session(course, samples=Samples.open(f"{path}:feeds")))
    one, two, three, four = (epoch.loss for epoch in tuned.epochs[1:])
    assert four == pytest.approx(one)
    assert min(abs(one - two), abs(two - three), abs(three - one)) > 0.1
    validation = [epoch.validation_loss for epoch in tuned.epochs]
    assert validation == pytest.approx([validation[0]] * 5)


def test_a_checkpoint_of_another_run_is_not_taken_up(tmp_path):
    path = tmp_path / "run.safetensors"
    run(session(), checkpoint=path)
    with pytest.raises(UsageError, match="checkpoint of another run"):
        run(session(Course(epochs=4, batch_size=8, learning_rate=0.03)), checkpoint=path)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    wild = Course(epochs=4, batch_size=8, learning_rate=1e30, schedule="constant", warmup=0.3)
    update = Update(optimizer="sgd", momentum=0)
    with pytest.raises(TrainingError, match=r"became nan at step [12] \(epoch 1\)"):
        run(session(wild, update=update), checkpoint=path, checkpoint_steps=1)


def test_patience_ends_a_run_that_gets_no_better():
    course = Course(epochs=30, batch_size=8, learning_rate=1e-12, patience=2)
    tuned = run(session(course))
    assert tuned.epochs[-1].number - tuned.best == 2


def test_a_start_that_nothing_beats_is_kept():
    course = Course(epochs=2, batch_size=8, learning_rate=5.0, schedule="constant")
    teacher = mlp()
    tuned = run(session(course, teacher=teacher, objective=Objective(loss="distill")))
    assert tuned.best == 0
    before = {c.name: c.values for c in teacher.constants()}
    for name, array in before.items():
        np.testing.assert_array_equal(tuned.state[f"{name}/value"], array)


def test_without_validation_the_last_epoch_is_kept():
    course = Course(epochs=3, batch_size=8, validation_split=0)
    tuned = run(session(course))
    assert tuned.best == 3
    assert tuned.epochs[0].validation_loss is None


def test_auto_takes_the_loss_that_the_labels_ask_for():
    assert loss_of(session()) == "cross-entropy"
    assert loss_of(session(samples=samples(labelled=False), teacher=mlp(seed=2))) == "distill"
    with pytest.raises(UsageError, match="needs a teacher"):
        session(samples=samples(labelled=False))


def loss_of(prepared):
    return prepared.program.layout.options["objective"]["loss"]
