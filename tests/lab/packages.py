# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian packages: some installed on this machine, others only unpacked.

Kernels, Xen's dom0 tools and kernel headers must not be installed on the
machine that runs the tests, so their packages are downloaded and unpacked
under `target/lab`.  The package sources are the machine's own, with the
backports suite and the source entries added in a private copy of apt's
configuration: the machine's own is never changed.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from contextlib import contextmanager
from pathlib import Path

from . import TARGET, LabError

APT = TARGET / "apt"
DEBS = TARGET / "debs"
TREES = TARGET / "trees"

# What the scripts of this repository run, by package.  A package is installed only if
# dpkg does not know it, so a machine that has them all is left alone (no root needed).
TOOLS = [
    # Rust's installer crate binds libxenctrl through bindgen.
    "libxen-dev", "libclang-dev", "pkg-config",
    # Xen's build.
    "bison", "flex", "libssl-dev", "make", "dpkg-dev", "bc", "gcc", "libc6-dev",
    # libFuzzer, from source.
    "g++",
    # The guest's module: kbuild's objtool links libelf.
    "libelf-dev", "kmod",
    # The initramfs, the compressed payloads that tests make, the signature check.
    "busybox-static", "grub-common", "xz-utils", "zstd", "lz4", "openssl", "binutils",
    "ca-certificates", "git",
    # The Python verifiers that signer is compared with.
    "python3-venv",
]
QEMU = ["qemu-system-x86", "seabios", "ipxe-qemu"]

# dom0's side of Xen.  The last ones are libraries of xen-utils-4.17 that a minimal
# machine has not installed.
XEN_DOM0 = [
    "xen-utils-4.17", "libxenmisc4.17", "libxencall1", "libxendevicemodel1",
    "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1",
    "libxenstore4", "libxentoolcore1", "libxentoollog1", "libyajl2", "libnl-3-200",
    "libnl-route-3-200", "libfdt1",
]

# stress-ng for a guest, and its libraries that a minimal machine has not installed.
STRESS = [
    "stress-ng", "libapparmor1", "libbsd0", "libmd0", "libegl1", "libglvnd0", "libgles2", "libgbm1",
    "libdrm2", "libexpat1", "libwayland-server0", "libffi8", "libipsec-mb1", "libjpeg62-turbo",
    "libjudydebian1", "libkmod2", "libsctp1", "libxxhash0",
]


