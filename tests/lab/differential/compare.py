# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a run on a variant's text must have in common with the run on stock text."""

from .machine import FLAGS, PAGE_FAULT, RED
from .states import CALLER, NOWHERE
from .text import REGISTERS

# What thunks may change (design, invariant 4); what `zero-regs` clears besides.
_FREE = {10, 11, FLAGS}
_CLEARED = {REGISTERS.index(name) for name in ("rcx", "rsi", "rdi", "r8", "r9")}


def differences(state, stock, other, variant, text):
    """Why the two runs do not mean the same, in words; nothing when they do.  `variant` has the slots."""
    found = [f"{text.place(slot)}: {thunk} {what}" for slot, thunk, what in stock.wrong + other.wrong]
    found += _stops_wrongly(state, stock, other, variant, text)
    found += _let_through(state, other, variant, text)
    if other.end[0] == "stopped":
        return found + _same_until_stopped(stock, other, text)
    return found + _same(stock, other, variant, text)


def _stops_wrongly(state, stock, other, variant, text):
    """What must be let through and was not."""
    if not other.stopped:
        return []
    [(slot, value, at)] = other.stopped
    if variant.edits[slot].kind == "return":
        # A call that the run itself made, or, if that is a caller's, the one which it began behind.
        made = (value - 5 in stock.trace[:at] and text.bytes(value - 5, 1) == b"\xe8"
                or value - 6 in stock.trace[:at] and text.bytes(value - 6, 2) == b"\x2e\xe8")
        if made or value == state.home and state.home_kind == CALLER:
            return [f"{text.place(slot)}: stops the return to {text.place(value)}, where a call was made"]
    elif stock.chosen.get(at - 1) == (value, True):
        return [f"{text.place(slot)}: stops the branch to {text.place(value)}, which it may reach"]
    return []


def _let_through(state, other, variant, text):
    """What must be stopped and was not."""
    stopped = {(slot, value) for slot, value, _ in other.stopped}
    found = []
    if state.home_kind == NOWHERE and other.returned:
        slot = other.trace[other.trace.index(state.home) - 1] if state.home in other.trace else other.trace[-1]
        if _checks(variant, slot, "return_cfi") and (slot, state.home) not in stopped:
            found.append(f"{text.place(slot)}: lets a return go to {text.place(state.home)}, behind no call")
    for at, (target, legal) in other.chosen.items():
        slot = other.trace[at]
        went = at + 1 < len(other.trace) or other.end[:1] + other.end[-1:] == ("budget", target)
        if went and not legal and _checks(variant, slot, "forward_cfi") and (slot, target) not in stopped:
            found.append(f"{text.place(slot)}: lets a branch go to {text.place(target)}, inside a function")
    return found


def _checks(variant, slot, check):
    # What marks or clears the stack is named after the check behind it.
    return check in (variant.thunk_of(slot) or "")


def _same_until_stopped(stock, other, text):
    """Both go the same way to the slot, and what is reported is where stock goes next."""
    at = len(other.trace)
    if stock.trace[:at] != other.trace:
        return [_parting(stock, other, text)]
    found = []
    if stock.writes[:len(other.writes)] != other.writes:
        found.append(_first_write(stock, other))
    _, slot, value = other.end
    goes = stock.trace[at] if at < len(stock.trace) else _place(stock.end)
    if goes != value:
        found.append(f"{text.place(slot)}: reports {text.place(value)}, stock goes to {text.place(goes)}")
    return found


def _same(stock, other, variant, text):
    found = []
    if stock.trace != other.trace:
        found.append(_parting(stock, other, text))
    elif stock.writes != other.writes:
        found.append(_first_write(stock, other))
    elif other.inside:
        if not _looked_ahead(stock.end, other):
            found.append(f"ends in {other.inside} by {_told(other.end, text)}, "
                         f"on stock by {_told(stock.end, text)}")
    elif stock.end != other.end:
        found.append(f"ends by {_told(other.end, text)}, on stock by {_told(stock.end, text)}")
    else:
        free = set(_FREE)
        if any("_zeroing" in (variant.thunk_of(slot) or "") for slot in other.slots):
            free |= _CLEARED
        for when, one, two in (("at its return", stock.returned, other.returned),
                               ("at its end", stock.registers, other.registers)):
            if bool(one) != bool(two):
                found.append(f"{when}: only one run gets there")
            for number, (a, b) in enumerate(zip(one, two)):
                if a != b and number not in free:
                    found.append(f"{when} {[*REGISTERS, 'flags'][number]} is {b:#x}, on stock {a:#x}")
    return found


def _looked_ahead(stock, other):
    """Whether a thunk faulted where it had to: it looked at the call before an address at which stock cannot
    execute, or used a stack that stock cannot use in the slot either."""
    if stock[0] != "fault" or other.end[0] != "fault" or stock[1] != other.end[1]:
        return False
    if stock[1] != PAGE_FAULT:
        # An address that is not canonical is not told.
        return True
    ahead, below = _place(stock) - other.end[3], stock[3] - other.end[3]
    return 0 < ahead % (1 << 64) <= 5 or stock[2] == other.trace[-1] and 0 <= below <= RED


def _place(end):
    """Where a run that ended would have gone on."""
    return end[2] if end[0] == "fault" else end[1]


def _told(end, text):
    return " ".join(str(part) if isinstance(part, str) or part < 256 else text.place(part) for part in end)


def _parting(stock, other, text):
    at = next((n for n, (a, b) in enumerate(zip(stock.trace, other.trace)) if a != b),
              min(len(stock.trace), len(other.trace)))
    one, two = (text.place(run.trace[at]) if at < len(run.trace) else _told(run.end, text)
                for run in (stock, other))
    last = text.place(stock.trace[at - 1]) if at else "the start"
    return f"behind {last} (instruction {at}) it goes to {two}, on stock to {one}"


def _first_write(stock, other):
    both = zip(stock.writes, other.writes)
    at = next((n for n, (a, b) in enumerate(both) if a != b), min(len(stock.writes), len(other.writes)))
    one, two = (run.writes[at] if at < len(run.writes) else None for run in (stock, other))
    return f"write {at}: {_write(two)}, on stock {_write(one)}"


def _write(write):
    return f"{write[2] & (1 << 64) - 1:#x} ({write[1]} bytes) to physical {write[0]:#x}" if write else "none"
