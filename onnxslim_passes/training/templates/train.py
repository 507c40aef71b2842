"""Trains the model in this folder with ONNX Runtime alone: train.py DATA.npz [EPOCHS] [RATE]."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).parent
layout = json.loads((here / "training.json").read_text(encoding="utf-8"))
files = {name: bytearray((here / name).read_bytes()) for name in layout["files"]["state"]}
data = dict(np.load(sys.argv[1]))
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 3
rate = np.array(sys.argv[3] if len(sys.argv) > 3 else 1e-3, np.float32)

state, places = {}, {}
for name, raw in files.items():  # safetensors: length of a JSON header, the header, the values
    start = 8 + int.from_bytes(raw[:8], "little")
    for key, entry in json.loads(raw[8:start]).items():
        if key != "__metadata__":
            places[key] = (name, *(start + offset for offset in entry["data_offsets"]))
for spec in layout["state"]:
    name, begin, end = places[spec["input"]]
    values = np.frombuffer(bytes(files[name][begin:end]), spec["dtype"])
    state[spec["input"]] = values.reshape(spec["shape"])

session = ort.InferenceSession(here / "training.onnx", providers=["CPUExecutionProvider"])
wanted = [layout["loss"], layout["metric"]["output"]]
moving = {spec["output"]: spec["input"] for spec in layout["state"] if spec["output"]}
inputs = {spec.name for spec in session.get_inputs()}
samples, batch, step = len(next(iter(data.values()))), 32, 0
for epoch in range(epochs):
    order, scores = np.random.default_rng(epoch).permutation(samples), []
    for rows in np.array_split(order, max(1, samples // batch)):
        feed = {name: array[rows] for name, array in data.items()} | state
        feed |= {layout["learning_rate"]: rate, layout["step"]: np.array(step, np.int64)}
        feed = {name: array for name, array in feed.items() if name in inputs}
        made = session.run([*wanted, *moving], feed)
        scores.append(made[:2])
        state |= dict(zip(moving.values(), made[2:], strict=True))
        step += 1
    loss, metric = np.mean(scores, axis=0)
    print(f"epoch {epoch + 1}: loss {loss:.4f}, {layout['metric']['name']} {metric:.2f}")

for key, array in state.items():
    name, begin, end = places[key]
    files[name][begin:end] = array.tobytes()
(here / "checkpoint.safetensors").write_bytes(files["checkpoint.safetensors"])
