"""Two models of one network, float and compressed, cut into layers that can change places.

Tensors are matched by name; compressing keeps the names of what the layers make. A tensor that a
Q/DQ pair rounds right where it is made is matched as it is before the pair, so that rounding
belongs to the layers that take it: a layer on integers is its rounded inputs, its weights and its
arithmetic. Between matched tensors lies a **layer**, whatever nodes it is made of in either model.
So any pair of models will do: static or dynamic quantization, pruned or clustered weights, other
float types, made by this package or another.

Two kinds of models are built from such twins:

- the *measuring* one holds the reference, every changed layer of the candidate fed with the
  reference's tensors, and the whole candidate; its outputs are sums of squares, so that no
  activation leaves it;
- a *hybrid* is one of the two with some layers of the other.
"""

from onnxslim_passes.evaluation.transplant.twins import Layer, Twins

__all__ = ["Layer", "Twins"]
