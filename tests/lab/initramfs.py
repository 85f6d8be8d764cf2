# SPDX-License-Identifier: MIT OR Apache-2.0
"""What dom0 and the guest find in their root file systems.

Both are an initramfs with a static busybox and the agent.  dom0 has also Xen's
tools with the libraries they name, and whatever the caller adds (installer,
bundle, policy, keys); the guest has the test programs and the module.
"""

import re
import subprocess
from pathlib import Path

from . import LabError, kernel, packages, programs
from .cpio import Archive

XEN_TOOLS = ["xl", "xenstored", "xenconsoled", "xen-init-dom0"]
# Where libxl looks for its own programs.
_LIBEXEC = "usr/lib/xen-4.17/bin"

_COMMON_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm /run /tmp /root
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp
"""

_GUEST_INIT = _COMMON_INIT + """\
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
echo 0 > /proc/sys/kernel/kptr_restrict
line=hvc0
for word in $(cat /proc/cmdline); do
    case $word in agent=*) line=${word#agent=} ;; esac
done
/usr/bin/agent serve /dev/$line
poweroff -f
"""

_DOM0_INIT = _COMMON_INIT + """\
for module in @MODULES@; do insmod /lib/modules/$module.ko; done
mount -t xenfs xenfs /proc/xen
mkdir -p /var/run/xen /var/run/xenstored /run/xen /run/xenstored /run/lock /var/lib/xen /var/lib/xenstored
xenstored --pid-file /run/xenstored.pid
xen-init-dom0
xenconsoled --log=guest --pid-file=/run/xenconsoled.pid
/usr/bin/agent serve /dev/ttyS1
poweroff -f
"""

_PASSWD = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n"
_GROUP = "root:x:0:\nuser:x:1000:\n"


def _base():
    archive = Archive()
    for folder in ("proc", "sys", "dev", "tmp", "run", "root", "usr/bin", "usr/sbin", "sbin", "etc",
                   "var/log/xen/console", "lib/modules"):
        archive.folder(folder)
    # The kernel opens these before devtmpfs is there.
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3)
    archive.file("bin/busybox", programs.busybox(), 0o755)
    archive.file("usr/bin/agent", programs.program("agent"), 0o755)
    archive.file("etc/passwd", _PASSWD)
    archive.file("etc/group", _GROUP)
    return archive


def guest(path, extra=(), libraries=(), which=None):
    """Writes the guest's initramfs; `extra` are (path, content, mode).  The guest's own programs need no
    libraries; if `libraries` names packages, executables among `extra` get those that they name.  The module
    is for the kernel `which`, else for the cloud kernel."""
    archive = _base()
    archive.file("init", _GUEST_INIT, 0o755)
    # One program under two paths: only the path tells the policy which is which.
    for name in ("payroll", "guestbook"):
        archive.file(f"usr/bin/{name}", programs.program("worker"), 0o755)
    archive.file("usr/bin/load", programs.program("load"), 0o755)
    archive.file("usr/bin/hold", programs.program("hold"), 0o755)
    archive.file("lib/modules/penumbra_bug.ko", programs.module(which=which))
    binaries = []
    for name, content, mode in extra:
        archive.file(name, content, mode)
        if libraries and isinstance(content, Path) and name.startswith("usr/bin/"):
            binaries.append(content)
    if binaries:
        _add_libraries(archive, binaries, libraries)
    archive.write(path)
    return path


def _needed(binary):
    """The shared libraries that a dynamic executable names."""
    done = subprocess.run(["readelf", "-dW", binary], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)


def _library_index(names):
    """Library files by name: those of the packages `names`, unpacked, the rest from this machine."""
    index = {}
    folders = [Path("/lib/x86_64-linux-gnu"), Path("/usr/lib/x86_64-linux-gnu")]
    for package in names:
        tree = packages.unpacked(package)
        folders += [tree / "usr/lib/x86_64-linux-gnu", tree / "lib/x86_64-linux-gnu"]
    for folder in folders:
        if folder.is_dir():
            for file in folder.iterdir():
                if ".so" in file.name:
                    index[file.name] = file.resolve()
    return index


def _add_libraries(archive, binaries, names):
    index = _library_index(names)
    # glibc loads libgcc_s by itself when a thread is cancelled (xenstored, xenconsoled).
    wanted = ["libgcc_s.so.1", "ld-linux-x86-64.so.2"]
    for binary in binaries:
        wanted += _needed(binary)
    done = set()
    while wanted:
        name = wanted.pop()
        if name in done:
            continue
        done.add(name)
        if name not in index:
            raise LabError(f"no shared library {name}; is a package missing among {' '.join(names)}?")
        archive.file(f"lib/x86_64-linux-gnu/{name}", index[name], 0o755)
        wanted += _needed(index[name])
    archive.link("lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")


def dom0(path, extra=()):
    """Writes dom0's initramfs; `extra` are (path, content, mode), executables among them
    (paths in usr/bin) get the libraries they name."""
    tools = packages.unpacked("xen-utils-4.17") / _LIBEXEC
    store = packages.unpacked("xenstore-utils") / "usr/bin"
    archive = _base()
    binaries = [tools / name for name in XEN_TOOLS] + [store / "xenstore-read"]
    for binary in binaries:
        archive.file(f"usr/sbin/{binary.name}", binary, 0o755)
    # `xl save` and `xl restore` run it.
    helper = tools / "libxl-save-helper"
    archive.folder(_LIBEXEC)
    archive.file(f"{_LIBEXEC}/{helper.name}", helper, 0o755)
    binaries.append(helper)
    names = []
    for name in kernel.DOM0_MODULES:
        archive.file(f"lib/modules/{name}.ko", kernel.amd64().module(name))
        names.append(name)
    archive.file("init", _DOM0_INIT.replace("@MODULES@", " ".join(names)), 0o755)
    archive.file("etc/xen/xl.conf", "autoballoon=\"off\"\n")
    for name, content, mode in extra:
        archive.file(name, content, mode)
        if isinstance(content, Path) and name.startswith("usr/bin/"):
            binaries.append(content)
    _add_libraries(archive, binaries, packages.XEN_DOM0[1:])
    archive.write(path)
    return path
