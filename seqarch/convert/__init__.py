"""From attention to sub-quadratic stacks: a trained model with other mixers in some of its layers.

    from seqarch.convert import convert

    student, report = convert(teacher, "3*gated_delta_net attention")
    print(report)

:mod:`seqarch.convert.matching` has what training then makes small, which the runner does (docs/conversion.md), and
:func:`sensitivity` says which layers a model can spare.
"""

from seqarch.convert.conversion import carry_over, changed_layers, convert
from seqarch.convert.matching import check_pair, layer_by_layer, of_logits, of_matrices, of_outputs
from seqarch.convert.report import ConversionReport, ConvertedMixer
from seqarch.convert.sensitivity import LayerCost, most_costly, sensitivity, with_layers

__all__ = [
    "ConversionReport",
    "ConvertedMixer",
    "LayerCost",
    "carry_over",
    "changed_layers",
    "check_pair",
    "convert",
    "layer_by_layer",
    "most_costly",
    "of_logits",
    "of_matrices",
    "of_outputs",
    "sensitivity",
    "with_layers",
]
