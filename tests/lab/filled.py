# SPDX-License-Identifier: MIT OR Apache-2.0
"""A plain Debian guest on any variant's text, without Xen.

The guest runs in QEMU alone, and its kernel's text is replaced in its memory, all of it, by what a
variant's view would show (`installer fill`).  Every process and the kernel itself then run on that
variant.

The text changes while the machine is stopped, whatever its processors were at: instruction boundaries
and return addresses are the same in all variants (design, invariants 1 and 2).  Only a cave must not go
while a task is inside it, so another bundle's text is put in when all processors are idle: a task
that was preempted in a thunk would be running then.
"""

import time
from contextlib import contextmanager

from . import TARGET, LabError, chain, initramfs, kernel, until
from .agent import Agent
from .gdb import Gdb
from .qemu import Machine

# Debian's kernels start their text at 16 MiB, physical and (nokaslr) by link address.
TEXT = 0x1000000
_PAGE = 4096
# MiB.
MEMORY = 512

# What no healthy kernel prints.
_TROUBLE = ("invalid opcode|Oops|BUG:|kernel BUG|WARNING:|general protection|int3:|Kernel panic|"
            "unable to handle|soft lockup|detected stalls|self-detected stall|Penumbra:")


class Guest:
    """One boot of the kernel `which`.  `with Guest(name) as guest: ...`

    `qemu` are more of QEMU's arguments, `append` of the kernel's; `extra` files and `libraries` are
    those of `initramfs.guest`.
    """

    def __init__(self, name, which=None, qemu=("-cpu", "max"), append="", extra=(), libraries=(),
                 memory=MEMORY, cpus=2):
        self.kernel = which or kernel.cloud()
        self.folder = TARGET / "run" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        initrd = initramfs.guest(self.folder / "guest.cpio", extra, libraries)
        self._gdb_path = self.folder / "gdb"
        self._gdb_path.unlink(missing_ok=True)
        self.machine = Machine(
            [*qemu, "-gdb", f"unix:{self._gdb_path},server=on,wait=off", "-kernel", self.kernel.vmlinuz,
             "-initrd", initrd,
             "-append", f"console=ttyS0 panic=-1 agent=ttyS1 nokaslr spectre_v2=retpoline {append}"],
            self.folder / "console.log", memory=memory, cpus=cpus)
        self._bundle = self._variant = None
        # What stands in the text now beyond what the kernel put there: the bytes' difference.
        self._difference = None
        # Lines of trouble that somebody was told of.
        self._told = 0

    def __enter__(self):
        try:
            agent = Agent("guest", self.machine.line)
            agent.wait_ready(300)
            self.run = agent.run
            code = self.run("grep 'Kernel code' /proc/iomem").out.split("-")[0].strip()
            if not code or int(code, 16) != TEXT:
                raise LabError(f"the guest's text is at {code or 'no known place'}, not at {TEXT:#x}")
        except BaseException:
            self.machine.close()
            raise
        return self

    def __exit__(self, *_):
        self.machine.close()

    def gdb(self):
        """QEMU's gdbstub; the machine must be stopped."""
        return Gdb(self._gdb_path)

    def text(self, size):
        """The kernel's text as it is now."""
        self.machine.qmp("stop")
        try:
            return self._dump(size)
        finally:
            self.machine.qmp("cont")

    def _dump(self, size):
        path = self.folder / "text.dump"
        self.machine.qmp("pmemsave", val=TEXT, size=size, filename=str(path))
        return path.read_bytes()

    def _write(self, old, new):
        with self.gdb() as gdb:
            for at in range(0, len(new), _PAGE):
                if old[at:at + _PAGE] != new[at:at + _PAGE]:
                    gdb.write_physical(TEXT + at, new[at:at + _PAGE])

    def _filled(self, bundle, variant, text):
        """The text of `variant` over the kernel's own, and the pages that a view has of its own."""
        own, filled = self.folder / "own.text", self.folder / "filled.text"
        own.write_bytes(text)
        said = chain.run([chain.tool("installer"), "fill", "--bundle", bundle, "--variant", variant,
                          "--text", own, "--output", filled])
        return filled.read_bytes(), int(said.split()[1])

    def _own(self, running):
        """Takes a variant's edits and cave out; what the kernel wrote elsewhere meanwhile stays."""
        return running if self._difference is None else _xor(running, self._difference)

    def _stop(self, idle, timeout=60):
        """Stops the machine; with `idle` at a moment when no processor has anything to do."""
        deadline = until(timeout)
        while True:
            self.machine.qmp("stop")
            if not idle or "HLT=0" not in self.machine.monitor("info registers -a"):
                return
            if time.monotonic() > deadline:
                raise LabError(f"the guest's processors are never idle together in {timeout} s; what still runs?")
            self.machine.qmp("cont")
            time.sleep(0.05)

    def put(self, bundle, variant):
        """The text of `variant` from now on; `None` is the kernel's own.  Returns the number of
        pages that a view would have of its own."""
        if variant is None and self._difference is None:
            return 0
        self._stop(idle=self._bundle not in (None, bundle))
        try:
            size = len(self._difference) if variant is None else (bundle / "text.bin").stat().st_size
            running = self._dump(size)
            own = self._own(running)
            new, pages = (own, 0) if variant is None else self._filled(bundle, variant, own)
            self._write(running, new)
            self._bundle, self._variant = bundle, variant
            self._difference = None if variant is None else _xor(own, new)
            return pages
        finally:
            self.machine.qmp("cont")

    @contextmanager
    def patched(self, at, content):
        """Has other bytes at a guest-physical address, for as long as the context is open."""
        path = self.folder / "patched.dump"

        def swap(new):
            self.machine.qmp("stop")
            try:
                self.machine.qmp("pmemsave", val=at, size=len(new), filename=str(path))
                with self.gdb() as gdb:
                    gdb.write_physical(at, new)
                return path.read_bytes()
            finally:
                self.machine.qmp("cont")

        old = swap(content)
        try:
            yield
        finally:
            swap(old)

    def explained(self):
        """Fails unless the running text, less the variant, is the kernel's own, every byte explained, and
        the variant over it is what runs."""
        self._stop(idle=True)
        try:
            running = self._dump(len(self._difference))
        finally:
            self.machine.qmp("cont")
        if self._filled(self._bundle, self._variant, self._own(running))[0] != running:
            raise LabError(f"the running text is not what `{self._variant}` of {self._bundle} would be now")

    def trouble(self):
        """Lines of the kernel's log that a healthy kernel does not print."""
        return self.run(f"dmesg | grep -E '{_TROUBLE}'").out.splitlines()

    def new_trouble(self):
        """Those that nobody was told of yet."""
        lines = self.trouble()
        new, self._told = lines[self._told:], len(lines)
        return new

    def try_out(self, command):
        """What a command said, and the kernel's new trouble then."""
        said = self.run(command).out.strip()
        return said, self.new_trouble()


def _xor(a, b):
    both = int.from_bytes(a, "little") ^ int.from_bytes(b, "little")
    return both.to_bytes(len(a), "little")
