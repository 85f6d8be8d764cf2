# SPDX-License-Identifier: MIT OR Apache-2.0
"""A guest that is paused, saved, rebooted, crashed: what the watcher makes of it."""

import time
from contextlib import contextmanager

from lab import LabError, chain, kernel, programs, until, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST


class World:
    """The booted lab with a watched guest."""

    def __init__(self, lab):
        self.lab = lab
        self.installer = chain.Installer(lab)
        self.payroll = None

    @property
    def guest(self):
        """The guest that runs now."""
        return self.lab.guest

    def start_payroll(self):
        """A process that the policy trusts."""
        self.payroll = victim.Worker(self.guest, "payroll", 0, rest=victim.REST)
        self.installer.wait_view(self.payroll.pid, "fast")

    def said(self, words, timeout=120):
        """Waits until the watcher has said `words`, and returns all that it said."""
        deadline = until(timeout)
        while True:
            out = self.lab.dom0.run(f"cat {self.installer.log} {self.installer.log}.err").out
            if words in out:
                return out
            expect(time.monotonic() < deadline, f"the watcher did not say {words!r}: {out}")
            time.sleep(0.5)

    def guest_memory(self):
        """What the guest's balloon driver says it has, in KiB."""
        return int(self.guest.run("cat /sys/devices/system/xen_memory/xen_memory0/info/current_kb").out)

    def wait_for_guest_memory(self, enough, timeout=180):
        """Waits until it is as wanted."""
        deadline = until(timeout)
        while not enough(now := self.guest_memory()):
            expect(time.monotonic() < deadline, f"the guest has {now} KiB:", self.lab.dom0.run("xl list").out)
            time.sleep(1)

    def exit_code(self, timeout=120):
        """Waits for the watcher's end."""
        rc, out = self.lab.dom0.run(f"for i in $(seq {timeout * 5}); do test -s /run/apply.rc && "
                                    "exec cat /run/apply.rc; usleep 200000; done; exit 1", timeout + 30)
        expect(rc == 0, f"the watcher does not end: {out}")
        return int(out)

    def watch(self):
        """Applies and watches; the exit code goes to a file."""
        self.lab.dom0.run(f"rm -f /run/apply.rc; (installer apply {self.installer.apply_args} "
                          f"> {self.installer.log} 2> {self.installer.log}.err; echo $? > /run/apply.rc) &")
        self.said("applied:")


@contextmanager
def world():
    """Builds everything and boots."""
    chain.build_tools()
    xen = chain.build_xen()
    bundle, policy, _, public = chain.signed_chain(chain.WORK / "lifecycle")
    files = chain.dom0_files(bundle, [policy], [public])
    in_guest = [("usr/bin/kexec", programs.program("kexec"), 0o755), ("vmlinuz", kernel.cloud().vmlinuz, 0o644)]
    with Lab.boot(xen, extra=files, guest_extra=in_guest, name="lifecycle", kaslr=True,
                  on_reboot="restart") as lab:
        lab.guest.start()
        w = World(lab)
        w.watch()
        w.start_payroll()
        yield w


@scenario
def pausing_changes_nothing(w):
    """A paused guest is waited for; when it goes on, so does everything."""
    w.lab.dom0.run(f"xl pause {G}")
    time.sleep(3)
    expect(w.installer.status()["applied"], "no longer applied")
    w.lab.dom0.run(f"xl unpause {G}")
    w.payroll.lives()
    w.installer.wait_view(w.payroll.pid, "fast")
    out = w.said("applied:")
    expect("trying again" not in out, "the watcher complained:", out)


@scenario
def memory_is_given_back_and_taken_again(w):
    """The guest balloons down and up again with its views on: these stay whole, and it gets all of it back."""
    full = w.guest_memory()
    w.lab.dom0.run(f"xl mem-set {G} 200")
    w.wait_for_guest_memory(lambda now: now <= full - 50 * 1024)
    w.installer.run(f"verify-text {G}")
    w.payroll.lives()
    w.lab.dom0.run(f"xl mem-set {G} 256")
    w.wait_for_guest_memory(lambda now: now >= full)
    w.installer.run(f"verify-text {G}")
    w.payroll.lives()
    expect(not w.installer.events("lost"), "a view lost a page:", w.installer.events("lost"))


