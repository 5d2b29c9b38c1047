"""What a student learns from teachers, as pure functions: student first, target second.

Letters: B batch, K classes, D channels, H W pixels, h w cells, G boxes per side. All arithmetic is float32; gradients flow
to the student alone. `valid` is (B, H, W) bool, True where a pixel exists; padding takes no part in any mean, and a batch
without a valid pixel gives 0. Where a paper and its official code differ, the formulas follow the code.
"""

from mgd_pipeline.distillation.class_weights import class_weight
from mgd_pipeline.distillation.classes import channel_loss, dist_loss
from mgd_pipeline.distillation.feature import feature_loss
from mgd_pipeline.distillation.image import mean_log_probability_loss, presence_loss, semantic_sensitive_loss
from mgd_pipeline.distillation.pixel import (
    Ohem,
    among_known,
    best_by_class,
    binary_loss,
    cauchy_schwarz_loss,
    kl_loss,
    known_classes_kl,
    mean_of_probabilities,
    pixel_consistency_loss,
    supervised_loss,
    ttm_loss,
)
from mgd_pipeline.distillation.region import content_aware_loss, region_kl_loss
from mgd_pipeline.distillation.weights import (
    agreement_weight,
    class_prototypes,
    confidence_weight,
    correct_weight,
    edge_weight,
    known_weight,
    margin_weight,
    mean_one,
)

__all__ = [
    "Ohem",
    "agreement_weight",
    "among_known",
    "best_by_class",
    "binary_loss",
    "cauchy_schwarz_loss",
    "channel_loss",
    "class_prototypes",
    "class_weight",
    "confidence_weight",
    "content_aware_loss",
    "correct_weight",
    "dist_loss",
    "edge_weight",
    "feature_loss",
    "kl_loss",
    "known_classes_kl",
    "known_weight",
    "margin_weight",
    "mean_log_probability_loss",
    "mean_of_probabilities",
    "mean_one",
    "pixel_consistency_loss",
    "presence_loss",
    "region_kl_loss",
    "semantic_sensitive_loss",
    "supervised_loss",
    "ttm_loss",
]
