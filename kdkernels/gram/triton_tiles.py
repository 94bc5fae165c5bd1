# SPDX-License-Identifier: Apache-2.0
from . import torch_impl
forward = torch_impl.forward
backward = torch_impl.backward
