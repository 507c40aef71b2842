"""What the rules do not cover, operator by operator, in the words of the documentation."""

RESTRICTIONS: dict[str, str] = {
    "AveragePool": "padding with excluded elements or ceil_mode needs fixed spatial sizes",
    "BatchNormalization": "running statistics from training mode carry no gradient",
    "Conv": "fixed weight shape; auto_pad SAME with strides needs fixed spatial sizes",
    "ConvTranspose": "auto_pad SAME and output_shape need fixed spatial sizes",
    "Dropout": "whether it is in training mode must be known before the run",
    "DynamicQuantizeLinear": "straight-through; the range carries no gradient",
    "GRU": "activations Sigmoid, Tanh and Relu; no clip; layout 0",
    "Gather": "out-of-range indices are not caught in the gradient",
    "LSTM": "activations Sigmoid, Tanh and Relu; no clip or input_forget; layout 0",
    "MaxPool": "of equal elements the first has the gradient",
    "QuantizeLinear": "straight-through inside the range, zero outside",
    "RNN": "activations Sigmoid, Tanh and Relu; no clip; layout 0",
    "Resize": "a matrix an axis, unless elements are repeated a whole number of times",
    "Round": "straight-through",
    "ScatterElements": "without reduction, indices must not repeat",
    "ScatterND": "without reduction, indices must not repeat",
    "Where": "both sides must be finite where they are not chosen",
}
