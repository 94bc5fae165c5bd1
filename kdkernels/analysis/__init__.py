# SPDX-License-Identifier: Apache-2.0
from .matrix import cka_matrix

__all__ = ["cka_matrix"]
