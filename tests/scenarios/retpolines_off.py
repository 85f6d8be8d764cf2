# SPDX-License-Identifier: MIT OR Apache-2.0
"""A guest that runs without retpolines: its call sites have other lengths, so it must be refused."""

from contextlib import contextmanager

from lab import chain
from lab.lab import Lab

from . import expect, scenario


@contextmanager
def world():
    """Boots the guest with spectre_v2=off."""
    chain.build_tools()
    xen = chain.build_xen()
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "retpolines")
    with Lab.boot(xen, extra=chain.dom0_files(bundle, [policy], [public]), name="retpolines",
                  guest_append="spectre_v2=off") as lab:
        lab.guest.start()
        yield lab


@scenario
def refused_with_the_remedy(lab):
    """apply says that retpolines are off and that spectre_v2=retpoline helps; nothing is mapped."""
    installer = chain.Installer(lab)
    rc, out = lab.dom0.run(f"installer apply {installer.apply_args} --once", 300)
    expect(rc == 2 and "retpoline" in out and "spectre_v2=retpoline" in out, rc, out)
    expect(not [d for d in installer.json(f"status {chain.GUEST}")["domains"] if d["applied"]], "applied")
    rc, out = lab.guest.run("/usr/bin/guestbook work 0 2")
    expect(rc == 0 and "done" in out, out)
