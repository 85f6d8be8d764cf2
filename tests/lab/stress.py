# SPDX-License-Identifier: MIT OR Apache-2.0
"""stress-ng in a guest: a mix of what kernels do, each for a number of operations or, at most, a time.

stress-ng is Debian's package, unpacked, with the libraries that it names.
"""

import re

from . import LabError, packages

# Stressors with their operations, in groups that run together: more at once than processors, so that
# all are also preempted.
GROUPS = {
    "files": {
        "access": 4, "chmod": 8, "chown": 20, "copy-file": 2, "dentry": 200, "dir": 40, "dup": 5,
        "fallocate": 4, "fcntl": 40, "file-ioctl": 10, "flock": 100, "fstat": 10, "getdent": 10, "hdd": 4,
        "inotify": 2, "lease": 20, "locka": 50, "lockf": 50, "mknod": 2, "open": 100, "rename": 50,
        "seek": 50, "utime": 100,
    },
    "messages": {
        "epoll": 50, "eventfd": 200, "fifo": 100, "msg": 200, "mq": 200, "pipe": 500, "poll": 50,
        "sem-sysv": 100, "sendfile": 5, "shm": 1, "shm-sysv": 1, "sock": 5, "sockfd": 50, "sockpair": 50,
        "splice": 50, "tee": 20, "udp": 50, "vm-splice": 20,
    },
    "processes": {
        "clone": 4, "context": 20, "exit-group": 2, "fork": 20, "get": 10, "getrandom": 20, "kcmp": 20,
        "membarrier": 10, "nice": 1, "personality": 5, "pidfd": 20, "prctl": 2, "pthread": 4,
        "ptrace": 20, "rlimit": 2, "schedpolicy": 20, "seccomp": 5, "session": 5, "unshare": 3,
        "vfork": 50, "wait": 20, "zombie": 10,
    },
    # These refuse to run as root.
    "exec": {"exec": 2, "spawn": 2},
    "memory": {
        "mincore": 2, "mlock": 1, "mmapfork": 1, "mprotect": 20, "munmap": 2, "remap": 1,
        "userfaultfd": 20, "vm-rw": 1,
    },
    "time and signals": {
        "alarm": 1, "clock": 10, "futex": 100, "hrtimers": 50, "itimer": 50, "kill": 100, "nanosleep": 5,
        "sigabrt": 5, "sigchld": 20, "sigfd": 50, "sigfpe": 20, "signest": 10, "sigpending": 50,
        "sigpipe": 20, "sigq": 50, "sigrt": 20, "sigsegv": 20, "sigsuspend": 20, "sigtrap": 20,
        "timer": 50, "timerfd": 50,
    },
    "the rest": {
        "aio": 20, "bad-altstack": 10, "cap": 5, "fanotify": 2, "handle": 10, "key": 1, "landlock": 2,
        "procfs": 20, "null": 50, "sysinfo": 20, "usersyscall": 10,
        "vdso": 50, "zero": 20,
    },
}
_UNPRIVILEGED = {"exec"}
# At most so long; the others are done long before.
_SECONDS = {"exec": 8, "memory": 40}

_PROGRAM = "usr/bin/stress-ng"
_METRIC = re.compile(r"^ +- stressor: (\S+)\n +bogo-ops: (\d+)", re.M)


def files():
    """What the guest's initramfs needs besides (`extra`); its libraries are `packages.STRESS`."""
    return [(_PROGRAM, packages.unpacked("stress-ng") / _PROGRAM, 0o755)]


def run(guest, group, seconds=30):
    """Runs one group; fails unless each of its stressors did something, and found nothing wrong.
    Returns how many operations all of them did."""
    stressors, seconds = GROUPS[group], _SECONDS.get(group, seconds)
    words = " ".join(f"--{name} 1 --{name}-ops {ops}" for name, ops in stressors.items())
    work = (f"cd /tmp/stress && /{_PROGRAM} --verify --metrics --yaml did.yaml --timeout {seconds} "
            f"--temp-path . {words}")
    if group in _UNPRIVILEGED:
        work = f"chown user /tmp/stress && su user -c '{work}'"
    rc, out = guest.run(f"rm -rf /tmp/stress; mkdir /tmp/stress; {work}", seconds + 120)
    did = dict(_METRIC.findall(guest.run("cat /tmp/stress/did.yaml").out))
    idle = [name for name in stressors if not int(did.get(name, 0))]
    if rc or idle:
        complaints = [line for line in out.splitlines() if re.search(r": (fail|error|warn): ", line)]
        raise LabError("\n".join([f"stress-ng, {group}: ended with {rc}; did nothing: "
                                  f"{', '.join(idle) or 'none'}", *(complaints or [out[-2000:]])]))
    return sum(map(int, did.values()))
