# SPDX-License-Identifier: Apache-2.0
from .bases import autoencoder_basis, random_basis
from .op import projected_mse
from .pca import StreamingPCA

__all__ = ["StreamingPCA", "autoencoder_basis", "projected_mse", "random_basis"]
