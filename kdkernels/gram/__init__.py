# SPDX-License-Identifier: Apache-2.0
from .kernels import RBF, Cosine, Kernel, Laplacian, Linear, Polynomial
from .op import cka, gram_mse, hsic, mmd

__all__ = ["Cosine", "Kernel", "Laplacian", "Linear", "Polynomial", "RBF", "cka", "gram_mse", "hsic", "mmd"]
