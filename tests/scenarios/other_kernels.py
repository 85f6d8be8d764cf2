# SPDX-License-Identifier: MIT OR Apache-2.0
"""The short form of `every_kernel`: the kernels that nothing else here runs on a variant, one preset each."""

from lab import kernel

from . import scenario
from .every_kernel import LESS_OF_6_12, every_preset, world  # noqa: F401

PRESET = ["hardened"]
GROUPS = ("messages", "processes")


@scenario
def amd64(folder):
    """The kernel for machines works on both variants, and nothing is stopped."""
    every_preset(kernel.amd64(), folder, presets=PRESET, groups=GROUPS)


@scenario
def rt(folder):
    """So does the one with PREEMPT_RT."""
    every_preset(kernel.rt(), folder, presets=PRESET, groups=GROUPS)


@scenario
def cloud_backports(folder):
    """So does the backports' cloud kernel (6.12)."""
    every_preset(kernel.cloud_backports(), folder, None, PRESET, GROUPS)


@scenario
def amd64_backports(folder):
    """So does the backports' kernel for machines (6.12)."""
    every_preset(kernel.amd64_backports(), folder, LESS_OF_6_12, PRESET, GROUPS)
