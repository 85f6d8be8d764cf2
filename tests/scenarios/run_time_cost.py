# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian's kernel on a variant's text without Xen, its instructions counted: see tests/bench."""

from contextlib import contextmanager

from lab import TARGET, chain, cost

from . import expect, scenario

ROUNDS = 5

# What the way from user mode and back takes of the stack: registers, a few calls, and up to 1 KiB by chance
# (CONFIG_RANDOMIZE_KSTACK_OFFSET).
ENTRY = 1408

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
def the_stack_is_cleared_before_user_mode(guest):
    """By the preset hardened no word is left on the kernel's stack below what an entry takes; stock leaves many."""
    bundle = chain.emit(TARGET / "run" / "cost.hardened", preset="hardened")
    guest.put(None, None)
    stock = _left(guest.stack_in_user_mode(bundle))
    guest.put(bundle, "hardened")
    hardened = _left(guest.stack_in_user_mode(bundle))
    expect(stock > 20 and hardened == 0, stock, hardened)


def _left(stack):
    """How many words of a stack are not zero, but for the mark at its end and what the last entry took."""
    return sum(stack[at:at + 8] != bytes(8) for at in range(8, len(stack) - ENTRY, 8))


@scenario
def taken_out_it_costs_nothing(guest):
    """With the variant taken out works cost what they did, to one instruction in a thousand."""
    guest.put(None, None)
    found = guest.measure(ROUNDS)
    expect(all(abs(found[name] / guest.stock[name] - 1) < 0.001 for name in STEADY), found, guest.stock)
    expect(not guest.trouble(), guest.trouble())
