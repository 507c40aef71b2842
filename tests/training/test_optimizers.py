"""A few steps of each optimizer against PyTorch's."""

import numpy as np
import pytest

from onnxslim_passes.training.data import Batch
from onnxslim_passes.training.options import Objective, Parameters, Update
from onnxslim_passes.training.program import build
from onnxslim_passes.training.trainer import Trainer
from tests.training.nets import mlp, points

RATE, STEPS = 0.05, 4

CASES = {
    "sgd": (Update(optimizer="sgd", momentum=0), "SGD", {}),
    "momentum": (Update(optimizer="sgd"), "SGD", {"momentum": 0.9}),
    "nesterov": (
        Update(optimizer="sgd", nesterov=True),
        "SGD",
        {"momentum": 0.9, "nesterov": True},
    ),
    "adam": (Update(beta2=0.99, epsilon=1e-6), "Adam", {"betas": (0.9, 0.99), "eps": 1e-6}),
    "adamw": (Update(optimizer="adamw", weight_decay=0.3), "AdamW", {"weight_decay": 0.3}),
}


def torch_net(torch, model):
    values = {c.name: torch.tensor(c.values.copy()) for c in model.constants()}
    leaves = {name: value.requires_grad_() for name, value in values.items()}

    def forward(x):
        hidden = torch.relu(x @ leaves["w1"] + leaves["b1"])
        return hidden @ leaves["w2"] + leaves["b2"]

    return leaves, forward


def trained(update, objective=None, *, batches, rate=RATE):
    """The weights after one step for each batch."""
    objective = objective or Objective(loss="cross-entropy")
    program = build(mlp(), objective=objective, update=update, parameters=Parameters())
    trainer = Trainer(program)
    for x, labels in batches:
        trainer.step(Batch({"x": x}, labels, len(x)), rate)
    return {
        name.removesuffix("/value"): array
        for name, array in trainer.read().items()
        if name.endswith("/value")
    }


def torch_trained(make, forward_of, *, batches, clip=None, penalty=None):
    torch = pytest.importorskip("torch")
    leaves, forward = forward_of(torch, mlp())
    optimizer = make(torch, leaves)
    for x, labels in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(torch.tensor(x)), torch.tensor(labels))
        if penalty is not None:
            loss = loss + penalty(leaves)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
        optimizer.step()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


def batches(count=STEPS, size=10):
    x, labels = points(count * size)
    return [(x[i : i + size], labels[i : i + size]) for i in range(0, count * size, size)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        # A few float32 roundings of numbers near 1, through four steps.
        np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_steps_agree_with_torch(name):
    update, kind, options = CASES[name]

    def make(torch, leaves):
        groups = [
            {"params": [leaf], **({} if leaf.ndim > 1 else {"weight_decay": 0.0})}
            for leaf in leaves.values()
        ]
        return getattr(torch.optim, kind)(groups, lr=RATE, **options)

    expected = torch_trained(make, torch_net, batches=batches())
    assert_same(trained(update, batches=batches()), expected)


def test_clipping_agrees_with_torch():
    def make(torch, leaves):
        return torch.optim.SGD(list(leaves.values()), lr=RATE)

    expected = torch_trained(make, torch_net, batches=batches(), clip=0.1)
    update = Update(optimizer="sgd", momentum=0, clip_norm=0.1)
    assert_same(trained(update, batches=batches()), expected)


def test_penalties_of_the_weights_are_those_of_their_definition():
    def make(torch, leaves):
        return torch.optim.SGD(list(leaves.values()), lr=RATE)

    def penalty(leaves):
        matrices = [leaves["w1"], leaves["w2"]]
        return sum(0.01 * w.abs().sum() + 0.2 / 2 * (w * w).sum() for w in matrices)

    expected = torch_trained(make, torch_net, batches=batches(), penalty=penalty)
    objective = Objective(loss="cross-entropy", l1=0.01, l2=0.2)
    update = Update(optimizer="sgd", momentum=0)
    assert_same(trained(update, objective, batches=batches()), expected)


def test_accumulated_batches_are_one_large_one():
    x, labels = points(40)
    large = trained(Update(), batches=[(x[:20], labels[:20]), (x[20:], labels[20:])])
    parts = [(x[i : i + 5], labels[i : i + 5]) for i in range(0, 40, 5)]
    small = trained(Update(accumulation=4), batches=parts)
    assert_same(small, large)


def test_nothing_moves_before_enough_batches():
    x, labels = points(10)
    before = {c.name: c.values for c in mlp().constants()}
    found = trained(Update(accumulation=2), batches=[(x, labels)])
    for name, array in before.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_relative_steps_are_in_proportion_to_each_weight(optimizer):
    one = batches(1)
    plain = trained(Update(optimizer=optimizer), batches=one)
    relative = trained(Update(optimizer=optimizer, relative_steps=True), batches=one)
    for constant in mlp().constants():
        before = constant.values
        size = np.sqrt(np.mean(before**2))
        expected = (plain[constant.name] - before) * size
        # Differences of numbers near 1 keep about 1e-7.
        np.testing.assert_allclose(relative[constant.name] - before, expected, atol=1e-6)
