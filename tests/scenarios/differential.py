# SPDX-License-Identifier: MIT OR Apache-2.0
"""Functions on stock text and on variants' texts, in an emulator, from the same states: see tests/differential."""

import json
import re
import subprocess
from contextlib import contextmanager

from lab import ROOT, TARGET, chain, differential

from . import expect, scenario

SEED, FUNCTIONS, STATES = 20261126, 2500, 3
# For a broken thunk: it is found long before.
SOME = 150

FOLDER = TARGET / "run" / "differential-short"


@contextmanager
def world():
    """The memory of a guest, the preset `hardened`, the recipe with `zero-regs`."""
    chain.build_tools()
    differential.install()
    from lab.differential.campaign import Campaign
    yield Campaign(FOLDER, seed=SEED)


@scenario
def runs_end_in_the_same_state(campaign):
    """On hardened, register-clearing and fast text a sample of functions does what it does on stock text."""
    for function in campaign.functions(FUNCTIONS):
        campaign.run(function, STATES)
    report = campaign.report
    expect(not report["differences"], json.dumps(report["differences"][:5], indent=1))
    # What is not executed is not compared.
    expect(report["stock_ends"]["budget"] > 500 and report["stock_ends"]["fault"] > 500, report["stock_ends"])
    expect(report["returned"]["caller"] > 500 and report["returned"]["no call"] > 50, report["returned"])
    for kind in ("return", "indirect"):
        expect(report["reports"][f"hardened/hardened: {kind}"] > 50, report["reports"])
    for label, parts in campaign.coverage().items():
        for kind, (some, _) in parts["thunks"].items():
            expect(some, f"{label}: no thunk {kind} was executed")


def broken(campaign, label, thunk, old, new):
    """A variant's text in which the first `old` of a thunk (its name, or how it ends) is `new`."""
    variant = campaign.variants[label][0]
    for at, name in variant.thunks.items():
        if not re.fullmatch(thunk, name):
            continue
        place = at - variant.start
        if (found := variant.content.find(old, place, place + 64)) >= 0:
            return variant.content[:found] + new + variant.content[found + len(old):]
    raise AssertionError(f"no {thunk} has {old.hex()}")


def found(campaign, label, content):
    """The first difference that a text makes, and how many functions it took."""
    good = campaign.variants[label]
    campaign.reset()
    campaign.replace(label, content)
    try:
        for function in campaign.functions(SOME):
            campaign.run(function, STATES)
            if campaign.report["differences"]:
                return campaign.report["differences"][0]
    finally:
        campaign.variants[label] = good
    raise AssertionError(f"{SOME} functions, {campaign.report['runs']} runs, nothing differed")


@scenario
def a_register_that_is_not_taken_back_is_found(campaign):
    """A thunk that takes r10 back where it saved r11 is named, with slot and registers."""
    pops, other = bytes.fromhex("9d415b"), bytes.fromhex("9d415a")
    seen = found(campaign, "hardened/hardened", broken(campaign, "hardened/hardened", "return_cfi_tail_r11_saving",
                                                       pops, other))
    expect(any("changes r10" in line for line in seen["what"]), seen)


@scenario
def a_check_that_lets_through_is_found(campaign):
    """A thunk whose comparison always holds lets a return go behind no call: found."""
    variant = campaign.variants["hardened/hardened"][0]
    content = bytearray(variant.content)
    # `je` to `nop; jmp`, in the thunks of single functions.
    for at, name in variant.thunks.items():
        if re.fullmatch(r"return_cfi_\d+", name) and (place := content.find(b"\x0f\x84", at - variant.start,
                                                                            at - variant.start + 20)) >= 0:
            content[place:place + 2] = b"\x90\xe9"
    seen = found(campaign, "hardened/hardened", bytes(content))
    expect(any("behind no call" in line for line in seen["what"]), seen)


@scenario
def a_wrong_table_is_found(campaign):
    """One bit changed in each word of a table of classes stops a branch that is legal: found."""
    variant = campaign.variants["hardened/hardened"][0]
    start, end = (at - variant.start for at in variant.tables["classes"])
    content = bytearray(variant.content)
    for at in range(start, end, 4):
        content[at] ^= 1
    seen = found(campaign, "hardened/hardened", bytes(content))
    expect(any("which it may reach" in line for line in seen["what"]), seen)


@scenario
def a_result_that_is_cleared_is_found(campaign):
    """A thunk that clears rdx in place of rcx is found by the register that it does not keep."""
    label = "zero-regs/hardened"
    variant = campaign.variants[label][0]
    content = variant.content.replace(bytes.fromhex("31c931f631ff"), bytes.fromhex("31d231f631ff"))
    expect(content != variant.content, "nothing clears rcx, rsi and rdi")
    seen = found(campaign, label, content)
    expect(any("changes rdx" in line for line in seen["what"]), seen)


@scenario
def a_difference_can_be_seen_again(campaign):
    """A branch of `fast` through another register is found, and the command named for it finds it again."""
    label = "hardened/fast"
    variant = campaign.variants[label][0]
    content = bytearray(variant.content)
    for at, edit in variant.edits.items():
        if edit.kind == "indirect":
            content[at - variant.start + len(edit.content) - 1] ^= 1
    seen = found(campaign, label, bytes(content))
    file, told = FOLDER / "broken.text", FOLDER / "again.json"
    file.write_bytes(content)
    done = subprocess.run(
        [ROOT / "tests" / "differential", "--only", "hardened", "--function", seen["entry"], "--seed", str(SEED),
         "--states", str(STATES), "--name", "differential-again", "--json", told, "--text", f"{label}={file}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True)
    expect(done.returncode == 1 and seen["place"] in done.stdout, done.stdout[-2000:], done.stderr[-2000:])
    expect(seen in json.loads(told.read_text())["differences"], seen, done.stdout[-2000:])
