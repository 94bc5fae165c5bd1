# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules with the names, signatures and results of the packages that people come from.

from kdkernels.compat import torchsort      # in place of: import torchsort
"""
