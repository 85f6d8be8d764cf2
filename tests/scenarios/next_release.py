# SPDX-License-Identifier: MIT OR Apache-2.0
"""The next release's kernel (the backports' 6.12) as a guest of the patched Xen, on the preset `hardened`: what `live_guest`
proves of this release's, as far as it depends on the kernel."""

import time
from contextlib import contextmanager

from lab import chain, kernel, until, victim

from . import expect, live_guest, scenario
# In this order, and what is defined here last: each finds what the one before it left.
from .live_guest import (apply_binds_by_policy, text_is_explained, new_processes_are_bound,  # noqa: F401
                         exec_changes_the_view, kernel_tools_keep_working, hardened_text_catches, status_counts)

# As the README says; QEMU's processor would let it choose otherwise.
RETPOLINES = "spectre_v2=retpoline"


@contextmanager
def world():
    """Builds everything for that kernel and boots it."""
    chain.build_tools()
    xen = chain.build_xen()
    which = kernel.cloud_backports()
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "next", preset="hardened", which=which)
    with live_guest.booted(xen, chain.dom0_files(bundle, [policy], [public]), "next", which, RETPOLINES) as w:
        yield w


@scenario
def pokes_reach_every_view(w):
    """Jump labels, ftrace and an ordinary probe, set from hardened text: hit there, and every byte is explained afterwards."""
    pokes = victim.Pokes(w.guest)
    deadline = until(120)
    while pokes.rounds() < 2:
        expect(time.monotonic() < deadline, "no two rounds of pokes in two minutes")
        time.sleep(1)
    rounds, hits = pokes.stop()
    expect(rounds == hits, rounds, hits)
    rc, out = w.guest.run(f"""\
cd /sys/kernel/tracing && echo > trace
echo 'p:ordinary {victim.TRACED}' > kprobe_events && echo 1 > events/kprobes/ordinary/enable || exit 1
stat / > /dev/null
grep -c 'ordinary: (' trace
echo 0 > events/kprobes/ordinary/enable; echo > kprobe_events; echo > trace
""")
    expect(rc == 0 and int(out) > 0, rc, out)
    w.installer.run(f"verify-text {chain.GUEST}")


# It ends here as there.
remove_is_complete_and_idempotent = live_guest.remove_is_complete_and_idempotent
nobody_complained = live_guest.nobody_complained
