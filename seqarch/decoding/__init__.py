"""One decoded token: a layer's step as torch takes it is captured, and lowered to instructions of a compiled tape.

Nothing is said twice. :mod:`~seqarch.decoding.capture` writes down what a layer's own ``forward`` does for one token,
with the lengths in its state as symbols; :mod:`~seqarch.decoding.lowering` turns that into instructions, by rules for
views, for what is elementwise, for reductions and products, and for this library's operations;
:mod:`~seqarch.decoding.program` runs those of many layers in one call.
"""
