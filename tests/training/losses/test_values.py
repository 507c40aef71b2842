"""Values and gradients of every loss against PyTorch's."""

import numpy as np
import pytest

from onnxslim_passes.model import Model
from onnxslim_passes.runtime import open_session
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import build
from tests.training.nets import ENDING, MLP, mlp, points, with_weights


def torch_scores(torch, model, x):
    values = {c.name: torch.tensor(c.values.copy()) for c in model.constants()}
    w1 = values["w1"].requires_grad_()
    hidden = torch.relu(torch.tensor(x) @ w1 + values["b1"])
    return w1, hidden @ values["w2"] + values["b2"]


def numbers(shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shares(shape, seed=3):
    raw = np.exp(numbers(shape, seed))
    return (raw / raw.sum(-1, keepdims=True)).astype(np.float32)


X, LABELS = points(12)
NUMBERS, SHARES = numbers((12, 3)), shares((12, 3))
BITS = (NUMBERS > 0).astype(np.float32)


def expected_loss(torch, name, logits):
    f = torch.nn.functional
    y, target = torch.tensor(LABELS), torch.tensor(NUMBERS)
    return {
        "cross-entropy": lambda: f.cross_entropy(logits, y),
        "behind softmax": lambda: f.cross_entropy(logits, y),
        "smoothed": lambda: f.cross_entropy(logits, y, label_smoothing=0.1),
        "soft": lambda: f.cross_entropy(logits, torch.tensor(SHARES)),
        "mse": lambda: f.mse_loss(logits, target),
        "l1": lambda: f.l1_loss(logits, target),
        "cosine": lambda: (1 - f.cosine_similarity(logits, target, dim=-1)).mean(),
        "bce": lambda: f.binary_cross_entropy_with_logits(logits, torch.tensor(BITS)),
        "bce behind sigmoid": lambda: f.binary_cross_entropy_with_logits(
            logits, torch.tensor(BITS)
        ),
    }[name]()


CASES = {
    "cross-entropy": (MLP, Objective(loss="cross-entropy"), LABELS),
    "behind softmax": (ENDING["softmax"], Objective(loss="cross-entropy"), LABELS),
    "smoothed": (MLP, Objective(loss="cross-entropy", label_smoothing=0.1), LABELS),
    "soft": (MLP, Objective(loss="cross-entropy", soft_labels=True), SHARES),
    "mse": (MLP, Objective(loss="mse"), NUMBERS),
    "l1": (MLP, Objective(loss="l1"), NUMBERS),
    "cosine": (MLP, Objective(loss="cosine"), NUMBERS),
    "bce": (MLP, Objective(loss="bce"), BITS),
    "bce behind sigmoid": (ENDING["sigmoid"], Objective(loss="bce"), BITS),
}


def measured(model, objective, labels, *, teacher=None, x=X):
    """Loss, metric and the gradient of w1."""
    program = build(
        model,
        objective=objective,
        update=Update(),
        parameters=Parameters(include=("w1",)),
        teacher=teacher,
        with_gradients=True,
    )
    feed = {"x": x, **program.state, "step": np.array(0)}
    if labels is not None:
        feed["labels"] = labels
    with open_session(program.gradients) as session:
        names = {spec.name for spec in session.inputs}
        found = session.run({name: a for name, a in feed.items() if name in names})
    return float(found["loss"]), float(found["metric"]), found["gradient/w1/value"]


@pytest.mark.parametrize("name", CASES)
def test_label_losses_agree_with_torch(name):
    torch = pytest.importorskip("torch")
    text, objective, labels = CASES[name]
    w1, logits = torch_scores(torch, mlp(), X)
    loss = expected_loss(torch, name, logits)
    loss.backward()
    value, _, gradient = measured(mlp(text), objective, labels)
    assert value == pytest.approx(loss.item(), rel=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(gradient, w1.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_the_metric_of_classes_is_their_share():
    torch = pytest.importorskip("torch")
    _, logits = torch_scores(torch, mlp(), X)
    right = (logits.argmax(1).numpy() == LABELS).mean() * 100
    assert measured(mlp(), Objective(loss="cross-entropy"), LABELS)[1] == pytest.approx(right)


def test_a_teacher_of_classes_is_followed_by_divergence():
    torch = pytest.importorskip("torch")
    w1, mine = torch_scores(torch, mlp(), X)
    _, theirs = torch_scores(torch, mlp(seed=7), X)
    f = torch.nn.functional
    heat = 3.0
    loss = heat**2 * f.kl_div(
        f.log_softmax(mine / heat, 1), f.softmax(theirs / heat, 1).detach(), reduction="batchmean"
    )
    loss.backward()
    objective = Objective(loss="distill", temperature=heat)
    text = ENDING["softmax"]
    value, _, gradient = measured(mlp(text), objective, None, teacher=mlp(text, seed=7))
    assert value == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, w1.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_a_teacher_of_probabilities_is_followed_element_by_element():
    torch = pytest.importorskip("torch")
    w1, mine = torch_scores(torch, mlp(), X)
    _, theirs = torch_scores(torch, mlp(seed=7), X)
    target = torch.sigmoid(theirs).detach()
    f = torch.nn.functional
    entropy = f.binary_cross_entropy(target, target)
    loss = f.binary_cross_entropy_with_logits(mine, target) - entropy
    loss.backward()
    text = ENDING["sigmoid"]
    objective = Objective(loss="distill", temperature=1.0)
    value, _, gradient = measured(mlp(text), objective, None, teacher=mlp(text, seed=7))
    assert value == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, w1.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_other_outputs_are_compared_by_relative_error():
    torch = pytest.importorskip("torch")
    w1, mine = torch_scores(torch, mlp(), X)
    _, theirs = torch_scores(torch, mlp(seed=7), X)
    theirs = theirs.detach()
    loss = ((mine - theirs) ** 2).sum() / (theirs**2).sum()
    loss.backward()
    value, _, gradient = measured(mlp(), Objective(loss="distill"), None, teacher=mlp(seed=7))
    assert value == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, w1.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_inner_tensors_add_their_relative_errors():
    alone = measured(mlp(), Objective(loss="distill"), None, teacher=mlp(seed=7))[0]
    objective = Objective(loss="distill", distill_tensors=("h",), distill_tensors_weight=2.0)
    value = measured(mlp(), objective, None, teacher=mlp(seed=7))[0]
    hidden = [X @ net["w1"] + net["b1"] for net in (weights(), weights(7))]
    error = np.sum((hidden[0] - hidden[1]) ** 2) / np.sum(hidden[1] ** 2)
    assert value == pytest.approx(alone + 2 * error, rel=1e-5)


def weights(seed=0):
    return {c.name: c.values for c in mlp(seed=seed).constants()}


def test_labels_and_a_teacher_share_the_loss():
    objective = Objective(loss="cross-entropy", distill_weight=0.25)
    value = measured(mlp(), objective, LABELS, teacher=mlp(seed=7))[0]
    on_labels = measured(mlp(), Objective(loss="cross-entropy"), LABELS)[0]
    apart = Objective(loss="distill", distance="kl")
    distance = measured(mlp(), apart, None, teacher=mlp(seed=7))[0]
    assert value == pytest.approx(0.75 * on_labels + 0.25 * distance, rel=1e-5)


SEQUENCE = """
<ir_version: 9, opset_import: ["" : 18]>
net (float[N, T, 4] x) => (float[N, T, 5] y) <float[4, 5] w1>
{ y = MatMul (x, w1) }
"""
# One that fits, one with a repetition, one alone, one empty, one too long for 7 steps.
TEXTS = np.array(
    [[1, 2, 3, -1], [2, 2, -1, -1], [4, -1, -1, -1], [-1, -1, -1, -1], [3, 3, 3, 3]], np.int64
)


def test_ctc_agrees_with_torch():
    torch = pytest.importorskip("torch")
    model = Model.from_proto(with_weights(SEQUENCE))
    x = numbers((5, 6, 4))
    w1 = torch.tensor(next(model.constants()).values.copy()).requires_grad_()
    logp = torch.log_softmax(torch.tensor(x) @ w1, -1)
    loss = torch.nn.functional.ctc_loss(
        logp.transpose(0, 1),
        torch.tensor(np.maximum(TEXTS, 0)),
        torch.full((5,), 6),
        torch.tensor((TEXTS >= 0).sum(1)),
        zero_infinity=True,
    )
    loss.backward()
    value, _, gradient = measured(model, Objective(loss="ctc"), TEXTS, x=x)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, w1.grad.numpy(), rtol=1e-4, atol=1e-5)
