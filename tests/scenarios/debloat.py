# SPDX-License-Identifier: MIT OR Apache-2.0
"""A profile is recorded from a running guest, and its kernel then does what is in it and nothing else."""

import json
from contextlib import contextmanager

from lab import TARGET, chain, filled, kernel, programs, recorder
from lab.victim import Worker

from . import expect, scenario

FOLDER = TARGET / "run" / "debloat"

# What the workload is, beside the demo's worker; the guest's log is read by the scenarios.
COMMANDS = ["/usr/bin/bench 1", "dmesg | grep -c .", "cat /tmp/payroll*.log | tail -1", "kill -0 1"]


class World:
    """One boot; the profile of it, and bundles that it makes."""

    def __init__(self, guest):
        self.guest = guest
        self.symbols = recorder.Symbols(chain.emit(FOLDER / "symbols.bundle"))

    def record(self):
        """The workload's profile, an oops among it."""
        with recorder.Recorder(self.guest, self.symbols) as recorded:
            self.works(".recorded")
            recorded.oops()
        self.profile = recorded.lines()
        (FOLDER / "work.profile").write_text("".join(f"{line}\n" for line in self.profile))
        expect(self.guest.new_trouble(), "the oops is not in the log")

    def works(self, tag):
        """The workload."""
        worker = Worker(self.guest, "payroll", 0, tag)
        for command in COMMANDS:
            rc, out = self.guest.run(command, 600)
            expect(rc == 0, command, rc, out)
        worker.lives()
        self.guest.run(f"kill {worker.pid}")

    def emit(self, name, parameters):
        """A bundle whose recipe names the profile."""
        recipe = FOLDER / f"{name}.toml"
        recipe.write_text(f'schema = 1\n[pass.debloat]\nprofile = "work.profile"\n{parameters}')
        return chain.emit(FOLDER / f"{name}.bundle", recipe=recipe)

    def leave(self, how):
        """What the program said that leaves the profile, and what the kernel then said."""
        return self.guest.try_out(f"/usr/bin/leave {how}")


@contextmanager
def world():
    """A guest without Xen."""
    chain.build_tools()
    FOLDER.mkdir(parents=True, exist_ok=True)
    extra = [(f"usr/bin/{name}", programs.program(name), 0o755) for name in ("bench", "leave")]
    with filled.Guest("debloat", extra=extra) as guest:
        yield World(guest)


@scenario
def a_run_is_recorded(w):
    """The profile has what ran and nothing else, and its bundle is proved to stop all else."""
    w.record()
    for name in ("do_syscall_64", "pipe_read", "do_exit", "oops_end", "hrtimer_interrupt"):
        expect(name in w.profile, name)
    for name in ("__x64_sys_mq_open", "write_full", "tcp_v4_connect"):
        expect(name not in w.profile, name)
    w.bundle = w.emit("kill", 'widen = "calls"\n')
    chain.run([chain.tool("hardener"), "check", w.bundle, "--image", kernel.cloud().vmlinuz])
    said = json.loads(chain.run([chain.tool("hardener"), "inspect", w.bundle, "--json"]))["debloat"]
    expect(said["functions-in-profile"] == len(w.profile), said, len(w.profile))
    expect(said["functions-outside"] > 20_000 and said["bytes-outside"] > said["bytes-inside"], said)


@scenario
def what_was_recorded_goes_on(w):
    """The same work, for all processes, interrupts and the kernel's own threads."""
    expect(w.guest.put(w.bundle, "hardened") > 1000)
    w.works(".again")
    trouble = w.guest.new_trouble()
    expect(not trouble, trouble)


@scenario
def a_system_call_outside_is_stopped(w):
    """A task that makes a system call which the profile lacks is ended where the kernel's table of them is left; others
    go on."""
    said, trouble = w.leave("call")
    expect(said == "" and any("invalid opcode" in line for line in trouble), said, trouble)
    w.works(".beside")
    w.guest.explained()


@scenario
def what_is_reached_by_address_goes_on(w):
    """Indirect branches are forward-cfi's: without `targets` they may leave the profile."""
    said, trouble = w.leave("branch")
    expect(said == "done" and not trouble, said, trouble)


@scenario
def logged_it_goes_on(w):
    """With `log` nothing is stopped."""
    bundle = w.emit("log", 'on-violation = "log"\n')
    w.guest.put(None, None)
    w.guest.put(bundle, "hardened")
    said, trouble = w.leave("call")
    expect(said == "done" and not trouble, said, trouble)
    w.works(".logged")
