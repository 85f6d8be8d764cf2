# SPDX-License-Identifier: MIT OR Apache-2.0
"""Differential execution: functions on stock text and on a variant's, from the same states, compared.

The emulator is Unicorn, QEMU's processor as a library, installed in a virtual environment of the
lab's own.  It works on the memory of a booted guest, through that guest's own page tables, so
pointers lead to real objects, read-only data is read-only, and text is what runs there: the
kernel's after its boot-time edits, or what `installer fill` makes of it for a variant.

    capture    a guest's memory, taken once
    text       the running text: functions, calls, instructions that end a run
    bundle     a bundle's variants: thunks, slots, what branches may reach
    states     random registers, stacks, return addresses
    machine    Unicorn with one text; a run and what it did
    compare    what two runs must have in common
    campaign   which functions, how many states; counts, coverage, differences

A run begins at a function's entry, or at a slot alone, and ends where it goes back to its caller
and a few instructions on, at a fault, in a report of a violation, or after a fixed number of
instructions of the kernel's own text.  What thunks execute is not counted, so both runs do the
same work.
"""

import importlib
import site

from .. import packages

# Everything is pinned: another version is another oracle.
REQUIREMENTS = ["unicorn==2.1.4", "capstone==5.0.9"]


def install():
    """Makes `unicorn` and `capstone` importable."""
    place = packages.python_environment("unicorn", REQUIREMENTS)
    [packages_folder] = place.glob("lib/python3*/site-packages")
    site.addsitedir(str(packages_folder))
    importlib.invalidate_caches()
