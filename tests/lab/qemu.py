# SPDX-License-Identifier: MIT OR Apache-2.0
"""One QEMU process: its command line, its consoles, its monitor, its end.

The process is ended by its own process id, and by the kernel if Python dies first
(PR_SET_PDEATHSIG): no test run leaves an emulator behind.
"""

import ctypes
import json
import re
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

from . import PATIENCE, LabError, until

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent():
    """For `preexec_fn`: the kernel ends the process when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def emulator_fault(console):
    """What QEMU's nested SVM did wrong, by Xen's log in the file `console`, or None.

    Seen with 10.0, with nothing of Penumbra applied too, while guests ran on the first processor
    (see `guest_config`).  Both end the guest by a triple fault, from both nothing can be learned,
    and no guest, view or Xen can cause them:

    - Xen's own state stored as the guest's: its code segment e008, its instruction pointer.
    - Page faults where pages are there.  Delivering an exception reads the IDT; CR2 says that
      this read faulted, while the page tables that Xen reads at that moment (series-lab/0003)
      have the page.
    """
    log = Path(console).read_bytes().decode(errors="replace")
    if "Triple fault" not in log:
        return None
    if re.search(r"RIP: +e008:\[<ffff82d0[0-9a-f]+>\][^\n]*\n[^\n]*CONTEXT: hvm guest", log):
        return "Xen's own state was stored as the guest's"
    cr2, idt = re.search(r"CR2 = 0x(\w+)", log), re.search(r"IDTR: \w+ \w+ \w+ (\w+)", log)
    entries = re.findall(r"CR2: level (\d): .* entry\[\d+\] (\w+)", log)
    if cr2 and idt and entries and 0 <= int(cr2[1], 16) - int(idt[1], 16) < 0x1000 \
            and entries[-1][0] == "0" and all(int(entry, 16) & 1 for _, entry in entries):
        return "the guest's IDT is mapped, and reading it page-faulted"
    return None


class SocketLine:
    """A serial port of the machine as a `Line` (see agent.py)."""

    def __init__(self, sock):
        self.sock = sock

    def write(self, data):
        """Sends; an emulated port takes 16 bytes at a time, QEMU holds back the rest."""
        self.sock.sendall(data)

    def read(self, seconds, _marker=None):
        """What arrives within `seconds`, or nothing."""
        ready, _, _ = select.select([self.sock], [], [], seconds)
        if not ready:
            return b""
        data = self.sock.recv(65536)
        if not data:
            raise LabError("QEMU ended")
        return data


class Machine:
    """A running QEMU.

    com1 goes to the file `console`; com2 is `self.line`.  `args` are added to the
    common part of the command line.
    """

    # The consoles of all that this process has run.
    consoles = []

    def __init__(self, args, console, memory=1024, cpus=2):
        self.console = Path(console)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        self.console.write_bytes(b"")
        Machine.consoles.append(self.console)
        com2, com2_far = socket.socketpair()
        qmp, qmp_far = socket.socketpair()
        for far in (com2_far, qmp_far):
            far.set_inheritable(True)
        argv = ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config",
                "-display", "none", "-no-reboot", "-m", str(memory), "-smp", str(cpus),
                "-serial", f"file:{self.console}",
                "-chardev", f"socket,id=com2,fd={com2_far.fileno()}", "-serial", "chardev:com2",
                "-chardev", f"socket,id=qmp,fd={qmp_far.fileno()}",
                "-mon", "chardev=qmp,mode=control", *map(str, args)]
        self.errors = self.console.with_suffix(".qemu")
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                pass_fds=(com2_far.fileno(), qmp_far.fileno()), preexec_fn=die_with_parent,
                # Ctrl-C is for the script, which then ends QEMU.
                start_new_session=True)
        com2_far.close()
        qmp_far.close()
        self.line = SocketLine(com2)
        self._qmp = qmp.makefile("rw", encoding="utf-8", newline="\n")
        self._qmp_socket = qmp
        try:
            self._qmp_socket.settimeout(60)
            self._qmp.readline()
            self.qmp("qmp_capabilities")
        except (OSError, LabError, ValueError) as error:
            self.close()
            raise LabError(f"QEMU did not start: {error}; it said: {self.errors.read_text()}") from error

    def qmp(self, command, **arguments):
        """One monitor command (QEMU Machine Protocol); returns its result."""
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            text = self._qmp.readline()
            if not text:
                raise LabError(f"QEMU ended during {command}: {self.errors.read_text()}")
            reply = json.loads(text)
            if "error" in reply:
                raise LabError(f"QEMU refuses {command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def monitor(self, line):
        """One command of the human monitor; returns its text."""
        return self.qmp("human-monitor-command", **{"command-line": line})

    def log(self):
        """What the first serial port has printed so far."""
        return self.console.read_bytes().decode(errors="replace")

    def wait_for(self, marker, timeout):
        """Waits until `marker` is in the console log."""
        deadline = until(timeout)
        while marker not in self.log():
            if self.process.poll() is not None:
                raise LabError(f"QEMU ended before `{marker}`; console: {self.console}")
            if time.monotonic() > deadline:
                raise LabError(f"no `{marker}` in {timeout} s; console: {self.console}")
            time.sleep(0.1)

    def wait_off(self, timeout):
        """Waits for the machine to switch itself off; True if it did."""
        try:
            self.process.wait(timeout * PATIENCE)
            return True
        except subprocess.TimeoutExpired:
            return False

    def close(self):
        """Ends QEMU, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._qmp_socket.close()
        self.line.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
