# SPDX-License-Identifier: GPL-3.0-or-later
"""On a site's gateway: to which other sites packets pass through its tunnels, and tunnels that strongSwan gave up are
asked for again.

A tunnel is there when strongSwan's route leads into it. That of a gateway of ours is asked too, once a second, as one
whose other end is gone stays until strongSwan has given it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import subprocess
from collections.abc import Awaitable, Callable, Collection, Iterable

from isthmus_mesh.ipsec import DEVICE
from isthmus_mesh.spec import IpsecSpec

from isthmus_agent.agent.log import fields
from isthmus_agent.agent.prober import INTERVAL, Prober
from isthmus_agent.desired.datapath import Address, Network
from isthmus_agent.desired.reach import ProbeTable, Target
from isthmus_agent.kvstore.tasks import wait_set, within
from isthmus_agent.netlink.errors import NetworkError

logger = logging.getLogger(__name__)

AGAIN = 5.0  # seconds between two looks at what strongSwan has given up
SWANCTL = "/usr/sbin/swanctl"
PATIENCE = 5.0  # seconds for an answer of strongSwan

ReadRoutes = Callable[[], Awaitable[frozenset[Network]]]


def passing(own: IpsecSpec, routed: frozenset[Network], probes: ProbeTable) -> frozenset[str]:
    """Sites all of whose networks are `routed` into the tunnels, and of whose gateways one answers; of such as are not
    ours nobody can be asked."""
    found = set()
    for site, networks in own.networks.items():
        states = [probes.states.get((site, str(address))) for address in own.inside.get(site, ())]
        answers = [state is None or state.up for state in states]
        if routed.issuperset(networks) and (any(answers) or not answers):
            found.add(site)
    return frozenset(found)


def given_up(text: str, names: Iterable[str]) -> list[str]:
    """Of the answer to `swanctl --list-sas`: those of the connections `names` that have no tunnel and are not making
    one. strongSwan asks until it is answered, and never again when the answer is a refusal, such as that of a daemon
    that was started a moment ago and does not know its connections yet."""
    busy = set()
    name = ""
    for line in text.splitlines():
        if sa := re.match(r"(\S+): #\d+, ([A-Z]+)", line):
            name = sa[1]
            if sa[2] != "ESTABLISHED":
                busy.add(name)
        elif re.match(r"\s+net: #\d+", line):
            busy.add(name)
    return [one for one in names if one not in busy]


async def swanctl(*words: str) -> str | None:
    """What it says, None when that is an error."""
    process = await asyncio.create_subprocess_exec(
        SWANCTL, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        out, _ = await within(process.communicate(), PATIENCE)
    except asyncio.TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                process.kill()
    return out.decode(errors="replace") if process.returncode == 0 else None


class Tunnels:
    """`passes` is kept true while `run` runs; `changed` is called when it turns. `local` is the gateway's own address
    in its site's networks. `read` answers the prefixes that strongSwan leads into its tunnels, or raises
    NetworkError."""

    def __init__(self, own: IpsecSpec, local: Address, read: ReadRoutes, changed: Callable[[], None]) -> None:
        self._own = own
        self._read = read
        self._changed = changed
        self._wake = asyncio.Event()
        self.passes: frozenset[str] | None = None
        self.prober = Prober(local, self.wake, DEVICE)
        targets = [
            Target((site, str(address)), address)
            for site, addresses in sorted(own.inside.items())
            for address in addresses
            if any(address in network for network in own.networks[site])
        ]
        self.prober.retarget(tuple(targets), {})

    def doubt(self, around: Collection[Network]) -> None:
        """To these networks an earlier agent led over the site's other gateway, as nothing passed the tunnels: nothing
        does until that is proven. To be called before `look` and `run`."""
        for site, networks in self._own.networks.items():
            for node in self.prober.table.states if not set(networks).isdisjoint(around) else ():
                if node[0] == site:
                    self.prober.table.doubt(node, up=False)

    def wake(self) -> None:
        """Routes, devices or a verdict changed: look now."""
        self._wake.set()

    async def look(self) -> None:
        """Once. When the routes cannot be read, what was known stands."""
        try:
            routed = await self._read()
        except NetworkError as error:
            logger.error("strongSwan's routes cannot be read", extra=fields(error=str(error)))
            return
        found = passing(self._own, routed, self.prober.table)
        if found != self.passes:
            for site in sorted(self._own.networks):
                if self.passes is not None and (site in found) != (site in self.passes):
                    words = "packets pass" if site in found else "nothing passes"
                    logger.warning(f"{words} through the tunnels", extra=fields(site=site))
            self.passes = found
            self._changed()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            await self.look()
            await wait_set(self._wake, INTERVAL)

    async def ask_again(self) -> None:
        """Until cancelled. What begins a tunnel does so again."""
        while True:
            await asyncio.sleep(AGAIN)
            try:
                listed = await swanctl("--list-sas")
                for name in given_up(listed, self._own.begins) if listed is not None else ():
                    logger.warning("a tunnel is asked for again", extra=fields(connection=name))
                    await swanctl("--initiate", "--child", "net", "--ike", name, "--timeout", "1")
            except OSError as error:
                logger.error("strongSwan cannot be asked", extra=fields(error=str(error)))
