# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA library with a fault each; prints a line `name: what was said`. Run by test_machine_cuda.py."""

import os
import sys

os.environ["KDK_NATIVE"] = "0"

import cuda_device
import torch

import kdkernels as kd


def less_shared_memory(call):
    call.shared -= 512


def shorter_input(call):
    ranges = (call.ranges[i] for i in range(call.range_count))
    next(r for r in ranges if not r.writable).size -= 4


def results_only_read(call):
    for i in range(call.range_count):
        call.ranges[i].writable = 0


def no_block_at_all(call):
    """As if the launch were left out: what the next one reads, nobody wrote."""
    if b"prepare_keys" in call.kernel:
        call.grid[0] = 0


def said(device: cuda_device.Cuda, plant, x) -> str:
    launched = cuda_device.Cuda._launched

    def planted(call):
        plant(call)
        launched(device, call)

    device._launched = planted
    try:
        kd.soft_rank(x, "l2", 0.1, backend="cuda")
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main():
    device = cuda_device.install(int(sys.argv[1]))
    x = torch.randn(3, 200)
    print(f"none: {said(device, lambda call: None, x)}")
    print(f"too little shared memory: {said(device, less_shared_memory, x)}")
    print(f"a row too long: {said(device, shorter_input, x)}")
    print(f"a result that is an input: {said(device, results_only_read, x)}")
    device.shared_limit = 1024  # rows go through workspace
    print(f"none, through workspace: {said(device, lambda call: None, x)}")
    print(f"a launch that is left out: {said(device, no_block_at_all, x)}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
