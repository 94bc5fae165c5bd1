# SPDX-License-Identifier: Apache-2.0
"""The only list of ops: name, family folder, and the backends it has in the order `auto` prefers them."""

from __future__ import annotations

from typing import NamedTuple


class Op(NamedTuple):
    name: str
    # kdkernels/<family>/ (a dot: a folder inside) holds op.py, reference.py, spec.py, MATH.md and the implementations
    family: str
    backends: tuple[str, ...]
    native: tuple[str, ...] = ()  # operators that a compiled library must implement to be its backend
    native_cpu: tuple[str, ...] = ()  # the CPU library's, where they are others
    longest: int = 0  # entries of a row that its Triton kernels take; 0: any number

    def operators(self, library: str) -> tuple[str, ...]:
        """What the compiled "cpu" or "cuda" library must implement."""
        return (library == "cpu" and self.native_cpu) or self.native


_GRAM = ("triton", "cpp", "torch", "reference")
_TILES = ("centre_rows", "panel_moments")
_PAIRS = (*_TILES, "weigh_rows", "pair_statistic", "pair_gradient")
_NYSTROM = ("triton", "torch", "reference")
_PROJECTION = ("triton", "cpp", "torch", "reference")
_SORT = ("cuda", "cpp", "torch", "reference")
_RANK = ("cuda", "triton", "cpp", "torch", "reference")
LONGEST_ROW = 2048  # that is ranked in Triton: a program holds it in registers
_LOGITS = ("triton", "cpp", "torch", "reference")
_LOGIT_ROWS = ("logits_rows", "logits_rows_backward")
_RELATIONS = ("relate_pairs", "scale_pairs")
_RANKS = ("rank_rows", "rank_rows_backward")
_SORTS = ("soft_sort_rows", "soft_sort_rows_backward")

OPS = {
    op.name: op
    for op in (
        Op("cka", "gram", _GRAM, (*_PAIRS, "both_ways", "both_ways_backward")),
        Op("hsic", "gram", _GRAM, _PAIRS),
        Op("mmd", "gram", _GRAM, _TILES),
        Op("gram_mse", "gram", _GRAM, _TILES),
        Op("nystrom_features", "nystrom", _NYSTROM),
        Op("nystrom_cka", "nystrom", _NYSTROM),
        Op("nystrom_hsic", "nystrom", _NYSTROM),
        Op("nystrom_transfer", "nystrom", _NYSTROM),
        Op("select_landmarks", "nystrom", ("torch", "reference")),
        Op("transfer_quality", "nystrom", ("torch", "reference")),
        Op("landmark_similarity_loss", "nystrom.kda", _PROJECTION, ("landmark_rows", "landmark_rows_backward")),
        Op("projected_mse", "projection", _PROJECTION, ("project_rows", "spread_rows")),
        Op("soft_rank", "rank", _RANK, _RANKS, longest=LONGEST_ROW),
        Op("soft_sort", "rank", _SORT, ("sort_rows", "sort_rows_backward"), _SORTS),
        Op("rank_diagnostics", "rank", _SORT, _RANKS[:1]),
        Op("spearman", "rank", _RANK, (*_RANKS, "spearman_rows"), longest=LONGEST_ROW),
        Op("pearson", "rank", ("torch", "reference")),
        Op("spearman_corr", "rank", _SORT, _RANKS[:1]),
        Op("mixup", "logits", _LOGITS, ("mix_rows",)),
        Op("distillation_kl", "logits", _LOGITS, (*_LOGIT_ROWS, "kl_rows", "kl_rows_backward")),
        Op("generalized_jsd", "logits", _LOGITS, ("divergence_rows", "divergence_rows_backward")),
        Op("mixed_distillation", "logits", _LOGITS, _LOGIT_ROWS),
        Op("rkd_distance", "relation", ("cpp", "torch", "reference"), _RELATIONS),
        Op("rkd_angle", "relation", ("triton", "cpp", "torch", "reference"), ("angle_triplets",)),
        Op("pkt", "relation", ("cpp", "torch", "reference"), _RELATIONS),
    )
}
