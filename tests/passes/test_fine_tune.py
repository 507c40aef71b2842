"""The pass in a pipeline: what pruning costs comes back."""

import numpy as np
import pytest

from onnxslim_passes import Context, FineTune, Pipeline, PruneMagnitude, Samples
from onnxslim_passes.errors import UnsupportedModelError, UsageError
from onnxslim_passes.model import Model
from onnxslim_passes.runtime import open_session
from tests.training.nets import mlp, points, samples, with_weights

QUICK = {"epochs": 10, "learning_rate": 0.02, "batch_size": 8}


def error(model, reference, x):
    with open_session(model) as one, open_session(reference) as other:
        return float(np.mean((one.run({"x": x})["y"] - other.run({"x": x})["y"]) ** 2))


def test_it_recovers_what_pruning_cost_without_labels():
    model, x = mlp(), points(200, seed=9)[0]
    prune = PruneMagnitude(sparsity=0.4, min_elements=1)
    unlabelled = samples(200, labelled=False)
    pruned = Pipeline([prune], store=False).run(model, measure=False).model
    tuned = Pipeline([prune, FineTune(**QUICK)], store=False).run(
        model, training=unlabelled, measure=False
    )
    assert error(tuned.model, model, x) < error(pruned, model, x) / 2
    record = tuned.report.passes[1]
    assert record.changed
    assert {decision.where for decision in record.decisions} == {"w1", "b1", "w2", "b2"}


def test_calibration_samples_do_where_no_others_are_given():
    context = Context(samples=samples(40), reference=mlp(seed=3))
    assert FineTune(epochs=1).apply(mlp(), context).changed


def test_labels_alone_do_without_the_teacher():
    result = FineTune(teacher=False, epochs=1).apply(mlp(), Context(training=samples(40)))
    assert result.changed


def test_an_untouched_model_has_nothing_to_learn():
    model = mlp()
    context = Context(samples=samples(40, labelled=False), reference=mlp())
    result = FineTune().apply(model, context)
    assert not result.changed
    assert {d.reason for d in result.decisions} == {
        "left as it is: the outputs are those of the original already"
    }


def test_samples_are_needed_before_any_work():
    pipeline = Pipeline([PruneMagnitude(), FineTune()])
    with pytest.raises(UsageError, match="fine-tune needs samples to train on"):
        pipeline.run(mlp())
    with open_session(mlp()) as session:
        made_up = Samples.runnable_random(session)
    with pytest.raises(UsageError, match="fine-tune needs samples to train on"):
        pipeline.run(mlp(), samples=made_up)


def test_first_in_a_recipe_it_trains_the_original_by_labels():
    model, (x, labels) = mlp(), points(200, seed=9)
    passes = [FineTune(teacher=False, **QUICK), PruneMagnitude(sparsity=0.2, min_elements=1)]
    result = Pipeline(passes, store=False).run(model, training=samples(200), measure=False)

    def share_of_right(one):
        with open_session(one) as session:
            return float(np.mean(session.run({"x": x})["y"].argmax(1) == labels))

    assert [record.changed for record in result.report.passes] == [True, True]
    assert share_of_right(result.model) > share_of_right(model) + 0.2


def test_a_model_of_integers_is_refused():
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    g (float[N, 32] x) => (int32[N, 32] y) <uint8[32, 32] w>
    { q, s, z = DynamicQuantizeLinear (x)
      y = MatMulInteger (q, w) }
    """
    model = Model.from_proto(with_weights(text, w=np.arange(1024).reshape(32, 32) % 256))
    with pytest.raises(UnsupportedModelError, match="its weights are integers"):
        FineTune().requires(model)
