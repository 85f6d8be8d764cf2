# SPDX-License-Identifier: MIT OR Apache-2.0
"""Text of loaded modules: recognised, mapped in every view, and out of the views before it is freed.

overlayfs is the module: it is Debian's own, has hundreds of return sites and indirect calls, and
runs whenever a file on a mount of its kind is used.
"""

import time
from contextlib import contextmanager

from lab import chain, kernel, until, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST
MODULE = "overlay"
# A policy that trusts the kernel's own text alone.
STRICT = "strict.toml"
# Enough work to run most of what a mount, lookups, copying up and removing run.
WORK = """\
cd /tmp/ovl && mount -t overlay overlay -o lowerdir=lower,upperdir=up/u,workdir=up/w merged || exit 1
for i in 1 2 3 4 5 6 7 8 9 10; do
    echo $i > merged/new.$i && cat merged/old.$i > merged/copy.$i && mv merged/copy.$i merged/moved.$i \
        && rm merged/old.$i && mkdir merged/dir.$i && ls -l merged > /dev/null || exit 2
done
[ "$(cat merged/moved.*)" = "$(cat lower/old.*)" ] || exit 3
umount merged
"""


class World:
    """The booted lab with views on, before the module is loaded."""

    def __init__(self, lab):
        self.lab = lab
        self.guest = lab.guest
        self.installer = chain.Installer(lab)

    def load(self):
        """Loads the module and waits until the audit log says that it is mapped."""
        before = len(self.events("mapped"))
        rc, out = self.guest.run(f"insmod /lib/modules/{MODULE}.ko")
        expect(rc == 0, out)
        self.wait("mapped", before + 1)

    def unload(self):
        """Unloads it; once rmmod has returned its memory is free."""
        rc, out = self.guest.run(f"rmmod {MODULE}")
        expect(rc == 0, out)

    def events(self, kind):
        """Records of one kind in the audit log."""
        return self.installer.events(kind)

    def wait(self, kind, count):
        """Waits until there are so many records of a kind."""
        deadline = until(60)
        while len(self.events(kind)) < count:
            expect(time.monotonic() < deadline, f"{count} records `{kind}`, found", self.events(kind))
            time.sleep(0.3)

    def work(self):
        """Uses the module, by a process on hardened text."""
        rc, out = self.guest.run("rm -rf /tmp/ovl; mkdir -p /tmp/ovl/lower /tmp/ovl/up /tmp/ovl/merged; "
                                 "mount -t tmpfs none /tmp/ovl/up && mkdir /tmp/ovl/up/u /tmp/ovl/up/w; "
                                 "for i in 1 2 3 4 5 6 7 8 9 10; do echo content $i > /tmp/ovl/lower/old.$i; done; "
                                 f"({WORK}); rc=$?; umount /tmp/ovl/up; exit $rc")
        expect(rc == 0, rc, out)


@contextmanager
def world():
    """Builds a bundle with the module, boots, applies."""
    with applied(kernel.cloud(), "modules") as w:
        yield w


@contextmanager
def applied(which, name, preset=None, append=""):
    """The world of a guest of the kernel `which`; `append` goes to its command line."""
    chain.build_tools()
    xen = chain.build_xen()
    work = chain.WORK / name
    bundle, policy, secret, public = chain.signed_chain(work, modules=[which.module(MODULE)], preset=preset,
                                                        which=which)
    strict = work / STRICT
    strict.write_text(policy.read_text().replace('= "payroll"', '= "strict"', 1) + '\n[modules]\nunknown = "refuse"\n')
    chain.sign(strict, secret)
    files = chain.dom0_files(bundle, [policy, strict], [public])
    with Lab.boot(xen, extra=files, guest_extra=[(f"lib/modules/{MODULE}.ko", which.plain_module(MODULE), 0o644)],
                  name=name, kaslr=True, guest_kernel=which, guest_append=append) as lab:
        lab.guest.start()
        w = World(lab)
        # ftrace's first use changes static calls for good; see tests/demo.
        victim.Pokes(lab.guest).stop()
        w.installer.apply()
        yield w


