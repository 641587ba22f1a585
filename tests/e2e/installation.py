# SPDX-License-Identifier: GPL-3.0-or-later
"""The estate made from nothing, with what was seen on the way; and inventories that differ from the lab's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import snapshot
import yaml
from isthmus_lab import Lab
from playbook import INVENTORY, Run, play, read_events


@dataclasses.dataclass(frozen=True, slots=True)
class Installation:
    """Machines before anything was run, after `site --check`, and what both runs did."""

    bare: Mapping[str, snapshot.Snapshot]
    checked: Mapping[str, snapshot.Snapshot]
    predicted: list[dict[str, Any]]
    made: list[dict[str, Any]]
    run: Run


def install(lab: Lab, place: Path) -> Installation:
    """New machines, `site --check`, `site`."""
    lab.down()
    lab.up()
    bare = snapshot.take(lab)
    play("site", "--check", "--diff", events=place / "check")
    checked = snapshot.take(lab)
    run = play("site", events=place / "site")
    return Installation(bare, checked, read_events(place / "check"), read_events(place / "site"), run)


Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""Changes the estate (`isthmus_estate`) and the cluster groups (name -> group) of an inventory in place."""


def variant(place: Path, change: Change, variables: Mapping[str, Any] | None = None) -> Path:
    """The lab's inventory, changed; `variables` are added for all hosts."""
    groups = yaml.safe_load((INVENTORY / "hosts.yml").read_text())
    everywhere = yaml.safe_load((INVENTORY / "group_vars" / "all.yml").read_text())
    everywhere |= variables or {}
    change(everywhere["isthmus_estate"], groups["mesh"]["children"])
    (place / "group_vars").mkdir(parents=True)
    (place / "hosts.yml").write_text(yaml.safe_dump(groups))
    (place / "group_vars" / "all.yml").write_text(yaml.safe_dump(everywhere))
    return place
