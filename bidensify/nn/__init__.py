"""Binary layers and their parts: what a binary layer is. Knows nothing of methods, graphs or files."""

from __future__ import annotations

from bidensify.exact import Affine, Pointwise
from bidensify.nn.binary_layer import BinaryLayer, binary_layers, make_binary, set_binarization, state_of
from bidensify.nn.bypass import Bypass, fusion, fusion_down, fusion_matrix, fusion_up
from bidensify.nn.calibration import calibrate
from bidensify.nn.contract import ActivationBinarizer, FrozenLayer, set_progress
from bidensify.nn.dab import DistributionAdaptiveBinarizer
from bidensify.nn.int8 import Int8, Int8Layer, int8_layers, make_int8
from bidensify.nn.layers import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear
from bidensify.nn.native import BatchNormLast
from bidensify.nn.rprelu import ByWidth, RPReLU
from bidensify.nn.signs import AffineSign, ShiftedSign, SignBinarizer
from bidensify.nn.ste import (
    Estimator,
    binarize_weight,
    clipped_sign,
    estimator,
    polynomial_sign,
    sign,
    straight_through,
    threshold_levels,
    threshold_sign,
)
from bidensify.nn.weight import LearnedScaleWeight, TransformedWeight, WeightBinarizer

__all__ = [
    "ActivationBinarizer",
    "Affine",
    "AffineSign",
    "BatchNormLast",
    "BiDenseConv2d",
    "BiDenseConvTranspose2d",
    "BiDenseLinear",
    "BinaryLayer",
    "ByWidth",
    "Bypass",
    "DistributionAdaptiveBinarizer",
    "Estimator",
    "FrozenLayer",
    "Int8",
    "Int8Layer",
    "LearnedScaleWeight",
    "Pointwise",
    "RPReLU",
    "ShiftedSign",
    "SignBinarizer",
    "TransformedWeight",
    "WeightBinarizer",
    "binarize_weight",
    "binary_layers",
    "calibrate",
    "clipped_sign",
    "estimator",
    "fusion",
    "fusion_down",
    "fusion_matrix",
    "fusion_up",
    "int8_layers",
    "make_binary",
    "make_int8",
    "polynomial_sign",
    "set_binarization",
    "set_progress",
    "sign",
    "state_of",
    "straight_through",
    "threshold_levels",
    "threshold_sign",
]
