# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian's Xen without the series: the installer must say so, not fail half-way."""

from contextlib import contextmanager

from lab import ROOT, TARGET, chain
from lab.lab import Lab

from . import expect, scenario


@contextmanager
def world():
    """Builds Xen without the series (only what the emulator needs) and boots it."""
    chain.build_tools()
    out = TARGET / "xen-unpatched"
    chain.run([ROOT / "xen-patches" / "build", "--no-series", "--output", out])
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "unpatched")
    with Lab.boot(out / "xen", extra=chain.dom0_files(bundle, [policy], [public]), name="unpatched",
                  altp2m=False) as lab:
        lab.guest.start()
        yield lab


@scenario
def refused_with_the_reason(lab):
    """apply ends with 3 and names the missing interface; the guest runs on."""
    rc, out = lab.dom0.run(f"installer apply {chain.Installer(lab).apply_args} --once", 300)
    expect(rc == 3 and "altp2m" in out, rc, out)
    rc, out = lab.guest.run("/usr/bin/guestbook work 0 2")
    expect(rc == 0 and "done" in out, out)


@scenario
def no_xen_at_all(_):
    """On a machine without Xen the installer ends with 3 and says that it needs dom0."""
    done = chain.run([chain.tool("installer"), "ps", "1"], expect=3)
    expect(done == "", done)
