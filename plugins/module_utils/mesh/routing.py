# SPDX-License-Identifier: BSD-2-Clause
"""How packets go between sites: through the tunnel, or natively, as the network itself routes the mesh's ranges. Pure.

A running pair of sites comes from one to the other in the stages of `encryption.Stage`, so that hosts that had their
turn and hosts that did not understand each other: PLAIN is the tunnel; ACCEPTS sends through it and takes both; SENDS
sends natively and takes both; DEMANDS sends natively and takes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .encryption import Pair, Stage

TUNNEL, NATIVE, HYBRID, AUTO = "tunnel", "native", "hybrid", "auto"

WORDS = {
    Stage.PLAIN: "tunnel (VXLAN)",
    Stage.ACCEPTS: "packets go through the tunnel, native ones are taken too",
    Stage.SENDS: "packets go natively, those of the tunnel are taken too",
    Stage.DEMANDS: "native, and nothing through the tunnel",
}


@dataclass(frozen=True)
class Routing:
    """What the inventory says: of the estate, of those `sites` that say something of their own, and of `pairs`."""

    default: str = TUNNEL
    sites: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[Pair, str] = field(default_factory=dict)

    def of_site(self, site: str) -> str:
        return self.sites.get(site, self.default)

    def of(self, pair: Pair) -> str | None:
        """TUNNEL, NATIVE, or AUTO, which is one of the two as hosts prove it (auto.py); None where one side wants
        TUNNEL and the other NATIVE.

        HYBRID is native among the hosts of a site and the tunnel to other sites, so that it goes with both. A site with
        AUTO does to another one what that says."""
        if pair in self.pairs:
            return self.pairs[pair]
        one, other = self.of_site(pair[0]), self.of_site(pair[1])
        if pair[0] == pair[1]:
            return NATIVE if one == HYBRID else one
        one, other = other if one == AUTO else one, one if other == AUTO else other
        if one == other and one != HYBRID:
            return one
        return None if {one, other} == {TUNNEL, NATIVE} else TUNNEL

    def stage(self, pair: Pair) -> Stage:
        """Where a pair is in the end that has not to find it out."""
        return Stage.DEMANDS if self.of(pair) == NATIVE else Stage.PLAIN
