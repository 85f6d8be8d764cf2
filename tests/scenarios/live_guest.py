# SPDX-License-Identifier: MIT OR Apache-2.0
"""One guest on the patched Xen: refusals, a live apply, what the kernel still can do, removal."""

import json
import shutil
import time
from contextlib import contextmanager

from lab import chain, kernel, until, victim
from lab.lab import Lab

from . import expect, scenario

G = chain.GUEST

# Two rules for one program: the stricter view must win.
CONFLICT = """\
schema = 1
name = "conflict"
version = 1

[default]
view = "hardened"

[[rule]]
id = "trusted"
reason = "a test: the other rule is stricter"
view = "fast"
match = { exe = "/usr/bin/payroll" }

[[rule]]
id = "not-for-users"
view = "hardened"
match = { exe = "/usr/bin/payroll", uid = [0, 1000] }
"""


class World:
    """The booted lab and the tools in its dom0."""

    def __init__(self, lab):
        self.lab = lab
        self.guest = lab.guest
        self.installer = chain.Installer(lab)
        self.workers = {}
        self.before = None


def _policy(folder, name, text, secret):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    chain.sign(path, secret)
    return path


@contextmanager
def world():
    """Builds everything and boots."""
    chain.build_tools()
    xen = chain.build_xen()
    work = chain.WORK / "live"
    bundle, policy, secret, public = chain.signed_chain(work)
    _, stranger = chain.new_key(work / "stranger")

    files = chain.dom0_files(bundle, [policy], [public, stranger])
    # A policy without a signature, a signed one that is no TOML, one whose signature is of another.
    unsigned = chain.policy_copy("payroll.toml", work / "unsigned")
    files.append(("p/unsigned.toml", unsigned, 0o644))
    broken = _policy(work, "broken.toml", policy.read_text() + "\n[[rule]\n", secret)
    conflict = _policy(work, "conflict.toml", CONFLICT, secret)
    files += [(f"p/{f.name}", f, 0o644) for p in (broken, conflict) for f in (p, chain.envelope_of(p))]
    files += [("p/edited.toml", policy.read_text().replace("hardened", "hardened "), 0o644),
              ("p/edited.toml.dsse.json", chain.envelope_of(policy), 0o644)]
    # A bundle for another kernel, well signed.
    other = chain.emit(work / "other", kernel.amd64().vmlinuz)
    chain.sign(other, secret)
    files += [(f"p/other/{f.name}", f, 0o644) for f in other.iterdir() if f.is_file()]
    # A bundle that was edited after it was signed.
    edited = work / "edited"
    shutil.rmtree(edited, ignore_errors=True)
    shutil.copytree(bundle, edited)
    manifest = edited / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    files += [(f"p/edited/{f.name}", f, 0o644) for f in edited.iterdir() if f.is_file()]

    with booted(xen, files, "live") as w:
        yield w


@contextmanager
def booted(xen, files, name, which=None, append=""):
    """Boots with these files in dom0: a guest (of the kernel `which`) with its workers, ready to be attacked and applied."""
    with Lab.boot(xen, extra=files, name=name, kaslr=True, guest_kernel=which, guest_append=append) as lab:
        lab.guest.start()
        w = World(lab)
        victim.prepare_attacks(lab.guest)
        w.workers = {name: victim.Worker(lab.guest, name, cpu, rest=victim.REST)
                     for cpu, name in enumerate(("payroll", "guestbook"))}
        # See tests/demo: ftrace's first use changes static calls for good.
        victim.Pokes(lab.guest).stop()
        w.before = w.installer.host_text()
        yield w


def _refused(w, arguments, codes, *words):
    """dom0's installer refuses, says why, and nothing is mapped; the guest runs on."""
    rc, out = w.lab.dom0.run(f"installer {arguments}", 300)
    expect(rc in codes, f"`installer {arguments}`: exit {rc}, expected {codes}:\n{out}")
    expect("panicked" not in out, out)
    for word in words:
        expect(word in out, f"no {word!r} in: {out}")
    _not_applied(w)


def _not_applied(w):
    domains = [d for d in w.installer.json(f"status {G}")["domains"] if d["applied"]]
    expect(not domains, domains)
    _runs(w)


def _runs(w):
    """The domain is not paused, and its work goes on."""
    state = w.lab.dom0.run(f"xl list {G} | tail -n 1").out.split()[4]
    expect("p" not in state, "domain state", state)
    for worker in w.workers.values():
        worker.lives()


def _apply(bundle="/p/bundle", policy="payroll.toml", trust="key.pub.pem"):
    return f"apply {G} --bundle {bundle} --policy /p/{policy} --trust /p/{trust} --once"


