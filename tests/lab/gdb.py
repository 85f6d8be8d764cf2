# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU's gdbstub, as far as the lab needs it: physical memory, breakpoints, registers.

Protocol: GDB manual, "GDB Remote Serial Protocol"; `qemu.PhyMemMode` is QEMU's own (its manual,
"GDB usage").  What is written to code this way is what the processor executes next: QEMU drops
the translations of pages that change.
"""

import socket

from . import LabError

# QEMU's buffer has 4096 characters (gdbstub, MAX_PACKET_LENGTH); two for each byte.
_CHUNK = 1024

# The first 18 registers of the `g` packet for x86-64 (GDB's 64bit-core.xml).
REGISTERS = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
             *(f"r{n}" for n in range(8, 16)), "rip"]


class Gdb:
    """A connection to a stopped machine.  The machine stays stopped when it is closed."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self.rest = b""
        self.ask("qSupported:hwbreak+")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, text):
        """One packet.  For QEMU the next one acknowledges the answer to the last."""
        data = text.encode()
        self.socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xff))

    def receive(self):
        """The next packet of the other side."""
        while True:
            begin = self.rest.find(b"$")
            end = self.rest.find(b"#", begin)
            if begin >= 0 and end >= 0 and len(self.rest) >= end + 3:
                packet, self.rest = self.rest[begin + 1:end], self.rest[end + 3:]
                return packet.decode()
            data = self.socket.recv(65536)
            if not data:
                raise LabError("QEMU closed its gdbstub")
            self.rest += data

    def ask(self, text, expect=None):
        """A packet and its answer."""
        self.send(text)
        answer = self.receive()
        if answer.startswith("E") and len(answer) == 3 or expect is not None and answer != expect:
            raise LabError(f"QEMU's gdbstub answers {answer!r} to {text[:40]!r}")
        return answer

    def write_physical(self, at, data):
        """Writes to guest-physical memory."""
        self.ask("Qqemu.PhyMemMode:1", "OK")
        for offset in range(0, len(data), _CHUNK):
            part = data[offset:offset + _CHUNK]
            self.ask(f"M{at + offset:x},{len(part):x}:{part.hex()}", "OK")
        self.ask("Qqemu.PhyMemMode:0", "OK")

    def read(self, at, length):
        """Reads by virtual address, as the processor's page tables have it."""
        return bytes.fromhex(self.ask(f"m{at:x},{length:x}"))

    def registers(self):
        """General registers and rip, by name."""
        data = bytes.fromhex(self.ask("g")[:len(REGISTERS) * 16])
        return {name: int.from_bytes(data[n * 8:n * 8 + 8], "little") for n, name in enumerate(REGISTERS)}

    def kernel_gs_base(self):
        """MSR KERNEL_GS_BASE: in user mode, where the kernel's per-CPU data are (GDB's 64bit-core.xml,
        as QEMU extends it)."""
        return int.from_bytes(bytes.fromhex(self.ask("p1a")), "little")

    def breakpoint(self, at):
        """Stops before the instruction at `at` is executed.  Memory is not changed."""
        self.ask(f"Z1,{at:x},1", "OK")

    def no_breakpoint(self, at):
        """Takes it away again."""
        self.ask(f"z1,{at:x},1", "OK")
