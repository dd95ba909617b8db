"""Binary layers and their parts. Knows nothing of methods or graphs; imports torch alone."""

from __future__ import annotations

from bidensify.nn.activation import ByWidth, RPReLU
from bidensify.nn.binarizer import ActivationBinarizer, DistributionAdaptiveBinarizer, SignBinarizer
from bidensify.nn.bypass import Bypass, fusion, fusion_down, fusion_matrix, fusion_up
from bidensify.nn.calibration import calibrate
from bidensify.nn.conv import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear
from bidensify.nn.layer import BinaryLayer, binary_layers, make_binary, set_binarization
from bidensify.nn.norm import BatchNormLast
from bidensify.nn.ste import binarize_weight, clipped_sign, polynomial_sign, sign, threshold_sign
from bidensify.nn.weight import WeightBinarizer

__all__ = [
    "ActivationBinarizer",
    "BatchNormLast",
    "BiDenseConv2d",
    "BiDenseConvTranspose2d",
    "BiDenseLinear",
    "BinaryLayer",
    "ByWidth",
    "Bypass",
    "DistributionAdaptiveBinarizer",
    "RPReLU",
    "SignBinarizer",
    "WeightBinarizer",
    "binarize_weight",
    "binary_layers",
    "calibrate",
    "clipped_sign",
    "fusion",
    "fusion_down",
    "fusion_matrix",
    "fusion_up",
    "make_binary",
    "polynomial_sign",
    "set_binarization",
    "sign",
    "threshold_sign",
]