@scenario
def signatures_are_demanded(w):
    """A foreign key, an unsigned policy and an edited policy are refused before anything is mapped."""
    _refused(w, _apply(trust="stranger.pub.pem"), (2,), "/p/bundle")
    _refused(w, _apply(policy="unsigned.toml"), (2,), "unsigned.toml")
    _refused(w, _apply(policy="edited.toml"), (2,), "edited.toml")


@scenario
def edited_bundles_are_refused(w):
    """A bundle that was changed after signing is refused, and the file is named."""
    _refused(w, _apply(bundle="/p/edited"), (2,), "manifest.json")


@scenario
def other_kernels_are_refused(w):
    """A well signed bundle for another kernel is refused by the build-id."""
    _refused(w, _apply(bundle="/p/other"), (2,), "build")


@scenario
def broken_policies_are_refused(w):
    """A signed policy that is no TOML is refused with file and line, exit 2."""
    _refused(w, _apply(policy="broken.toml"), (2,), "broken.toml:")


@scenario
def unknown_domains_are_refused(w):
    """A domain that is not there: one clear error."""
    rc, out = w.lab.dom0.run(_apply().replace(f"apply {G}", "installer apply nobody"))
    expect(rc == 2 and "nobody" in out, rc, out)
    rc, out = w.lab.dom0.run("installer ps 4711")
    expect(rc == 2 and "4711" in out, rc, out)


@scenario
def killed_while_applying(w):
    """The installer is killed at five moments of an apply: the guest is never left paused, and
    `remove` brings its text back every time."""
    for tenths in (2, 6, 12, 22, 45):
        _, out = w.lab.dom0.run(f"installer {_apply()} > /run/kill.log 2>&1 & "
                                f"usleep {tenths * 100000}; kill -KILL $!; wait $!; cat /run/kill.log")
        _runs(w)
        w.installer.run(f"remove {G}")
        w.before = w.installer.own_text(w.before, f"killed after {tenths}00 ms: {out}")
    expect(not w.guest.trouble(), w.guest.trouble())


@scenario
def apply_binds_by_policy(w):
    """After apply each running process has the view of its rule, all others the default."""
    line = w.installer.apply()
    expect(line.startswith("applied:"), line)
    w.installer.wait_view(w.workers["payroll"].pid, "fast")
    entry = w.installer.wait_view(w.workers["guestbook"].pid, "hardened")
    expect(entry["rule"] == "default", entry)
    fast = {p["exe"] for p in w.installer.processes().values() if p["view"] == "fast"}
    expect(fast == {"/usr/bin/payroll"}, fast)
    _runs(w)


@scenario
def text_is_explained(w):
    """Every byte of every view is the guest's text plus the variant's edits."""
    w.installer.run(f"verify-text {G}")


@scenario
def applying_twice_is_refused(w):
    """A second apply on the same domain is refused and leaves the first alone."""
    rc, out = w.lab.dom0.run(f"installer {_apply()}", 300)
    expect(rc == 2, rc, out)
    expect(w.installer.status()["applied"], "no longer applied")
    w.installer.wait_view(w.workers["payroll"].pid, "fast")


@scenario
def new_processes_are_bound(w):
    """A process that starts later gets its view from the watcher, and loses it when it ends."""
    late = victim.Worker(w.guest, "payroll", 1, ".late")
    w.installer.wait_view(late.pid, "fast")
    expect(late.lives())
    bindings = w.installer.status()["bindings"]
    w.guest.run(f"kill {late.pid}")
    deadline = until(60)
    while w.installer.status()["bindings"] >= bindings:
        expect(time.monotonic() < deadline, "the binding of an ended process stays")
        time.sleep(0.5)


@scenario
def exec_changes_the_view(w):
    """A process that replaces its program loses the old program's view."""
    w.guest.run("cp /usr/bin/payroll /tmp/payroll.kept; rm /usr/bin/payroll; cp /bin/busybox /usr/bin/payroll")
    w.guest.run("(exec -a sh /usr/bin/payroll -c 'echo $$ > /tmp/exec.pid; "
                "while [ ! -e /tmp/exec.go ]; do usleep 50000; done; "
                "exec /usr/bin/guestbook work 0') > /tmp/exec.log 2>&1 &")
    try:
        _, out = w.guest.run("while [ ! -s /tmp/exec.pid ]; do usleep 50000; done; cat /tmp/exec.pid")
        pid = int(out)
        w.installer.wait_view(pid, "fast")
        w.guest.run("touch /tmp/exec.go")
        entry = w.installer.wait_view(pid, "hardened")
        expect(entry["exe"] == "/usr/bin/guestbook", entry)
        w.guest.run(f"kill {pid}")
    finally:
        w.guest.run("rm /usr/bin/payroll; mv /tmp/payroll.kept /usr/bin/payroll")


