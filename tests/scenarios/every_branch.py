# SPDX-License-Identifier: MIT OR Apache-2.0
"""The long form of `branches`: every kernel of the lab, all groups of stress-ng."""

from contextlib import nullcontext

from lab import kernel, stress

from . import expect, scenario
from .branches import recorded


def world():
    """Each scenario boots its own kernel."""
    return nullcontext()


def _all_of(which):
    with recorded(which, f"branches-{which.release}") as one:
        one.look("boot")
        one.work(stress.GROUPS)
        expect(len(one.look("in all") - one.booted) > 2000)


@scenario
def cloud(_):
    """No branch of Debian 12's cloud kernel goes where `typed` forbids it."""
    _all_of(kernel.cloud())


@scenario
def amd64(_):
    """Nor one of the kernel for machines."""
    _all_of(kernel.amd64())


@scenario
def rt(_):
    """Nor one of that with PREEMPT_RT."""
    _all_of(kernel.rt())


@scenario
def cloud_backports(_):
    """Nor one of the backports' cloud kernel (6.12), whose BTF has other functions' prototypes."""
    _all_of(kernel.cloud_backports())


@scenario
def amd64_backports(_):
    """Nor one of the backports' kernel for machines."""
    _all_of(kernel.amd64_backports())
