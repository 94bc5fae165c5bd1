# SPDX-License-Identifier: Apache-2.0
from .centers import ClassCenters
from .op import landmark_similarity_loss

__all__ = ["ClassCenters", "landmark_similarity_loss"]