@scenario
def kernel_tools_keep_working(w):
    """In hardened text: kretprobe, function graph, module unload and load work, nothing oopses, and
    the text is explained afterwards."""
    script = f"""\
cd /sys/kernel/tracing
echo 'r:probe {victim.TRACED}' > kprobe_events && echo 1 > events/kprobes/probe/enable || exit 1
stat / > /dev/null
grep -c 'probe: (' trace
echo 0 > events/kprobes/probe/enable; echo > kprobe_events; echo > trace
echo {victim.TRACED} > set_graph_function && echo function_graph > current_tracer || exit 2
stat / > /dev/null
grep -c '{victim.TRACED}' trace
echo nop > current_tracer; echo > set_graph_function
rmmod penumbra_bug && insmod /lib/modules/penumbra_bug.ko || exit 3
"""
    rc, out = w.guest.run(script)
    expect(rc == 0, rc, out)
    hits = [int(n) for n in out.split() if n.isdigit()]
    expect(len(hits) == 2 and all(hits), out)
    expect(not w.guest.trouble(), w.guest.trouble())
    w.installer.run(f"verify-text {G}")


@scenario
def hardened_text_catches(w):
    """Both attacks are caught in hardened text, and the other processes do not notice."""
    for kind in ("pointer", "return"):
        found = victim.attack(w.guest, "guestbook", kind,
                              before=lambda pid: w.installer.wait_view(pid, "hardened"))
        expect(found.outcome == "caught", kind, found.outcome, *found.oops)
    _runs(w)


@scenario
def dead_watcher_means_hardened(w):
    """With the watcher killed, what runs keeps its view, and a new process is hardened, even one
    that the policy trusts."""
    w.lab.dom0.run("kill -KILL $(cat /run/apply.pid)")
    w.installer.wait_view(w.workers["payroll"].pid, "fast")
    found = victim.attack(w.guest, "payroll", "pointer",
                          before=lambda pid: w.installer.wait_view(pid, "hardened"))
    expect(found.outcome == "caught", found.outcome, *found.oops)
    _runs(w)


@scenario
def apply_takes_over(w):
    """A new apply takes over what the killed one left, and trusted processes are bound again."""
    line = w.installer.apply()
    expect("taken over" in line, line)
    w.installer.wait_view(w.workers["payroll"].pid, "fast")
    w.installer.run(f"verify-text {G}")
    _runs(w)


@scenario
def status_counts(w):
    """status has Xen's counters: CR3 writes, view switches, mirrored pokes, no conflict."""
    counters = w.installer.status()["counters"]
    expect(counters["cr3_writes"] > counters["view_switches"] > 0, json.dumps(counters))
    expect(counters["pokes_mirrored"] > 0 and counters["conflicts"] == 0, json.dumps(counters))


@scenario
def remove_is_complete_and_idempotent(w):
    """remove gives the text back as it was, says so twice, and the guest works; a process that keeps an address of the
    hook code on its kernel stack cannot hinder it."""
    pid = victim.hold(w.guest, w.installer.cave().start + 0x100)
    w.installer.stop_watching()
    removed = w.installer.json(f"remove {G}")
    expect(removed["removed"] and removed["cave"] == "restored", removed, w.lab.dom0.run("cat /run/json.err").out)
    w.before = w.installer.own_text(w.before, "removed")
    again = w.installer.json(f"remove {G}")
    expect(not again["removed"], again)
    expect(w.guest.run(f"kill {pid}").rc == 0, "the process that held the address is gone")
    _not_applied(w)
    rc, out = w.guest.run("/usr/bin/guestbook work 0 2")
    expect(rc == 0 and "done" in out, out)


@scenario
def stricter_rule_wins(w):
    """When two rules match one process, the stricter view is used; the domain can be applied again."""
    again = chain.Installer(w.lab, policy="conflict.toml")
    again.apply()
    entry = again.wait_view(w.workers["payroll"].pid, "hardened")
    expect(entry["rule"] == "not-for-users", entry)
    again.stop_watching()
    again.run(f"remove {G}")
    w.before = w.installer.own_text(w.before, "removed")


@scenario
def nobody_complained(w):
    """Neither Xen nor the guest's kernel printed an assertion or a warning in all of this."""
    expect(not w.lab.xen_trouble(), w.lab.xen_trouble())
    others = [line for line in w.guest.trouble() if "invalid opcode" not in line]
    expect(not others, others)
