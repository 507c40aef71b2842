"""Lossless storage: ways to write a weight so that ONNX Runtime rebuilds it when it loads.

`base` has the language of decoders and what an encoding is, `contents` what encodings ask of a
weight, one file each the encodings, `choice` the cheapest of them, `writer` puts decoders into a
graph, `recognition` finds them again, and `folding` proves that they cost nothing at run time.
A new encoding is one file here and one line in `ENCODINGS`.
"""

from onnxslim_passes.storage.base import Encoding
from onnxslim_passes.storage.blocks import CodebookBlocks
from onnxslim_passes.storage.chunks import Chunks
from onnxslim_passes.storage.codebook import (
    CodebookPacked,
    CodebookSparse,
    CodebookUint2,
    CodebookUint4,
    CodebookUint8,
)
from onnxslim_passes.storage.dense import Dense
from onnxslim_passes.storage.fill import Fill
from onnxslim_passes.storage.gaps import GapsHuffman
from onnxslim_passes.storage.grid import Grid
from onnxslim_passes.storage.huffman import CodebookHuffman
from onnxslim_passes.storage.narrow import Narrow
from onnxslim_passes.storage.scattered import Bitmask, Rice
from onnxslim_passes.storage.sparse import Sparse
from onnxslim_passes.storage.vectors import CodebookVectors

# In the order in which equal prices are resolved: the simplest decoder first.
ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Dense(),
        Sparse(),
        Fill(),
        Narrow(),
        CodebookUint8(),
        CodebookUint4(),
        CodebookUint2(),
        CodebookPacked(),
        CodebookSparse(),
        CodebookHuffman(),
        CodebookVectors(),
        CodebookBlocks(),
        Bitmask(),
        Rice(),
        GapsHuffman(),
        Grid(),
        Chunks(),
    )
}

__all__ = ["ENCODINGS"]