@scenario
def saving_is_refused(w):
    """Xen refuses what `xl save` needs while views are on, and the guest runs on with them."""
    rc, out = w.lab.dom0.run(f"xl save {G} /run/saved; rc=$?; rm -f /run/saved; exit $rc", 300)
    expect(rc != 0 and "Device or resource busy" in out, f"exit {rc}:", out)
    w.payroll.lives()
    w.installer.run(f"verify-text {G}")
    w.installer.wait_view(w.payroll.pid, "fast")


@scenario
def without_views_it_is_saved_and_restored(w):
    """Once its views are removed the guest is saved and restored, and gets them again where it comes back."""
    w.installer.run(f"remove {G}")
    expect(w.exit_code() == 0, "the watcher's exit code")
    old = w.guest.domid()
    rc, out = w.lab.dom0.run(f"xl save {G} /run/saved && xl restore /run/saved; rc=$?; rm -f /run/saved; exit $rc", 600)
    expect(rc == 0, f"exit {rc}:", out)
    expect(w.guest.domid() != old, "the same domain")
    w.guest.attach()
    w.payroll.lives()
    w.watch()
    w.installer.wait_view(w.payroll.pid, "fast")
    w.installer.run(f"verify-text {G}")


@scenario
def a_reboot_is_followed(w):
    """The guest reboots: the watcher says so, and applies again by itself once the new kernel is up."""
    old = w.guest.domid()
    before = w.installer.status()["slide"]
    old_guest = w.guest
    w.lab.guest.successor()
    try:
        old_guest.run("(sleep 1; reboot -f) &", 20)
    except LabError:
        pass
    w.said(f"{G} went down for a reboot")
    w.guest.attach()
    expect(w.guest.domid() != old, "the same domain")
    w.said(f"(domain {w.guest.domid()})")
    w.start_payroll()
    w.installer.run(f"verify-text {G}")
    status = w.installer.status()
    expect(status["applied"] and status["watcher"], status)
    print(f"        slide {before}, then {status['slide']}")


@scenario
def a_crash_is_told(w):
    """The guest's kernel panics: said once, the state dropped, exit code 1; the kept domain is no longer
    called applied."""
    try:
        w.guest.run("echo 1 > /proc/sys/kernel/sysrq; (sleep 1; echo c > /proc/sysrq-trigger) &", 20)
    except LabError:
        pass
    out = w.said(f"{G} crashed")
    expect(out.count("crashed") == 1, out)
    expect(w.exit_code() == 1, "exit code")
    expect(not w.installer.status()["applied"], w.installer.status())
    rc, out = w.lab.dom0.run(f"installer ps {G}")
    expect(rc == 2 and "nothing is applied" in out, rc, out)
    w.lab.dom0.run(f"xl destroy {G}")


@scenario
def another_kernel_is_noticed(w):
    """The guest starts another kernel in place (kexec): its views are taken out and the watcher says
    so and ends with exit code 1."""
    w.lab.guest.successor().start()
    w.watch()
    w.start_payroll()
    rc, out = w.guest.run("ls -l /vmlinuz /usr/bin/kexec")
    expect(rc == 0, out)
    try:
        w.guest.run("(sleep 1; kexec /vmlinuz 'console=hvc0 panic=0') > /dev/hvc0 2>&1 &", 20)
    except LabError:
        pass
    w.said("runs another kernel now")
    expect(w.exit_code() == 1, "exit code")
    # What xl makes of such a guest is its own affair: this one's soft reset ends it, now or in a moment.
    left = w.installer.json("status")["domains"]
    expect(not any(domain["applied"] for domain in left), left)
    w.lab.dom0.run(f"xl destroy {G}")


@scenario
def a_shutdown_ends_the_watching(w):
    """A new guest powers off: the watcher says so and ends with exit code 0."""
    w.lab.guest.successor().start()
    w.watch()
    w.start_payroll()
    try:
        w.guest.run("(sleep 1; poweroff -f) &", 20)
    except LabError:
        pass
    w.said(f"{G} powered off")
    expect(w.exit_code() == 0, "exit code")


@scenario
def xen_did_not_complain(w):
    """Xen printed no assertion and no warning in all of this."""
    expect(not w.lab.xen_trouble(), w.lab.xen_trouble())
