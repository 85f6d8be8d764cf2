# SPDX-License-Identifier: MIT OR Apache-2.0
"""tests/demo, run as a user runs it."""

import json
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from lab import ROOT

from . import expect, scenario


@contextmanager
def world():
    """The demo's JSON and exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "demo.json"
        done = subprocess.run([ROOT / "tests" / "demo", "--json", report], stdin=subprocess.DEVNULL,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        print(done.stdout)
        yield done, json.loads(report.read_text()) if report.exists() else {}


@scenario
def demo_is_as_promised(result):
    """tests/demo sees everything that it promises, and says so by its exit code."""
    done, report = result
    expect(done.returncode == 0 and report.get("ok") and not report["differences"], done.stdout[-3000:])


@scenario
def demo_report_is_complete(result):
    """The JSON has processes, attacks, flips, digests, switch counts and stage times."""
    _, report = result
    expect(report.get("schema") == "penumbra.demo/v1", report.get("schema"))
    views = {p["exe"]: p["view"] for p in report["processes"] if p["exe"]}
    expect(views["/usr/bin/payroll"] == "fast" and views["/usr/bin/guestbook"] == "hardened", views)
    outcomes = {(a["attack"], a["view"]): a["outcome"] for a in report["attacks"]}
    expect(outcomes == {("pointer", "fast"): "ran", ("return", "fast"): "ran",
                        ("pointer", "hardened"): "caught", ("return", "hardened"): "caught"}, outcomes)
    expect(report["storm"]["flips"] >= 1000, report["storm"])
    text = report["text"]
    expect(text["sha256_before"] == text["sha256_after"] or text["switched_by_the_guest"], text)
    expect(report["switches"]["xen_view_switches"] > 0, report["switches"])
    expect(all(s["seconds"] >= 0 for s in report["stages"]) and len(report["stages"]) >= 9, report["stages"])
