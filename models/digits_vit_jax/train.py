# /// script
# requires-python = ">=3.11"
# dependencies = ["jax==0.10.2", "jax2onnx==0.17.1", "onnx==1.23.2", "numpy==2.4.6"]
# ///
"""Trains a small vision transformer on 8 x 8 digits in plain JAX and exports it with jax2onnx.

`python models/digits_vit_jax/train.py` takes about a minute on one core and writes model.onnx
beside this script: opset 23, input `image` float32 (batch, 8, 8, 1) in [0, 1] (channels last),
output `logits` float32 (batch, 10). Patches of 2 x 2 pixels make 16 tokens of width 48; two
encoder layers with 4 heads follow; the mean token is classified.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax import Array, random
from jax2onnx import to_onnx

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "calibration"
WIDTH, HEADS, LAYERS, TOKENS, PATCH = 48, 4, 2, 16, 2
EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY = 100, 64, 3e-3, 0.05

Params = dict


def dense(key: Array, inputs: int, outputs: int) -> Params:
    """A linear layer: weight (inputs, outputs), Glorot-normal, and bias (outputs,)."""
    scale = np.sqrt(2 / (inputs + outputs))
    return {"w": scale * random.normal(key, (inputs, outputs)), "b": jnp.zeros(outputs)}


def norm() -> Params:
    """A layer normalization."""
    return {"gain": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}


def initial_params(key: Array) -> Params:
    """All parameters."""
    keys = iter(random.split(key, 3 + 4 * LAYERS))
    return {
        "patch": dense(next(keys), PATCH * PATCH, WIDTH),
        "position": 0.1 * random.normal(next(keys), (TOKENS, WIDTH)),
        "layers": [
            {
                "norm1": norm(),
                "qkv": dense(next(keys), WIDTH, 3 * WIDTH),
                "mix": dense(next(keys), WIDTH, WIDTH),
                "norm2": norm(),
                "up": dense(next(keys), WIDTH, 4 * WIDTH),
                "down": dense(next(keys), 4 * WIDTH, WIDTH),
            }
            for _ in range(LAYERS)
        ],
        "norm": norm(),
        "head": dense(next(keys), WIDTH, 10),
    }


def linear(p: Params, x: Array) -> Array:
    """(..., inputs) to (..., outputs)."""
    return x @ p["w"] + p["b"]


def normalize(p: Params, x: Array) -> Array:
    """Layer normalization over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / deviation * p["gain"] + p["shift"]


def attend(p: Params, x: Array) -> Array:
    """Multi-head self-attention: (N, TOKENS, WIDTH) to the same shape."""
    heads = linear(p["qkv"], x).reshape(-1, TOKENS, 3, HEADS, WIDTH // HEADS)
    q, k, v = (heads[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(WIDTH // HEADS)
    mixed = jax.nn.softmax(scores, axis=-1) @ v
    return linear(p["mix"], mixed.transpose(0, 2, 1, 3).reshape(-1, TOKENS, WIDTH))


def forward(params: Params, image: Array) -> Array:
    """(N, 8, 8, 1) to logits (N, 10)."""
    side = 8 // PATCH
    patches = image.reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    x = linear(params["patch"], patches.reshape(-1, TOKENS, PATCH * PATCH)) + params["position"]
    for layer in params["layers"]:
        x = x + attend(layer, normalize(layer["norm1"], x))
        x = x + linear(
            layer["down"], jax.nn.relu(linear(layer["up"], normalize(layer["norm2"], x)))
        )
    return linear(params["head"], normalize(params["norm"], x).mean(axis=1))


def loss(params: Params, image: Array, labels: Array) -> Array:
    """Cross entropy with labels smoothed by 0.1."""
    target = 0.9 * jax.nn.one_hot(labels, 10) + 0.01
    return -(target * jax.nn.log_softmax(forward(params, image))).sum(-1).mean()


@partial(jax.jit, donate_argnums=(0, 1, 2))
def step(
    params: Params, m: Params, v: Params, image: Array, labels: Array, rate: Array, count: Array
) -> tuple[Params, Params, Params]:
    """One step of AdamW: first and second moments `m` and `v`, `count` from 1."""
    grads = jax.grad(loss)(params, image, labels)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, grads)

    def update(p: Array, m: Array, v: Array) -> Array:
        direction = (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.99**count)) + 1e-8)
        return p - rate * (direction + WEIGHT_DECAY * p)

    return jax.tree.map(update, params, m, v), m, v


def train(image: np.ndarray, labels: np.ndarray) -> Params:
    """Cosine learning rate with warm-up; images are moved by up to one pixel."""
    rng = np.random.default_rng(0)
    params = initial_params(random.key(0))
    m, v = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    steps = EPOCHS * (len(image) // BATCH)
    for count in range(1, steps + 1):
        rows = rng.choice(len(image), BATCH, replace=False)
        dy, dx = rng.integers(0, 3, 2)
        rate = PEAK_RATE * min(1, count / 100) * 0.5 * (1 + np.cos(np.pi * count / steps))
        batch = padded[rows, dy : dy + 8, dx : dx + 8]
        params, m, v = step(params, m, v, batch, labels[rows], jnp.float32(rate), count)
    return params


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 1) and labels of a file of the folder calibration."""
    with np.load(DATA / name) as data:
        return data["image"].transpose(0, 2, 3, 1), data["labels"]


def main() -> None:
    """Trains, exports, prints the test accuracy."""
    params = train(*load("digits.npz"))
    image, labels = load("digits_test.npz")
    print("top1", float((forward(params, image).argmax(-1) == labels).mean()))
    model = to_onnx(
        partial(forward, params),
        [jax.ShapeDtypeStruct(("batch", 8, 8, 1), jnp.float32)],
        model_name="digits_vit",
        opset=23,
        input_names=["image"],
        output_names=["logits"],
    )
    onnx.save(model, HERE / "model.onnx")


if __name__ == "__main__":
    main()
