# SPDX-License-Identifier: MIT OR Apache-2.0
"""Scenarios: what Penumbra promises, tried on the real thing.

A module here is one world (a temporary folder, or a booted lab), made by its `world()`
context manager and shared by the module's scenarios: booting is what costs.  A scenario
is a function marked `@scenario` that takes the world; the first line of its docstring
says what it proves.  Scenarios of a module run in the order in which they are written.

Unmarked names are helpers.  A scenario fails by an exception, `expect` is the usual one.
"""

MODULES = ["lab_itself", "command_lines", "fuzzing", "stock_guest", "run_time_cost", "debloat", "stack_depth", "differential",
           "branches", "other_kernels", "live_guest", "violations", "whole_chain", "lifecycle", "next_release",
           "next_release_modules", "modules", "address_spaces", "address_spaces_pti", "xen_interface", "unpatched_xen",
           "retpolines_off", "view_storm"]

# Run only by name (`tests/run --only text_writers`).
ON_REQUEST = ["failure", "text_writers", "every_kernel", "every_branch"]

# Worlds whose processes never rest: beside another's they take three times as long.
ALONE = {"whole_chain", "view_storm"}

# Worlds that need no emulator.
WITHOUT_QEMU = {"lab_itself", "command_lines", "fuzzing"}


def scenario(function):
    """Marks a scenario."""
    function.is_scenario = True
    return function


def of(module):
    """A module's scenarios in their order."""
    return [f for f in vars(module).values() if getattr(f, "is_scenario", False)]


def expect(condition, *found):
    """Fails the scenario, showing what was found instead."""
    if not condition:
        raise AssertionError(" ".join(str(f) for f in found) or "not so")
