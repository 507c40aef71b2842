// Trains a folder of `train-graph` with onnxruntime-node, in batches of 32:
//     node train.mjs FOLDER DATA EPOCHS RATE
// DATA is a .safetensors file with a tensor for each input and one for the labels.
import fs from "node:fs";
import ort from "onnxruntime-node";

const ARRAYS = {
  F64: ["float64", Float64Array], F32: ["float32", Float32Array], BOOL: ["bool", Uint8Array],
  I64: ["int64", BigInt64Array], I32: ["int32", Int32Array], I16: ["int16", Int16Array],
  I8: ["int8", Int8Array], U8: ["uint8", Uint8Array],
};

/** The header of a .safetensors file, where its values begin, and its bytes. */
function read(path) {
  const bytes = fs.readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  return { header: JSON.parse(bytes.subarray(8, 8 + length)), start: 8 + length, bytes };
}

/** A file as tensors by name. */
function tensors({ header, start, bytes }) {
  const found = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [type, Typed] = ARRAYS[dtype];
    const values = bytes.subarray(start + data_offsets[0], start + data_offsets[1]);
    found[name] = new ort.Tensor(type, new Typed(Uint8Array.from(values).buffer), shape);
  }
  return found;
}

/** Rows of a tensor, by their numbers. */
function rows(tensor, places) {
  const size = tensor.size / tensor.dims[0];
  const data = new tensor.data.constructor(places.length * size);
  places.forEach((place, row) => data.set(tensor.data.subarray(place * size, (place + 1) * size), row * size));
  return new ort.Tensor(tensor.type, data, [places.length, ...tensor.dims.slice(1)]);
}

const [folder, file, epochs, rate] = process.argv.slice(2);
const layout = JSON.parse(fs.readFileSync(`${folder}/training.json`, "utf8"));
const session = await ort.InferenceSession.create(`${folder}/training.onnx`);
const data = tensors(read(file));
const state = Object.assign({}, ...layout.files.state.map((name) => tensors(read(`${folder}/${name}`))));
const moving = layout.state.filter((one) => one.output !== null);
const wanted = [layout.loss, layout.metric.output, ...moving.map((one) => one.output)];
const count = Object.values(data)[0].dims[0];
let step = 0;
for (let epoch = 0; epoch < Number(epochs); epoch++) {
  const order = [...Array(count).keys()].sort(() => Math.random() - 0.5);
  let loss = 0, metric = 0, batches = 0;
  for (let start = 0; start + 32 <= count; start += 32, step++, batches++) {
    const feed = { ...state };
    for (const name in data) feed[name] = rows(data[name], order.slice(start, start + 32));
    feed[layout.learning_rate] = new ort.Tensor("float32", [Number(rate)], []);
    feed[layout.step] = new ort.Tensor("int64", [BigInt(step)], []);
    for (const name in feed) if (!session.inputNames.includes(name)) delete feed[name];
    const results = await session.run(feed, wanted);
    for (const one of moving) state[one.input] = results[one.output];
    loss += results[layout.loss].data[0];
    metric += results[layout.metric.output].data[0];
  }
  console.log(`epoch ${epoch + 1}: loss ${(loss / batches).toFixed(4)}, ${layout.metric.name} ${(metric / batches).toFixed(2)}`);
}
const checkpoint = read(`${folder}/checkpoint.safetensors`);
for (const [name, { data_offsets }] of Object.entries(checkpoint.header)) {
  if (name === "__metadata__") continue;
  const { buffer, byteOffset, byteLength } = state[name].data;
  checkpoint.bytes.set(new Uint8Array(buffer, byteOffset, byteLength), checkpoint.start + data_offsets[0]);
}
fs.writeFileSync(`${folder}/checkpoint.safetensors`, checkpoint.bytes);