@scenario
def unknown_modules_stay_and_are_reported(w):
    """A module that the bundle does not have stays on its own text, and the log says so."""
    victim.prepare_attacks(w.guest)
    w.wait("stays", 1)
    expect(any(r["module"] == "penumbra_bug" for r in w.events("stays")), w.events("stays"))


@scenario
def a_known_module_is_mapped(w):
    """At load the module is recognised, its relocated text explained, and every view has it."""
    w.load()
    record = w.events("mapped")[-1]
    expect(record["module"] == MODULE and record["pages"] > 0, record)
    w.installer.run(f"verify-text {G}")
    report = w.installer.json(f"verify-text {G}")["text"]
    names = {view["name"] for view in report["modules"]}
    expect(names == {f"{view}/{MODULE}" for view in ("stock", "fast", "hardened")}, names)


@scenario
def its_hardened_text_works(w):
    """File systems of its kind are mounted and used from hardened text; nothing is stopped."""
    w.work()
    expect(not w.events("violation"), w.events("violation"))
    expect(not w.guest.trouble(), w.guest.trouble())


@scenario
def tracing_its_functions_reaches_every_view(w):
    """ftrace on the module's functions hits in hardened text, and every byte is explained while on and off."""
    rc, out = w.guest.run("cd /sys/kernel/tracing && echo 0 > tracing_on; echo > trace; "
                          "echo 'ovl_*' > set_ftrace_filter && echo function > current_tracer && echo 1 > tracing_on")
    expect(rc == 0, out)
    try:
        w.installer.run(f"verify-text {G}")
        w.work()
        rc, out = w.guest.run("grep -c ovl_ /sys/kernel/tracing/trace")
        expect(rc == 0 and int(out) > 100, rc, out)
    finally:
        w.guest.run("cd /sys/kernel/tracing && echo nop > current_tracer; echo > set_ftrace_filter")
    w.installer.run(f"verify-text {G}")
    expect(not w.guest.trouble(), w.guest.trouble())


@scenario
def its_frames_are_the_guests_again_when_it_is_freed(w):
    """rmmod takes it out of the views before its memory is free; loaded again it is mapped again, ten times."""
    for _ in range(10):
        dropped = len(w.events("unmapped"))
        w.unload()
        w.wait("unmapped", dropped + 1)
        # Its frames get another use at once; a view that still had the old text there would corrupt it.
        rc, out = w.guest.run("dd if=/dev/urandom of=/tmp/fill bs=64k count=64 2>/dev/null && "
                              "cp /tmp/fill /tmp/fill2 && cmp /tmp/fill /tmp/fill2 && rm /tmp/fill /tmp/fill2")
        expect(rc == 0, out)
        w.load()
    w.work()
    w.installer.run(f"verify-text {G}")
    expect(not w.guest.trouble(), w.guest.trouble())
    expect(not w.lab.xen_trouble(), w.lab.xen_trouble())


@scenario
def removal_leaves_it_loaded(w):
    """`remove` gives the module its own text back while it is loaded and in use."""
    w.installer.stop_watching()
    w.installer.run(f"remove {G}")
    w.work()
    w.unload()
    expect(not w.guest.trouble(), w.guest.trouble())


@scenario
def a_strict_policy_refuses_unknown_modules(w):
    """With `unknown = "refuse"` nobody has a laxer view than the default while an unknown module is loaded;
    when it goes the rules hold again, and when it comes back they end."""
    expect(w.guest.run("grep -q ^penumbra_bug /proc/modules").rc == 0, "the unknown module is gone")
    payroll = victim.Worker(w.guest, "payroll", 0, ".strict")
    installer = chain.Installer(w.lab, policy=STRICT)
    installer.apply()
    installer.wait_view(payroll.pid, "hardened")
    time.sleep(3)
    installer.wait_view(payroll.pid, "hardened", timeout=0)
    for _ in range(2):
        rc, out = w.guest.run("rmmod penumbra_bug")
        expect(rc == 0, out)
        installer.wait_view(payroll.pid, "fast")
        rc, out = w.guest.run("insmod /lib/modules/penumbra_bug.ko")
        expect(rc == 0, out)
        installer.wait_view(payroll.pid, "hardened")
    payroll.lives()
    installer.stop_watching()
    installer.run(f"remove {G}")
    expect(not w.guest.trouble(), w.guest.trouble())
