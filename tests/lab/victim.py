# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the scenarios do inside the guest: workers, attacks, text pokes.

All of it is tests/guest/worker.c under its two names and plain shell.
"""

import re
import time
from dataclasses import dataclass

from . import LabError, until

_LINE = re.compile(r"^(\w+) pid (\d+) partner (\d+) rounds (\d+) checks (\d+) switches (\d+)", re.M)

# A function whose every call an open, stat or exec makes: its ftrace site is hot.
TRACED = "vfs_statx"


@dataclass
class Progress:
    """A worker's newest line."""

    pid: int
    partner: int
    rounds: int
    checks: int
    switches: int


# How many times as long as a round took workers rest after it, where only their being there matters: they share the
# machine's processors with dom0, which is what is waited for.
REST = 20


class _Running:
    """A program in the guest that prints its progress into a log."""

    def __init__(self, guest, program, command, log):
        self.guest = guest
        self.program = program
        self.log = log
        guest.run(f"{command} > {log} 2>&1 &")
        self.pid = self.wait_past(0).pid

    def text(self):
        """Its last lines."""
        return self.guest.run(f"tail -n 3 {self.log}").out

    def progress(self):
        """Its newest line; an error if it failed or is gone."""
        out = self.text()
        if "FAILED" in out:
            raise LabError(f"{self.program} got a wrong result: {out}")
        lines = _LINE.findall(out)
        if not lines:
            return None
        return Progress(*map(int, lines[-1][1:]))

    def wait_past(self, rounds, timeout=90):
        """Waits until it has done more than `rounds` rounds."""
        deadline = until(timeout)
        while True:
            now = self.progress()
            if now and now.rounds > rounds:
                return now
            if time.monotonic() > deadline:
                raise LabError(f"{self.program} does not get past round {rounds}: {self.text()}")
            time.sleep(0.5)

    def lives(self):
        """Does it still make progress, without a wrong result?"""
        self.wait_past(self.progress().rounds)
        return True


class Worker(_Running):
    """One running copy of the worker; after a round it rests so many times as long as it took."""

    def __init__(self, guest, program, cpu, tag="", rest=0):
        super().__init__(guest, program, f"/usr/bin/{program} work {cpu} 0 {rest}", f"/tmp/{program}{tag}.log")


class Load(_Running):
    """One kind of load (see tests/guest/load/load.c)."""

    KINDS = ["file", "pipe", "unix", "tcp", "exec", "memory", "signal", "thread", "module"]

    def __init__(self, guest, kind):
        super().__init__(guest, kind, f"/usr/bin/load {kind}", f"/tmp/load.{kind}.log")


class Hand:
    """A copy of the worker that writes files when told to: the kernel does it on that program's view."""

    def __init__(self, guest, program):
        self.guest = guest
        self.fifo, self.log = f"/tmp/{program}.hand", f"/tmp/{program}.hand.log"
        guest.run(f"mkfifo {self.fifo}; /usr/bin/{program} hand {self.fifo} > {self.log} 2>&1 &")
        self.pid = int(_wait(guest, self.log, r"hand: pid (\d+)", 60)[1])
        self.written = 0

    def write(self, file, text, timeout=60):
        """Writes a line; the errno, 0 if it went well."""
        self.written += 1
        self.guest.run(f"echo '{file} {text}' > {self.fifo}")
        return int(_wait(self.guest, self.log, rf"(?:hand: \d+\s+){{{self.written}}}$", timeout)[0].split()[-1])


def prepare_attacks(guest):
    """Loads the module and collects the addresses; done once per boot."""
    for command in ("insmod /lib/modules/penumbra_bug.ko", "payroll prepare /tmp/addresses"):
        rc, out = guest.run(command)
        if rc:
            raise LabError(f"`{command}` in the guest: {out}")


def hold(guest, address):
    """A process that sleeps with this word on its kernel stack; its pid."""
    log = f"/tmp/hold.{address:x}"
    guest.run(f"/usr/bin/hold {address:#x} > {log} 2>&1 &")
    return int(_wait(guest, log, r"holds \w+, pid (\d+)", 60)[1])


