# SPDX-License-Identifier: Apache-2.0
from .compare import compare_models
from .comparison import Comparison
from .matrix import cka_matrix
from .metric import CKAMetric

__all__ = ["CKAMetric", "Comparison", "cka_matrix", "compare_models"]
