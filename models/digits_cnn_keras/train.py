# /// script
# requires-python = ">=3.11"
# dependencies = ["tensorflow-cpu==2.21.0", "tf2onnx==1.17.0", "onnx==1.23.2", "numpy==2.4.6"]
# ///
"""Trains a depthwise-separable network on 8 x 8 digits with Keras and exports it with tf2onnx.

`python models/digits_cnn_keras/train.py` takes about a minute on one core and writes model.onnx
beside this script: opset 17, input `image` float32 (batch, 8, 8, 1) in [0, 1] (channels last),
output `probabilities` float32 (batch, 10).
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from keras import layers

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "calibration"


def separable(x: keras.KerasTensor, channels: int, strides: int) -> keras.KerasTensor:
    """A depthwise 3 x 3 and a pointwise convolution, each normalized, with ReLU6 between."""
    x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(x)
    x = layers.ReLU(max_value=6)(layers.BatchNormalization()(x))
    x = layers.Conv2D(channels, 1, use_bias=False)(x)
    return layers.ReLU(max_value=6)(layers.BatchNormalization()(x))


def digits_net() -> keras.Model:
    """(N, 8, 8, 1) to probabilities (N, 10)."""
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(image)
    x = layers.ReLU(max_value=6)(layers.BatchNormalization()(x))
    x = separable(x, 64, strides=1)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Add()([x, separable(x, 64, strides=1)])
    x = separable(x, 128, strides=2)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model(image, layers.Dense(10, activation="softmax", name="probabilities")(x))


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 1) and labels of a file of the folder calibration."""
    with np.load(DATA / name) as data:
        return data["image"].transpose(0, 2, 3, 1), data["labels"]


def export(net: keras.Model, path: Path) -> None:
    """Writes the network with any batch size."""

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 1), tf.float32, name="image")])
    def forward(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": net(image, training=False)}

    tf2onnx.convert.from_function(forward, forward.input_signature, opset=17, output_path=str(path))


def main() -> None:
    """Trains, exports, prints the test accuracy."""
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    net = digits_net()
    image, labels = load("digits.npz")
    epochs, batch = 60, 32
    steps = epochs * -(-len(image) // batch)
    net.compile(
        keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    net.fit(image, labels, batch_size=batch, epochs=epochs, verbose=0)
    print("top1", net.evaluate(*load("digits_test.npz"), verbose=0)[1])
    export(net, HERE / "model.onnx")


if __name__ == "__main__":
    main()
