"""Losses and training procedures."""

from pyrobust.train.adapters import (
    LoRA,
    SVFit,
    adapter_param_groups,
    adapters,
    adapters_disabled,
    apply_adapter,
    bake_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from pyrobust.train.certified_losses import (
    crown_ibp_loss,
    mtl_ibp_loss,
    sabr_loss,
    taps_loss,
)
from pyrobust.train.crmt import (
    CRMTHistory,
    crmt_integration_step,
    fit_crmt,
)
from pyrobust.train.distillation import Distillation, distillation_loss
from pyrobust.train.hidden_watermark import (
    HiddenExtractor,
    HiddenWatermark,
    random_distortion,
    whiten_extractor_,
)
from pyrobust.train.ibp import (
    IntervalTraining,
    interval_loss,
    worst_logits,
)
from pyrobust.train.loop import (
    GaussianCrossEntropy,
    Objective,
    fit,
)
from pyrobust.train.lora_watermark import (
    DynamicLossWeights,
    LoRAWatermark,
    WatermarkStep,
)
from pyrobust.train.mixing import AlphaChoice, MixingLoss, RandomizedPGD, choose_alpha, train_mixer
from pyrobust.train.multimodal_margin import (
    MultimodalMarginLoss,
    mixup_margin,
    multimodal_margin,
)
from pyrobust.train.noise_levels import KarrasSchedule, improved_consistency_scales, sigmoid_ema
from pyrobust.train.peft_format import load_peft_lora, save_peft_lora
from pyrobust.train.pseudo_labels import pseudo_label_consistency, softmax_entropy
from pyrobust.train.ranking_noise import noise_augmented_ranking_loss
from pyrobust.train.rift import (
    RiFTResult,
    adversarial_batches,
    pgd_runs,
    robust_critical_finetune,
)
from pyrobust.train.robust_criticality import (
    Criticality,
    criticality_modules,
    module_robust_criticality,
)
from pyrobust.train.rrcm import RRCMLosses, RRCMPretrainer, info_nce
from pyrobust.train.schedules import (
    cosine_decay,
    linear_ramp,
    step_decay,
)
from pyrobust.train.smoothed_classifier import NoiseConsistencyLoss, fit_smoothed_classifier
from pyrobust.train.smoothing import (
    ConsistencyTraining,
    GaussianAugmentation,
    MacerTraining,
    SmoothAdvTraining,
    StabilityTraining,
    noisy_copies,
    smooth_adv,
)
from pyrobust.train.smoothing_losses import (
    consistency_penalty,
    consistency_terms,
    gaussian_augmentation_loss,
    macer_loss,
    smoothed_cross_entropy,
    stability_loss,
)
from pyrobust.train.sub_classifier import (
    NoisyConsistency,
    train_subclassifier,
)
from pyrobust.train.temp_balance import TempBalance
from pyrobust.train.tight_ibp import (
    FastRegularizer,
    IBPLoss,
    SmoothEpsSchedule,
    ibp_init_,
)
from pyrobust.train.tightness_monitor import TightnessMonitor
from pyrobust.train.unrolled_fine_tuning import UnrolledFineTuning

__all__ = [
    "crown_ibp_loss",
    "mtl_ibp_loss",
    "sabr_loss",
    "taps_loss",
    "TightnessMonitor",
    "ConsistencyTraining",
    "GaussianAugmentation",
    "MacerTraining",
    "SmoothAdvTraining",
    "StabilityTraining",
    "gaussian_augmentation_loss",
    "macer_loss",
    "noisy_copies",
    "smooth_adv",
    "smoothed_cross_entropy",
    "stability_loss",
    "consistency_penalty",
    "consistency_terms",
    "KarrasSchedule",
    "improved_consistency_scales",
    "sigmoid_ema",
    "RRCMLosses",
    "RRCMPretrainer",
    "info_nce",
    "NoiseConsistencyLoss",
    "fit_smoothed_classifier",
    "AlphaChoice",
    "MixingLoss",
    "RandomizedPGD",
    "choose_alpha",
    "train_mixer",
    "CRMTHistory",
    "MultimodalMarginLoss",
    "crmt_integration_step",
    "fit_crmt",
    "mixup_margin",
    "multimodal_margin",
    "Distillation",
    "cosine_decay",
    "distillation_loss",
    "Criticality",
    "RiFTResult",
    "adversarial_batches",
    "criticality_modules",
    "module_robust_criticality",
    "pgd_runs",
    "robust_critical_finetune",
    "DynamicLossWeights",
    "FastRegularizer",
    "GaussianCrossEntropy",
    "HiddenExtractor",
    "HiddenWatermark",
    "IBPLoss",
    "IntervalTraining",
    "LoRA",
    "LoRAWatermark",
    "UnrolledFineTuning",
    "Objective",
    "SVFit",
    "SmoothEpsSchedule",
    "TempBalance",
    "WatermarkStep",
    "adapter_param_groups",
    "adapters",
    "adapters_disabled",
    "apply_adapter",
    "bake_adapters",
    "fit",
    "ibp_init_",
    "interval_loss",
    "linear_ramp",
    "load_adapter",
    "load_peft_lora",
    "merge_adapters",
    "noise_augmented_ranking_loss",
    "pseudo_label_consistency",
    "random_distortion",
    "save_adapter",
    "save_peft_lora",
    "softmax_entropy",
    "step_decay",
    "unmerge_adapters",
    "whiten_extractor_",
    "worst_logits",
    "NoisyConsistency",
    "train_subclassifier",
]
