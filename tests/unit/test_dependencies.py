# SPDX-License-Identifier: GPL-3.0-or-later
"""Every dependency has its reason in docs/dependencies.md, and that page names no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def plain(name: str) -> str:
    return re.split(r"[\s<>=~;\[]", name.strip())[0].lower().replace("_", "-")


def required(name: str) -> dict[str, str]:
    """Package name to line, of a file in requirements/."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    return {plain(line): line for line in lines if line and not line.startswith("-r")}


def of_the_wheel() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return {plain(name) for name in re.findall(r'"([^"]+)"', block)}


def test_every_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    told = [plain(name) for cell in cells for name in cell.split(",") if cell not in ("Dependency", "---")]
    assert len(told) == len(set(told))
    files = ("agent.txt", "apt.txt", "apt-full.txt", "controller.in")
    wanted = of_the_wheel().union(*(required(name) for name in files))
    assert set(told) == wanted


def test_the_controller_has_the_agents_exact_versions() -> None:
    controller = required("controller.txt")
    agent = required("agent.txt")
    assert {name: controller.get(name) for name in agent} == agent
    assert [name for name in required("controller.in") if name not in controller] == []
    assert of_the_wheel() <= set(agent)
