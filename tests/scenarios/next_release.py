# SPDX-License-Identifier: MIT OR Apache-2.0
"""The next release's kernel (the backports' 6.12) as a guest of the patched Xen, on the preset `hardened`: what `live_guest`
proves of this release's, as far as it depends on the kernel."""

from contextlib import contextmanager

from lab import chain, kernel

from . import live_guest
# In this order: each finds what the one before it left.
from .live_guest import (apply_binds_by_policy, text_is_explained, new_processes_are_bound,  # noqa: F401
                         exec_changes_the_view, kernel_tools_keep_working, hardened_text_catches,
                         status_counts, remove_is_complete_and_idempotent, nobody_complained)

# As the README says; QEMU's processor would let it choose otherwise.
RETPOLINES = "spectre_v2=retpoline"


@contextmanager
def world():
    """Builds everything for that kernel and boots it."""
    chain.build_tools()
    xen = chain.build_xen()
    which = kernel.cloud_backports()
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "next", preset="hardened", which=which)
    with live_guest.booted(xen, chain.dom0_files(bundle, [policy], [public]), "next", which, RETPOLINES) as w:
        yield w
