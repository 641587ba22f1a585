# SPDX-License-Identifier: GPL-3.0-or-later
"""`teardown` leaves machines as they were before the first `site`; what the user tools and systemd keep for themselves
is named in `look.py`."""

from __future__ import annotations

import pytest
import snapshot
from estate_tools import Estate
from isthmus_lab import Lab
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]
CONFIRMED = ("-e", "isthmus_confirm_teardown=lab")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "It is not confirmed."),
        (("-e", "isthmus_confirm_teardown=other"), "It was confirmed for the estate other, this is lab."),
    ],
    ids=["unconfirmed", "another estate"],
)
def test_it_refuses_and_says_how(mesh: Lab, arguments: tuple[str, ...], words: str) -> None:
    run = play("teardown", *arguments, check=False)
    assert run.status != 0
    assert run.changed == {}
    said = " ".join(run.output.split())
    assert words in said
    assert "The teardown removes the mesh from 6 hosts: units, keys, the data of etcd." in said
    assert "ansible-playbook isthmus.mesh.teardown -e isthmus_confirm_teardown=lab" in said


def test_machines_are_as_they_were(lab: Lab) -> None:
    """New machines: other tests reboot theirs, which changes what systemd shows."""
    lab.down()
    lab.up()
    bare = snapshot.take(lab)
    play("site")
    whole = snapshot.take(lab)
    preview = play("teardown", "--check", "--diff")
    assert set(preview.changed) == set(lab.hosts)
    assert snapshot.differences(whole, snapshot.take(lab)) == []
    try:
        assert play("teardown", *CONFIRMED).changed == preview.changed
        assert snapshot.differences(bare, snapshot.take(lab)) == []
        assert play("teardown", *CONFIRMED).changed == {}
    finally:
        play("site")


def test_a_mesh_that_begins_with_one_host_becomes_the_same(estate: Estate) -> None:
    """First one member of three alone; then its cluster grows one host after the other while the others form."""
    play("teardown", *CONFIRMED)
    try:
        run = play("site", "--limit", "onprem-1")
        assert set(run.changed) == {"onprem-1"}
        assert [m["Status"]["leader"] != 0 for m in estate.etcd_members("onprem-1")] == [True]
        run = play("site", "-e", "isthmus_serial=1", seconds=1800)
        assert set(run.changed) == set(estate.lab.hosts)
        assert len(estate.etcd_members("onprem-1")) == 3
    finally:
        again = play("site")
    assert again.changed == {}
    play("verify")
