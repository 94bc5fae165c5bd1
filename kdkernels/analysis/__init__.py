# SPDX-License-Identifier: Apache-2.0
from .matrix import cka_matrix
from .metric import CKAMetric

__all__ = ["CKAMetric", "cka_matrix"]
