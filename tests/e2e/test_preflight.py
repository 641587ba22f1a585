# SPDX-License-Identifier: GPL-3.0-or-later
"""A firewall in the way of the mesh: named with the host and the direction before anything is changed, left alone, and
opened where the operator lets us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import snapshot
from demo import EDGE
from estate_tools import Estate
from installation import variant
from playbook import Run, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

NEW = "cloud-2"
NODE = "/etc/isthmus/node.json"
LISTENER = "isthmus-preflight.service"


@pytest.fixture
def as_new(estate: Estate) -> Iterator[Estate]:
    """The estate with a host that nobody has proven yet: to preflight one without a specification is new."""
    estate.converged()
    estate.lab.exec(NEW, ["mv", NODE, NODE + ".away"])
    try:
        yield estate
    finally:
        estate.lab.exec(NEW, ["sh", "-c", f"[ -e {NODE} ] && rm -f {NODE}.away || mv {NODE}.away {NODE}"])
        estate.converged()


def refused(estate: Estate, *arguments: str) -> str:
    """The message of a run of `site` that ends with it and changes nothing."""
    before = snapshot.take(estate.lab)
    run: Run = play("site", *arguments, check=False)
    assert run.status == 2, run.output[-6000:]
    assert run.changed == {}
    assert snapshot.differences(before, snapshot.take(estate.lab)) == []
    for host in estate.lab.hosts:
        assert estate.unit_state(host, LISTENER.removesuffix(".service")) == "inactive"
    assert "The hosts cannot be a mesh yet; nothing was changed on any of them." in " ".join(run.output.split())
    return " ".join(run.output.replace("\\n", " ").split())


def test_a_port_that_is_closed_for_one_site_is_named_with_the_direction(as_new: Estate) -> None:
    edge = as_new.lab.hosts[EDGE].address
    address = as_new.lab.hosts[NEW].address
    script = f"""nft -f - <<'RULES'
table inet test {{
  chain input {{
    type filter hook input priority 0; policy drop;
    ip saddr != {edge} accept
    meta l4proto != udp accept
    iifname isthmus0 accept
  }}
}}
RULES"""
    with as_new.undone(lambda: as_new.lab.exec(NEW, ["nft", "delete", "table", "inet", "test"])):
        as_new.lab.exec(NEW, ["sh", "-c", script])
        message = refused(as_new)
    words = f"UDP 8472 of {NEW} ({address}) does not answer from {EDGE} ({edge}): no answer to 3 datagrams. On {NEW}: "
    assert words in message
    assert "The nftables chain `inet test input` drops what no rule in it accepts" in message
    assert "`nft insert rule inet test input udp dport 8472 accept`" in message
    as_new.converged()
    assert set(play("site").changed) == {NEW}


def test_ufw_is_left_alone_until_it_is_managed_and_teardown_takes_the_rules_away(
    as_new: Estate, tmp_path: Path
) -> None:
    lab = as_new.lab

    def managed(_: dict[str, Any], groups: dict[str, Any]) -> None:
        groups["cloud"]["hosts"][NEW]["isthmus_firewall"] = "managed"

    def added() -> list[str]:
        return [line for line in lab.exec(NEW, ["ufw", "show", "added"]).stdout.splitlines() if line.startswith("ufw ")]

    def put_back() -> None:
        lab.exec(NEW, ["sh", "-c", "ufw --force reset && rm -f /etc/ufw/*.rules.20*"])
        play("site")

    wanted = variant(tmp_path / "managed", managed)
    with as_new.undone(put_back):
        lab.exec(NEW, ["sh", "-c", "ufw allow 22/tcp && ufw --force enable"])
        message = refused(as_new)
        assert f"UDP 8472 of {NEW}" in message
        assert f"On {NEW}: ufw is active (`ufw status`). It was left alone." in message
        assert added() == ["ufw allow 22/tcp"]

        run = play("site", inventory=wanted)
        assert set(run.changed) == {NEW}
        sources = {str(host.address) for host in lab.hosts.values()} - {str(lab.hosts[NEW].address)}
        rules = {f"ufw allow from {source} to any port 8472 proto udp comment 'isthmus.mesh'" for source in sources}
        assert set(added()) == {"ufw allow 22/tcp", "ufw allow in on isthmus0 comment 'isthmus.mesh'", *rules}
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)

        play("teardown", "--limit", NEW, "-e", "isthmus_confirm_teardown=lab", inventory=wanted)
        assert added() == ["ufw allow 22/tcp"]
