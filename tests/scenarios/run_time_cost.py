# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian's kernel on a variant's text without Xen, its instructions counted: see tests/bench."""

from contextlib import contextmanager

from lab import TARGET, chain, cost

from . import expect, scenario

ROUNDS = 5

# Works that allocate nothing, and so repeat exactly but for timer interrupts, which the median leaves out.
STEADY = ["getppid", "read", "write", "pipe", "poll", "signal"]


@contextmanager
def world():
    """One boot under icount."""
    chain.build_tools()
    bundle = chain.emit(TARGET / "run" / "cost.bundle")
    with cost.Guest("cost") as guest:
        guest.bundle = bundle
        guest.measure(1)
        guest.stock = guest.measure(ROUNDS)
        yield guest


@scenario
def checks_cost_instructions(guest):
    """On hardened text, the kernel's own processes included, every work is done and costs more."""
    expect(guest.put(guest.bundle, "hardened") > 1000)
    found = guest.measure(ROUNDS)
    each, mean = cost.ratios(found, guest.stock)
    expect(all(ratio > 1 for ratio in each.values()) and mean < 2, each)


@scenario
def dropped_mitigations_save_instructions(guest):
    """On fast text every work is done, and a pipe costs less."""
    expect(guest.put(guest.bundle, "fast") > 1000)
    found = guest.measure(ROUNDS)
    expect(found["pipe"] < guest.stock["pipe"], found, guest.stock)


@scenario
def taken_out_it_costs_nothing(guest):
    """With the variant taken out works cost what they did, to one instruction in a thousand."""
    guest.put(None, None)
    found = guest.measure(ROUNDS)
    expect(all(abs(found[name] / guest.stock[name] - 1) < 0.001 for name in STEADY), found, guest.stock)
    expect(not guest.trouble(), guest.trouble())
