# SPDX-License-Identifier: MIT OR Apache-2.0
"""Xen, dom0 and guest together.

    with Lab.boot(xen, extra=[...]) as lab:
        lab.guest.start()
        rc, out = lab.dom0.run("installer ps guest")
        rc, out = lab.guest.run("id")

`guest.run` goes through the guest's own console: the request is written to the
pty that xenconsoled keeps for it in dom0, the answer is read from xenconsoled's
log of the console, which is also where the guest's oopses and panics are seen.
"""

import re
import time

from . import TARGET, LabError, grub, initramfs, kernel, until
from .agent import Agent
from .qemu import Machine

MEMORY = 2560
DOM0_MEMORY = 1280

# TCG, with AMD SVM and nested paging.  XSAVE off: QEMU's nested SVM mixes up the
# extended state of dom0's processes once a guest runs.
QEMU_CPU = "max,-xsave"

GUEST = "guest"
_CONSOLE_LOG = f"/var/log/xen/console/guest-{GUEST}.log"

# What no healthy kernel prints.
_TROUBLE = ("invalid opcode|Oops|BUG:|kernel BUG|WARNING:|general protection|int3:|Kernel panic|"
            "unable to handle|soft lockup|ftrace bug|detected stalls|self-detected stall")

# What a failure shows of dom0, and how many lines of each log.
_DOM0_LOOKS = [
    ("domains", "xl list"),
    ("the watcher", f"ps | grep '[i]nstaller'; tail -n 30 /run/apply.log /run/apply.log.err"),
    ("installer status", "timeout 10 installer status"),
    ("the guest's console, as dom0 has it", f"tail -c 4000 {_CONSOLE_LOG}"),
    ("dom0's kernel", "dmesg | tail -n 10"),
]
_SHOWN = 40


def guest_config(vcpus, altp2m, direct=None, on_reboot="preserve"):
    """The guest's xl.cfg; `direct` is its command line if Xen loads the kernel itself.

    altp2m=external: the interface is the toolstack's, the guest cannot call it.
    tsc_mode=native: an intercepted RDTSCP is reported as RDTSC by QEMU's SVM.
    cpus: not the first.  QEMU (10.0, cpu_clear_ignne) has every processor that loads FPU state rewrite
    the *first* one's flags, unlocked; a VMRUN there at that moment loses "nested paging is on", and its
    guest then runs on memory that is not its own: a triple fault.
    """
    lines = [f'name = "{GUEST}"', 'type = "pvh"', 'kernel = "/guest/kernel"', "memory = 256",
             f"vcpus = {vcpus}", f'cpus = "1-{vcpus}"', 'tsc_mode = "native"', 'on_crash = "preserve"',
             f'on_reboot = "{on_reboot}"']
    if direct is not None:
        lines += ['ramdisk = "/guest/initrd"', f'cmdline = "{direct}"']
    if altp2m:
        lines.append('altp2m = "external"')
    return "\n".join(lines) + "\n"


class _ConsoleLine:
    """The guest's console, through dom0.

    What is written is sent together with the next read: one request to dom0 for both.
    """

    def __init__(self, dom0):
        self.dom0 = dom0
        self.seen = 0
        self.pty = None
        self.log = b""
        self.held = ""
        self.asked = time.monotonic()

    def write(self, data):
        self.held += data.decode().replace("\n", "\\n")

    def read(self, seconds, marker=None):
        send = f"printf '{self.held}' > {self.pty}; " if self.held else ""
        self.held = ""
        wait = f"{self.seen} {int(seconds * 1000)}" + (f" '{marker}'" if marker else "")
        rc, out = self.dom0.run(f"{send}agent tail {_CONSOLE_LOG} {wait} > /run/console.part; "
                                "wc -c < /run/console.part; cat /run/console.part")
        count, _, text = out.partition("\n")
        if rc or not count.strip().isdigit():
            raise LabError(f"cannot use the guest's console from dom0: {out}")
        # The count is dom0's: what is not UTF-8 changes its length on the way here.
        self.seen += int(count)
        data = text.encode()
        self.log += data
        return data

    def lost(self):
        """Why nothing more will come, or None."""
        if b"Kernel panic" in self.log:
            return "kernel panic"
        if time.monotonic() < self.asked + 5:
            return None
        self.asked = time.monotonic()
        rc, out = self.dom0.run(f"xl list {GUEST}", 30)
        if rc:
            return "Xen has no such domain"
        # Name, ID, Mem, VCPUs, State, Time: the state's letters are in the order `rbpscd`.
        state = out.split()[-2]
        return f"its domain's state is {state}" if set(state) & set("scd") else None


