"""Modules that mirror torch.nn: packed layers, SmoothedClassifier, methods that are layers."""

from pyrobust.nn.adapter import Adapter, weight_checksum
from pyrobust.nn.adaptive_smoothing import AdaptiveMixedClassifier, MixedClassifier
from pyrobust.nn.affine_rounding import AffineRounding
from pyrobust.nn.complex_decoder import (
    ComplexAttention,
    ComplexDecoderConfig,
    ComplexDecoderLM,
    ComplexGatedMLP,
    KeyValueCache,
)
from pyrobust.nn.complex_layers import (
    ComplexReLUSquared,
    ComplexRMSNorm,
    ComplexRotaryEmbedding,
)
from pyrobust.nn.dense_sparse_linear import DenseSparseLinear
from pyrobust.nn.feature_tap import FeatureTap
from pyrobust.nn.lora import ConvLoRA2d, LoHa, LoRALinear, VeRA
from pyrobust.nn.mixing_network import MixingNetwork
from pyrobust.nn.noise_conditioned import NoiseConditionedClassifier, NoiseConditionedEncoder
from pyrobust.nn.orthogonal_fusion import FusionOutput, LateFusion, OrthogonalFusion
from pyrobust.nn.packed_complex_linear import PackedComplexLinear
from pyrobust.nn.packed_conv import PackedConv1d, PackedConv2d
from pyrobust.nn.packed_embedding import PackedEmbedding
from pyrobust.nn.packed_linear import PackedLinear, QuantizedLinear
from pyrobust.nn.packed_qk_attention import PackedQKAttention
from pyrobust.nn.packed_sequential import PackedSequential
from pyrobust.nn.patch_transformer import PatchTransformer
from pyrobust.nn.rounded_input import RoundedInput
from pyrobust.nn.siren_fit import activation_spectrum, empirical_ntk, fit_signal, ntk_spectrum
from pyrobust.nn.siren_square import (
    SIREN,
    Sine,
    siren_uniform_,
    spectral_centroid,
    winner_init_,
    winner_normal_,
    winner_scales,
)
from pyrobust.nn.smoothed_classifier import SmoothedClassifier
from pyrobust.nn.svfit import SVFitConv2d, SVFitLinear
from pyrobust.nn.weight_compander import (
    WeightCompander,
    apply_weight_compander,
    compander_param_groups,
    fold_weight_compander,
    weight_compander,
    weight_statistics,
)

__all__ = [
    "NoiseConditionedClassifier",
    "NoiseConditionedEncoder",
    "PatchTransformer",
    "AdaptiveMixedClassifier",
    "MixedClassifier",
    "FeatureTap",
    "MixingNetwork",
    "Adapter",
    "ComplexAttention",
    "ComplexDecoderConfig",
    "ComplexDecoderLM",
    "ComplexGatedMLP",
    "ComplexRMSNorm",
    "ComplexReLUSquared",
    "ComplexRotaryEmbedding",
    "ConvLoRA2d",
    "KeyValueCache",
    "PackedComplexLinear",
    "DenseSparseLinear",
    "FusionOutput",
    "LateFusion",
    "LoHa",
    "LoRALinear",
    "SVFitConv2d",
    "SVFitLinear",
    "VeRA",
    "weight_checksum",
    "OrthogonalFusion",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedQKAttention",
    "PackedSequential",
    "AffineRounding",
    "RoundedInput",
    "QuantizedLinear",
    "SIREN",
    "Sine",
    "SmoothedClassifier",
    "activation_spectrum",
    "empirical_ntk",
    "fit_signal",
    "ntk_spectrum",
    "siren_uniform_",
    "spectral_centroid",
    "winner_init_",
    "winner_normal_",
    "winner_scales",
    "WeightCompander",
    "apply_weight_compander",
    "compander_param_groups",
    "fold_weight_compander",
    "weight_compander",
    "weight_statistics",
]
