# SPDX-License-Identifier: GPL-3.0-or-later
"""What `make test-full` has shown, part by part: docs/test-full.md.

A full run takes hours. Each part's row tells the commit and the day of its last run, so that a run can be made in
pieces (ONLY=) and one that was broken off keeps what it had.
usage: test_full.py known PART...              fail unless each is a part
       test_full.py pytest FILE.xml            record what pytest's JUnit XML says
       test_full.py molecule SCENARIO STATUS SECONDS
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "test-full.md"
# Their tests are quick and many: one part each. Of the others each file is one.
WHOLE = ("tests/unit", "tests/bpf", "tests/integration", "tests/lab")
HEAD = """# What the full run has shown

Written by `make test-full`, which runs everything, or by pieces of it (`make test-full ONLY='tests/kernel
tests/e2e/test_ipsec.py molecule/bgp'`): each part's last run, with the commit that it ran on.

| Part | Commit | Day | Kernel, cores | Result | Time |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Row:
    part: str
    commit: str = "-"
    day: str = "-"
    machine: str = "-"
    result: str = "not run yet"
    time: str = "-"


def parts() -> list[str]:
    files = [
        str(file.relative_to(ROOT))
        for place in ("kernel", "e2e")
        for file in sorted((ROOT / "tests" / place).glob("test_*.py"))
    ]
    scenarios = sorted(file.parent.name for file in (ROOT / "extensions" / "molecule").glob("*/molecule.yml"))
    return [*WHOLE, *files, *(f"molecule/{name}" for name in scenarios)]


def known(asked: list[str]) -> None:
    for part in asked:
        if not any(part in (each, str(Path(each).parent)) and part != "tests" for each in parts()):
            sys.exit(f"test-full: ONLY: '{part}' is no part of the full run; they are:\n  " + "\n  ".join(parts()))


def part_of(classname: str) -> str:
    """`tests.e2e.test_ipsec.Class`: tests/e2e/test_ipsec.py; `tests.unit.mesh.test_x`: tests/unit."""
    pieces = classname.split(".")
    whole = "/".join(pieces[:2])
    return whole if whole in WHOLE else "/".join(pieces[:3]) + ".py"


def of_pytest(file: Path) -> dict[str, tuple[str, float]]:
    """{part: (result, seconds with fixtures)}"""
    counts: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(file).iter("testcase"):  # noqa: S314  # what pytest has just written here
        part = part_of(case.get("classname", ""))
        what = next((name for name in ("error", "failure", "skipped") if case.find(name) is not None), "passed")
        of_part = counts.setdefault(part, {})
        of_part[what] = of_part.get(what, 0) + 1
        seconds[part] = seconds.get(part, 0) + float(case.get("time", 0))
    words = {"passed": "passed", "failure": "FAILED", "error": "with an ERROR", "skipped": "skipped"}
    return {
        part: (", ".join(f"{of_part[what]} {word}" for what, word in words.items() if what in of_part), seconds[part])
        for part, of_part in counts.items()
    }


def rows() -> Iterator[Row]:
    """What is on record, without parts that are gone."""
    there = {}
    for line in RECORD.read_text().splitlines() if RECORD.exists() else []:
        cells = re.split(r" *\| *", line.strip("| \n"))
        if len(cells) == len(Row.__annotations__):
            there[cells[0]] = Row(*cells)
    for part in parts():
        yield there.get(part, Row(part))


def git(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def record(results: dict[str, tuple[str, float]]) -> None:
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    if git("diff", "--quiet", "HEAD", "--", ".", f":!{RECORD.relative_to(ROOT)}").returncode:
        commit += ", changed"
    machine = f"{platform.release()}, {os.cpu_count()}"
    new = {
        part: Row(part, commit, f"{datetime.now(timezone.utc):%Y-%m-%d}", machine, result, f"{seconds:.0f} s")
        for part, (result, seconds) in results.items()
    }
    lines = [" | ".join(astuple(new.get(row.part, row))) for row in rows()]
    RECORD.write_text(HEAD + "".join(f"| {line} |\n" for line in lines))


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "known":
        known(rest)
    elif what == "pytest" and len(rest) == 1:
        record(of_pytest(Path(rest[0])))
    elif what == "molecule" and len(rest) == 3:
        record({f"molecule/{rest[0]}": ("passed" if rest[1] == "0" else "FAILED", float(rest[2]))})
    else:
        sys.exit(__doc__)
