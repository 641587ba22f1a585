# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks work with `--tags`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("place", "needed", "count"),
    [
        ("playbooks/verify.yml", ["Plan", "See which hosts answer"], 2),
        ("roles/site/tasks/look.yml", ["Plan", "Plan with these addresses"], 3),
    ],
)
def test_a_part_has_what_it_needs_of_the_others(place: str, needed: list[str], count: int) -> None:
    """What the plan gives, and which hosts it is for, is needed whatever tags are asked for."""
    content = yaml.safe_load((ROOT / place).read_text())
    tasks = content[0]["tasks"] if "hosts" in content[0] else content
    ends = [task["name"] for task in tasks if task.get("ansible.builtin.meta") == "end_host"]
    assert len(ends) == count
    tagged = {task["name"] for task in tasks if "always" in task.get("tags", [])}
    assert {*ends, *needed} - tagged == set()