class Guest:
    """The one guest of the lab."""

    def __init__(self, lab):
        self.lab = lab
        self.line = _ConsoleLine(lab.dom0)
        self.agent = Agent("guest", self.line)

    def start(self, timeout=300):
        """Creates the guest and waits until its agent answers."""
        rc, out = self.lab.dom0.run("xl create /guest/guest.cfg", timeout)
        if rc:
            raise LabError(f"xl create failed: {out}")
        self.attach(timeout)

    def attach(self, timeout=300):
        """Waits until the agent of a guest that was just created answers."""
        deadline = until(timeout)
        while True:
            rc, out = self.lab.dom0.run(f"xenstore-read /local/domain/$(xl domid {GUEST})/console/tty")
            if rc == 0 and out.strip().startswith("/dev/"):
                break
            if time.monotonic() > deadline:
                raise LabError(f"the guest has no console: {out}")
            time.sleep(0.2)
        self.line.pty = out.strip()
        while b"~READY" not in self.line.log:
            self.line.read(2, "~READY")
            if time.monotonic() > deadline:
                raise LabError(f"the guest did not boot in {timeout} s; its console so far:\n"
                               + self.console()[-3000:])
        self.agent.wait_ready(60)

    def successor(self):
        """The guest that takes this one's place after a reboot: its console goes on where this one's ends."""
        self.line.read(0)
        after = Guest(self.lab)
        after.line.seen = self.line.seen
        self.lab.guest = after
        return after

    def domid(self):
        """The guest's number."""
        rc, out = self.lab.dom0.run(f"xl domid {GUEST}")
        if rc:
            raise LabError(f"no guest: {out}")
        return int(out)

    def run(self, command, timeout=120):
        """Runs a shell command in the guest as root."""
        return self.agent.run(command, timeout)

    def console(self):
        """The guest's console so far, without the agent's own lines."""
        self.line.read(0)
        text = self.line.log.decode(errors="replace")
        return "\n".join(l for l in text.splitlines() if not l.startswith("~") and l.strip())

    def trouble(self):
        """Lines of the guest's kernel log that a healthy kernel does not print."""
        return self.run(f"dmesg | grep -E '{_TROUBLE}'").out.splitlines()


class Lab:
    """A booted Xen with dom0; the guest starts with `guest.start()`."""

    # Booted and not yet closed.
    alive = []

    def __init__(self, machine):
        self.machine = machine
        self.dom0 = Agent("dom0", machine.line)
        self.guest = Guest(self)
        Lab.alive.append(self)

    @classmethod
    def boot(cls, xen, extra=(), guest_extra=(), vcpus=2, guest_append="", name="lab",
             altp2m=True, kaslr=False, on_reboot="preserve", timeout=300, guest_kernel=None, qemu=()):
        """Boots `xen` with dom0.

        `extra` and `guest_extra` are (path, content, mode) for the file systems of dom0
        and the guest; `guest_append` goes to the guest kernel's command line; an
        unpatched Xen refuses guests with `altp2m` on this processor.  With `kaslr` GRUB
        starts the kernel (see grub.py), else Xen does, and it runs where it was linked.
        The guest's kernel is `guest_kernel`, else the cloud kernel.  `qemu` are more options of QEMU.
        """
        guest_kernel, dom0_kernel = guest_kernel or kernel.cloud(), kernel.amd64()
        work = TARGET / "run" / name
        work.mkdir(parents=True, exist_ok=True)
        guest_initrd = initramfs.guest(work / "guest.cpio", guest_extra, which=guest_kernel)
        # No watchdogs: on a busy machine the emulator stops vCPUs for longer than they allow.
        command_line = ("console=hvc0 panic=-1 agent=hvc0 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 "
                        + guest_append).strip()
        if kaslr:
            image = grub.image(work / "guest.grub", guest_kernel.vmlinuz, guest_initrd, command_line)
            files = [("guest/kernel", image, 0o644),
                     ("guest/guest.cfg", guest_config(vcpus, altp2m, on_reboot=on_reboot), 0o644)]
        else:
            files = [("guest/kernel", guest_kernel.vmlinuz, 0o644),
                     ("guest/initrd", guest_initrd, 0o644),
                     ("guest/guest.cfg", guest_config(vcpus, altp2m, command_line, on_reboot), 0o644)]
        dom0_initrd = initramfs.dom0(work / "dom0.cpio", [*files, *extra])
        # QEMU takes commas in a module's arguments as the next module.
        modules = f"{dom0_kernel.vmlinux} console=hvc0 panic=-1,{dom0_initrd}"
        append = (f"console=com1 com1=115200,8n1 altp2m=1 loglvl=info guest_loglvl=info noreboot "
                  f"dom0_mem={DOM0_MEMORY}M,max:{DOM0_MEMORY}M dom0_max_vcpus=1 dom0_vcpus_pin")
        # A physical CPU for each of the guest's, and the first for dom0 (see guest_config).
        machine = Machine([*qemu, "-cpu", QEMU_CPU, "-kernel", xen, "-append", append, "-initrd", modules],
                          work / "console.log", memory=MEMORY, cpus=vcpus + 1)
        lab = cls(machine)
        try:
            lab.dom0.wait_ready(timeout)
        except BaseException:
            lab.close()
            raise
        return lab

    def xen_trouble(self):
        """Lines of the hypervisor's console that tell of a crash or a failed assertion."""
        return [l for l in self.machine.log().splitlines()
                if re.search(r"\(XEN\).*(Assertion|Panic|BUG|WARN|FATAL|Oops)|Kernel panic", l)]

    def diagnosis(self):
        """What dom0, the guest and Xen said last: for whoever reads a failure afterwards."""
        parts = []
        for title, command in _DOM0_LOOKS:
            try:
                parts.append((title, self.dom0.run(command, 20).out))
            except LabError as error:
                # What follows would only wait as long again.
                parts.append((title, str(error)))
                break
        parts += [("the guest's console", self.guest.line.log.decode(errors="replace")[-6000:]),
                  ("Xen's log", self.machine.log()[-6000:])]
        return "\n".join(f"--- {title}\n" + "\n".join(_last_lines(text)) for title, text in parts)

    def close(self):
        """Ends the machine."""
        if self in Lab.alive:
            Lab.alive.remove(self)
        self.machine.close()

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        if isinstance(error, Exception):
            error.add_note(self.diagnosis())
        self.close()


def _last_lines(text):
    """The end of a log, without the agents' own lines."""
    lines = [l.rstrip() for l in text.splitlines()]
    return [f"    {l}" for l in lines if l and not l.startswith("~")][-_SHOWN:]


def diagnosis():
    """What all running labs have to say."""
    return "\n".join(lab.diagnosis() for lab in Lab.alive)