@dataclass
class Attack:
    """How an attack ended."""

    outcome: str  # "ran", "caught", or what else happened
    pid: int
    oops: list    # the kernel's lines about it


def attack(guest, program, kind, before=lambda pid: None, during=None, timeout=60):
    """Attacks from `program`; `before(pid)` is called when the attacker stands ready, and
    `during(cpu)` when it waits for an interrupt on the guest's CPU of that number.

    ran: the process became root.  caught: the kernel killed the process, with an invalid
    opcode as its reason, and the process did not become root before.
    """
    tag = f"{program}.{kind}.{time.monotonic_ns()}"
    log, go = f"/tmp/attack.{tag}", f"/tmp/go.{tag}"
    guest.run(f"(/usr/bin/{program} attack {kind} /tmp/addresses {go} > {log} 2>&1; "
              f"echo ended $? >> {log}) > /dev/null 2>&1 &")
    ready = _wait(guest, log, rf"attack {kind}: ready, pid (\d+)|ended|cannot", timeout)
    if not ready[1]:
        raise LabError(f"the attack did not get ready: {ready.string}")
    pid = int(ready[1])
    before(pid)
    mark = f"attack.{tag}"
    guest.run(f"echo {mark} > /dev/kmsg; touch {go}")
    if during:
        during(int(_wait(guest, log, r"waits on CPU (\d+)", timeout)[1]))
    end = _wait(guest, log, r"ran, uid 1000 became 0|no effect|cannot.*|ended \d+", timeout)[0]
    oops = guest.run(f"dmesg | sed -n '/{mark}/,$p'").out.splitlines()[1:]
    if end.startswith("ran"):
        outcome = "ran"
    elif end.startswith("ended") and any("invalid opcode" in line for line in oops) \
            and any(re.search(rf"PID: {pid}\b", line) for line in oops):
        outcome = "caught"
    else:
        outcome = end
    return Attack(outcome, pid, oops)


def _wait(guest, log, pattern, timeout):
    deadline = until(timeout)
    while True:
        out = guest.run(f"cat {log}").out
        if match := re.search(pattern, out):
            return match
        if time.monotonic() > deadline:
            raise LabError(f"nothing like /{pattern}/ in {log}: {out}")
        time.sleep(0.3)


class Pokes:
    """Switches a jump label and ftrace on one function on and off, until stopped."""

    # schedstats is a static key with sites all over the scheduler.  An oops, such as that of a
    # caught attack, turns tracing off (kernel/panic.c, oops_enter).
    _SCRIPT = f"""\
cd /sys/kernel/tracing
echo 1 > tracing_on
echo {TRACED} > set_ftrace_filter || exit 1
n=0
while :; do
    for k in 1 2 3 4; do
        echo 1 > /proc/sys/kernel/sched_schedstats
        echo 0 > /proc/sys/kernel/sched_schedstats
    done
    echo function > current_tracer || exit 1
    stat / > /dev/null
    grep -q {TRACED} trace && echo hit >> /tmp/pokes.hits
    echo nop > current_tracer || exit 1
    n=$((n+1))
    echo $n > /tmp/pokes.count
    [ -e /tmp/pokes.stop ] && break
done
echo done >> /tmp/pokes.count
"""

    def __init__(self, guest):
        self.guest = guest
        guest.run("rm -f /tmp/pokes.*")
        guest.run(f"cat > /tmp/pokes.sh <<'EOS'\n{self._SCRIPT}EOS\n"
                  "sh /tmp/pokes.sh > /tmp/pokes.err 2>&1 &")

    def rounds(self):
        """Rounds done so far."""
        out = self.guest.run("cat /tmp/pokes.count 2>/dev/null").out.split()
        return int(out[0]) if out else 0

    def stop(self, timeout=120):
        """Ends the loop; returns (rounds, rounds in which the tracer saw the function)."""
        self.guest.run("touch /tmp/pokes.stop")
        _wait(self.guest, "/tmp/pokes.count", "done", timeout)
        rounds = int(self.guest.run("cat /tmp/pokes.count").out.split()[0])
        hits = int(self.guest.run("cat /tmp/pokes.hits 2>/dev/null | wc -l").out)
        return rounds, hits
