# SPDX-License-Identifier: GPL-3.0-or-later
"""A change of every host that fails on one of them: it reaches nobody who was to come later, and nobody notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from estate_tools import ETCD_HOSTS, Estate
from installation import variant
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

# cloud-2, edge-1 and onprem-1 come first, then cloud-1 and onprem-2, then onprem-3.
FIRST = {"cloud-2", "edge-1", "onprem-1"}
BESIDE, FAILING, LATER = "cloud-1", "onprem-2", "onprem-3"
GENERATIONS = "/var/lib/isthmus/generations"


def labelled(_: Any, groups: dict[str, Any]) -> None:
    """Each host has something to do."""
    for group in groups.values():
        group["vars"]["isthmus_labels"] = {"round": "batches"}


def files(estate: Estate, host: str) -> str:
    """What a run writes on a host, as it is, and the processes that it would have started anew."""
    script = (
        "cd /etc; sha256sum isthmus/node.json isthmus/estate.json isthmus/dnsmasq.conf resolv.conf isthmus/pki/*.crt "
        "systemd/system/isthmus*; readlink /opt/isthmus/current; "
        "systemctl show --property=MainPID isthmusd isthmus-registrar isthmus-etcd isthmus-dns"
    )
    return estate.lab.exec(host, ["sh", "-c", script], check=False).stdout


def test_a_failure_in_the_second_batch_reaches_nobody_in_the_third(estate: Estate, tmp_path: Path) -> None:
    estate.converged()
    wanted = variant(tmp_path / "wanted", labelled)
    before = {host: files(estate, host) for host in estate.lab.hosts}
    # No generation can begin there, so its change fails before anything is written.
    spoil = f"mv {GENERATIONS} {GENERATIONS}.kept && touch {GENERATIONS}"
    repair = f"rm {GENERATIONS} && mv {GENERATIONS}.kept {GENERATIONS}"
    try:
        with (
            estate.unnoticed(estate.edge, estate.onprem),
            estate.undone(lambda: estate.lab.exec(FAILING, ["sh", "-c", repair])),
        ):
            estate.lab.exec(FAILING, ["sh", "-c", spoil])
            run = play("site", inventory=wanted, check=False)
        assert run.status == 2, run.output[-6000:]
        told = " ".join(run.output.replace("''", "'").split())  # as YAML quotes it
        assert "Stopped at the first failure: no further batch was begun." in told
        assert f"Failed: {FAILING}, in the task 'The host is a member of the mesh'" in told
        assert f"Changed: {', '.join(sorted({*FIRST, BESIDE}))}." in told
        assert f"Not touched: {LATER}." in told
        assert {host for host in before if files(estate, host) == before[host]} == {FAILING, LATER}
        assert [place for place, *_ in ETCD_HOSTS.values() if estate.keys(place, "isthmus/v1/lock/run")] == []

        rest = play("site", inventory=wanted)
        assert set(rest.changed) == {FAILING, LATER}
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)
    finally:
        play("site")
    estate.converged()
