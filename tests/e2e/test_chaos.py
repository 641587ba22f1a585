# SPDX-License-Identifier: GPL-3.0-or-later
"""Something is killed while `site` runs; `site` run again makes the mesh whole.

The moments are drawn from a seed, which every failure shows; ISTHMUS_CHAOS_SEED repeats them.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from estate_tools import ETCD_HOSTS, ONPREM, Estate
from installation import variant
from isthmus_lab import Lab, LabError
from playbook import kill_run, launch, play, read_events

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

SEED = int(os.environ.get("ISTHMUS_CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))
POINTS = 20
LONGEST = 900.0
# Results and task starts of a run over the six machines; a draw beyond the end of a run kills right after it.
EVENTS = {"changed": 55, "bare": 75}
EVERY_FIFTH_FROM_BARE = 5


def renamed(estate: dict[str, Any], groups: dict[str, Any]) -> None:
    """Every host has something to do: a label of its own that is new."""
    for group in groups.values():
        group["vars"]["isthmus_labels"] = {"round": uuid.uuid4().hex[:8]}


@contextlib.contextmanager
def running(inventory: Path, events: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`site`; whatever is left of it at the end is killed."""
    process = launch("site", inventory=inventory, output=events.with_suffix(".out"), events=events)
    try:
        yield process
    finally:
        if process.poll() is None:  # else its number may be somebody else's by now
            kill_run(process)


def wait_for_event(process: subprocess.Popen[bytes], events: Path, number: int) -> str:
    """Wait until the run has told so many events (or has ended); returns words about the moment."""
    end = time.monotonic() + LONGEST
    while True:
        told = [event for event in read_events(events) if event["action"] != "ansible.builtin.meta"]
        if len(told) >= number:
            return f"event {number}: {told[number - 1]['event']} {told[number - 1]['task']}" if number else "the start"
        if process.poll() is not None:
            return f"the end, after {len(told)} events"
        assert time.monotonic() < end, f"site stands still after {len(told)} events"
        time.sleep(0.05)


def whole_again(estate: Estate, inventory: Path, story: str) -> None:
    """`site` succeeds, a further one changes nothing, `verify` finds nothing."""
    for run in (play("site", inventory=inventory, check=False), play("site", inventory=inventory, check=False)):
        assert run.status == 0, f"{story}; then site ended with {run.status}:\n{run.output[-4000:]}"
    assert run.changed == {}, story
    try:
        estate.converged()
    except LabError as error:
        raise AssertionError(f"{story}; then: {error}") from error
    proof = play("verify", inventory=inventory, check=False)
    assert proof.status == 0, f"{story}; then verify found:\n{proof.output[-4000:]}"


def prepare(draw: random.Random, point: int) -> tuple[str, int]:
    """What the run begins with, and the number of the event at which something is killed."""
    start = "bare" if point % EVERY_FIFTH_FROM_BARE == 0 else "changed"
    if start == "bare":
        play("teardown", "-e", "isthmus_confirm_teardown=lab")
    return start, draw.randrange(EVENTS[start])


@pytest.fixture(scope="module", autouse=True)
def afterwards(mesh: Lab) -> Iterator[None]:
    """The lab's own inventory again."""
    yield
    play("site")


@pytest.mark.parametrize("point", range(POINTS))
def test_a_part_is_killed_while_site_runs(estate: Estate, tmp_path: Path, point: int) -> None:
    draw = random.Random(f"{SEED} part {point}")  # noqa: S311
    inventory = variant(tmp_path / "inventory", renamed)
    unit = draw.choice(["isthmusd", "isthmus-registrar", "isthmus-etcd"])
    members = [host for hosts in ETCD_HOSTS.values() for host in hosts]
    places = {"isthmusd": [*estate.lab.hosts], "isthmus-registrar": members, "isthmus-etcd": [*ONPREM]}
    host = draw.choice(places[unit])
    start, number = prepare(draw, point)
    with running(inventory, tmp_path / "events") as process:
        moment = wait_for_event(process, tmp_path / "events", number)
        # On a bare host the unit may not be there yet: then nothing dies at this point.
        killed = estate.lab.exec(host, ["systemctl", "kill", "--signal=KILL", f"{unit}.service"], check=False)
        status = process.wait(LONGEST)
    story = f"seed {SEED}, from {start}: {unit} on {host} killed ({killed.returncode}) at {moment}; site ended {status}"
    print(story)
    whole_again(estate, inventory, story)


@pytest.mark.parametrize("point", range(5))
def test_the_playbook_is_killed(estate: Estate, tmp_path: Path, point: int) -> None:
    draw = random.Random(f"{SEED} playbook {point}")  # noqa: S311
    inventory = variant(tmp_path / "inventory", renamed)
    start, number = prepare(draw, point)
    with running(inventory, tmp_path / "events") as process:
        moment = wait_for_event(process, tmp_path / "events", number)
    story = f"seed {SEED}, from {start}: ansible-playbook killed at {moment}"
    print(story)
    whole_again(estate, inventory, story)
