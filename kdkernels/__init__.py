# SPDX-License-Identifier: Apache-2.0
"""Knowledge-distillation losses as differentiable PyTorch ops with fused kernels, and loss modules on them."""

from . import distributed, losses, teachers
from .analysis import CKAMetric, Comparison, cka_matrix, compare_models
from .backend import available_backends, explain
from .checks import debug_checks
from .gram import RBF, Cosine, Laplacian, Linear, Polynomial, cka, gram_mse, hsic, mmd
from .logits import (
    LinearLogits,
    MixupBatch,
    TopKLogits,
    distillation_kl,
    generalized_jsd,
    mixed_distillation,
    mixup,
)
from .nystrom import (
    nystrom_cka,
    nystrom_features,
    nystrom_hsic,
    nystrom_transfer,
    select_landmarks,
    transfer_quality,
)
from .nystrom.kda import ClassCenters, landmark_similarity_loss
from .projection import StreamingPCA, autoencoder_basis, projected_mse, random_basis
from .rank import RankDiagnostics, pearson, rank_diagnostics, soft_rank, soft_sort, spearman, spearman_corr
from .relation import pkt, rkd_angle, rkd_distance
from .warm import warmup

__version__ = "0.1.0"

__all__ = [
    "CKAMetric",
    "ClassCenters",
    "Comparison",
    "Cosine",
    "Laplacian",
    "Linear",
    "LinearLogits",
    "MixupBatch",
    "Polynomial",
    "RBF",
    "RankDiagnostics",
    "StreamingPCA",
    "TopKLogits",
    "autoencoder_basis",
    "available_backends",
    "cka",
    "cka_matrix",
    "compare_models",
    "debug_checks",
    "distributed",
    "distillation_kl",
    "explain",
    "generalized_jsd",
    "gram_mse",
    "hsic",
    "landmark_similarity_loss",
    "losses",
    "mixed_distillation",
    "mixup",
    "mmd",
    "nystrom_cka",
    "nystrom_features",
    "nystrom_hsic",
    "nystrom_transfer",
    "pearson",
    "pkt",
    "projected_mse",
    "random_basis",
    "rank_diagnostics",
    "rkd_angle",
    "rkd_distance",
    "select_landmarks",
    "soft_rank",
    "soft_sort",
    "spearman",
    "spearman_corr",
    "teachers",
    "transfer_quality",
    "warmup",
]
