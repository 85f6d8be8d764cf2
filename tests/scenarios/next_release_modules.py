# SPDX-License-Identifier: MIT OR Apache-2.0
"""Modules of the next release's kernel (the backports' 6.12), which keeps code and data of a module in memories apart from one
another: what `modules` proves of this release's, on the preset `hardened`."""

from contextlib import contextmanager

from lab import kernel

from . import modules
# In this order: each finds what the one before it left.
from .modules import (unknown_modules_stay_and_are_reported, a_known_module_is_mapped,  # noqa: F401
                      its_hardened_text_works, tracing_its_functions_reaches_every_view,
                      its_frames_are_the_guests_again_when_it_is_freed, removal_leaves_it_loaded)
from .next_release import RETPOLINES


@contextmanager
def world():
    """A guest of that kernel, applied."""
    with modules.applied(kernel.cloud_backports(), "next-modules", "hardened", RETPOLINES) as w:
        yield w