def _run(argv, **kw):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(map(str, argv))}` failed with {done.returncode}:\n"
                       + "\n".join(done.stdout.splitlines()[-20:]))
    return done.stdout


@contextmanager
def locked(name):
    """One process at a time may fill a part of target/lab."""
    TARGET.mkdir(parents=True, exist_ok=True)
    with open(TARGET / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def release():
    """This Debian's code name, as in /etc/os-release."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=", 1)[1].strip('"')
    raise LabError("no VERSION_CODENAME in /etc/os-release; the lab runs on Debian 12 (bookworm)")


def _deb822_stanzas(text):
    """The stanzas of a deb822 sources file as lists of (field, value), comments dropped."""
    for block in re.split(r"\n\s*\n", text):
        fields = []
        for line in block.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t" and fields:
                fields[-1] = (fields[-1][0], fields[-1][1] + "\n" + line)
            elif ":" in line:
                name, value = line.split(":", 1)
                fields.append((name.strip(), value.strip()))
        if fields:
            yield fields


def _one_line_stanza(line):
    """A `deb [options] uri suite components` line as a deb822 stanza, or None."""
    match = re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)$", line.split("#")[0].strip())
    if not match:
        return None
    options, uri, suite, components = match.groups()
    fields = [("Types", "deb"), ("URIs", uri), ("Suites", suite), ("Components", components)]
    for option in (options or "").split():
        name, _, value = option.partition("=")
        if name == "signed-by":
            fields.append(("Signed-By", value))
    return fields


def derived_sources(texts, codename):
    """Private sources from the machine's own: every Debian stanza also for source packages,
    and its main archive also for the backports suite.

    `texts` are (file name, content) pairs.  Stanzas of other vendors (no suite of this
    release) are left out.
    """
    stanzas = []
    for name, text in texts:
        if name.endswith(".sources"):
            stanzas += list(_deb822_stanzas(text))
        else:
            stanzas += [s for s in map(_one_line_stanza, text.splitlines()) if s]
    out = []
    for fields in stanzas:
        field = {k.lower(): v for k, v in fields}
        if field.get("enabled", "yes").lower() in ("no", "false"):
            continue
        suites = field.get("suites", "").split()
        wanted = [s for s in suites if s == codename or s.startswith((codename + "-", codename + "/"))]
        if not wanted:
            continue
        if codename in suites and f"{codename}-backports" not in suites:
            wanted.append(f"{codename}-backports")
        changed = {"types": "deb deb-src", "suites": " ".join(wanted)}
        out.append("\n".join(f"{k}: {changed.get(k.lower(), v)}" for k, v in fields))
    if not out:
        raise LabError(f"apt's sources name no suite of {codename}; the lab takes its packages from there")
    return "\n\n".join(out) + "\n"


def _apt_options():
    parts = APT / "sources.list.d"
    for folder in (parts, APT / "lists" / "partial", APT / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    own = sorted(Path("/etc/apt/sources.list.d").glob("*.sources")) \
        + sorted(Path("/etc/apt/sources.list.d").glob("*.list"))
    if Path("/etc/apt/sources.list").exists():
        own.append(Path("/etc/apt/sources.list"))
    text = derived_sources([(p.name, p.read_text()) for p in own], release())
    (parts / "lab.sources").write_text(text)
    return ["-o", f"Dir::Etc::SourceParts={parts}", "-o", "Dir::Etc::SourceList=/dev/null",
            "-o", f"Dir::State::Lists={APT / 'lists'}", "-o", f"Dir::Cache={APT / 'cache'}",
            # Files go below target/, which apt's own download user may not write.
            "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=600",
            "-o", "Acquire::Retries=3"]


_updated = False


def _update():
    """Fetches the package lists once per process, and only if something is to be fetched."""
    global _updated
    if not _updated:
        _run(["apt-get", *_apt_options(), "-q", "update"])
        _updated = True


def installed(package):
    """The installed version of `package`, or None."""
    done = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    status, _, version = done.stdout.partition(" ")
    return version if done.returncode == 0 and status == "installed" else None


def _install(packages, options=()):
    say("installing " + " ".join(packages))
    become = []
    if os.geteuid() != 0:
        if not shutil.which("sudo"):
            raise LabError("these packages are missing, and neither root nor sudo is at hand: "
                           + " ".join(packages))
        become = ["sudo", "-n"]
    _update()
    _run([*become, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *_apt_options(), *options,
          "-q", "-y", "--no-install-recommends", "install", *packages])


def install_tools():
    """Installs what is missing of the tools that the build and the lab run."""
    with locked("packages"):
        missing = [p for p in TOOLS if installed(p) is None]
        if missing:
            _install(missing)
        missing = [p for p in QEMU if installed(p) is None]
        if missing:
            # qemu-utils from backports breaks the older qemu-system-x86: take both from there.
            backports = "bpo" in (installed("qemu-utils") or "")
            _install(missing, ["-t", f"{release()}-backports"] if backports else [])


def _unpack(package, only):
    """Unpacks the newest `package` to target/lab/trees/PACKAGE; `only` are tar patterns."""
    tree = TREES / package
    stamp = tree / ".unpacked.json"
    if stamp.exists() and json.loads(stamp.read_text())["only"] == only:
        return tree
    _update()
    DEBS.mkdir(parents=True, exist_ok=True)
    say(f"downloading {package}")
    for old in DEBS.glob(f"{package}_*.deb"):
        old.unlink()
    _run(["apt-get", *_apt_options(), "-q", "download", package], cwd=DEBS)
    [deb] = DEBS.glob(f"{package}_*.deb")
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as pack:
        subprocess.run(["tar", "-x", "-C", tree, "--wildcards", *only],
                       stdin=pack.stdout, check=True)
    if pack.returncode != 0:
        raise LabError(f"dpkg-deb could not read {deb}")
    version = _run(["dpkg-deb", "-f", deb, "Version"]).strip()
    stamp.write_text(json.dumps({"package": package, "version": version, "only": only}))
    deb.unlink()
    return tree


def depends(package, suite=None):
    """Names of the packages that `package` depends on directly; as `suite` has it, if given."""
    options = ["-o", f"APT::Default-Release={suite}"] if suite else []
    listing = _run(["apt-cache", *_apt_options(), *options, "depends", "--important", package])
    return [line.split()[-1] for line in listing.splitlines() if line.strip().startswith("Depends:")]


def resolved(metapackage, pattern, suite=None):
    """The one dependency of `metapackage` (as `suite` has it) whose name matches; remembered, so
    that a machine keeps the kernel it began with until target/lab is removed."""
    memory = TARGET / "resolved.json"
    known = json.loads(memory.read_text()) if memory.exists() else {}
    key = f"{metapackage} {pattern}" + (f" {suite}" if suite else "")
    if key not in known:
        _update()
        found = [d for d in depends(metapackage, suite) if re.fullmatch(pattern, d)]
        if len(found) != 1:
            raise LabError(f"{metapackage} should depend on one package like {pattern}, found {found}")
        known[key] = found[0]
        memory.write_text(json.dumps(known, indent=1, sort_keys=True))
    return known[key]


def unpacked(package, only=("./*",)):
    """The folder with the files of `package`, downloaded and unpacked if need be."""
    with locked("packages"):
        return _unpack(package, list(only))


def resolve(metapackage, pattern, suite=None):
    """See `resolved`, under the packages' lock."""
    with locked("packages"):
        return resolved(metapackage, pattern, suite)


def python_environment(name, requirements):
    """The folder of a virtual environment with `requirements`, each pinned, under target/lab."""
    place = TARGET / f"{name}-venv"
    stamp = place / "installed"
    with locked(name):
        if not stamp.exists() or stamp.read_text().split() != requirements:
            say("installing " + " ".join(requirements))
            venv.create(place, with_pip=True, clear=True)
            _run([place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                  "--only-binary", ":all:", *requirements])
            stamp.write_text("\n".join(requirements))
    return place


def version(package):
    """The version of an unpacked package."""
    return json.loads((TREES / package / ".unpacked.json").read_text())["version"]


def say(text):
    """Progress for a person; results never go here."""
    print(f"  {text}", file=sys.stderr, flush=True)
