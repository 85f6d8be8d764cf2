# SPDX-License-Identifier: MIT OR Apache-2.0
"""A short view storm on four vCPUs; tests/storm is the long one."""

from contextlib import contextmanager

from lab import chain
from lab.lab import Lab
from lab.storm import Storm

from . import expect, scenario

FLIPS = 400


@contextmanager
def world():
    """Boots four vCPUs with a slide and starts all loads."""
    chain.build_tools()
    xen = chain.build_xen()
    # The narrowest checks: the most thunks, and constants in them that move with the slide.
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "storm", preset="hardened")
    with Lab.boot(xen, extra=chain.dom0_files(bundle, [policy], [public]), vcpus=4, name="storm",
                  kaslr=True) as lab:
        lab.guest.start()
        storm = Storm(lab, 1)
        storm.begin()
        yield storm


@scenario
def flips_change_nothing(storm):
    """Ten live processes, flipped between all views at random moments while text is poked, get only
    right results, and every copy stays equal to the guest's text."""
    storm.flip(FLIPS)
    report = storm.end()
    expect(report["ok"] and report["flips"] == FLIPS, report)
    expect(all(count > FLIPS / 10 for count in report["per_view"].values()), report["per_view"])
    expect(all(p["rounds"] > 0 for p in report["processes"]) and len(report["processes"]) == 10,
           report["processes"])
