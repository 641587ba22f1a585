# SPDX-License-Identifier: GPL-3.0-or-later
"""Backends that went away: no new flows first, established flows for a grace, then their sockets end.

Pure; the time is passed in (seconds, monotonic).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from isthmus_agent.desired.datapath import Address, Backend, Frontend, Service

GRACE = 30.0  # seconds

Endpoint = tuple[Address, int, int]  # address, port, protocol: what a socket is connected to


def endpoint(backend: Backend) -> Endpoint:
    """What identifies a backend to a socket; its node and cluster may change without harm."""
    return backend.address, backend.port, backend.protocol


@dataclass(slots=True)
class DrainTracker:
    """Remembers which backends were wanted and since when they are not.

    `orphans`: those that drain and whose service is gone altogether, as of the last `apply`. They are kept in the
    datapath, which tells the next agent of them.
    """

    grace: float = GRACE
    orphans: tuple[Backend, ...] = ()
    _last: dict[Frontend, dict[Endpoint, Backend]] = field(default_factory=dict)
    _since: dict[Frontend, dict[Endpoint, tuple[float, Backend]]] = field(default_factory=dict)

    def seed(self, services: Mapping[Frontend, Service]) -> None:
        """Take over from an earlier agent: what it had given and is not wanted any more drains from the first `apply`
        on."""
        self._last = {
            front: {endpoint(backend): backend for backend in (*svc.backends, *svc.draining)}
            for front, svc in services.items()
        }

    def apply(
        self, services: Mapping[Frontend, Service], now: float
    ) -> tuple[dict[Frontend, Service], tuple[Backend, ...], float | None]:
        """Add draining backends to `services`.

        Returns the services, the backends whose grace ended now and that no service uses any more
        (their sockets are to be destroyed), and the time of the next deadline or None.
        """
        wanted = {
            front: {endpoint(backend): backend for backend in (*svc.backends, *svc.draining)}
            for front, svc in services.items()
        }
        for front, before in self._last.items():
            present = wanted.get(front, {})
            for key, backend in before.items():
                if key not in present:
                    self._since.setdefault(front, {}).setdefault(key, (now, backend))
        self._last = wanted

        expired: dict[Endpoint, Backend] = {}
        for front in list(self._since):
            waiting = self._since[front]
            for key in [key for key in waiting if key in wanted.get(front, {})]:
                del waiting[key]
            for key in [key for key, (since, _) in waiting.items() if now - since >= self.grace]:
                expired[key] = waiting.pop(key)[1]
            if not waiting:
                del self._since[front]

        out = dict(services)
        used = {key for backends in wanted.values() for key in backends}
        orphans: dict[Endpoint, Backend] = {}
        for front, waiting in self._since.items():
            # A service that is gone altogether frees its frontend at once; its sockets end after the grace.
            if front in out:
                out[front] = replace(out[front], draining=out[front].draining + tuple(b for _, b in waiting.values()))
            else:
                orphans.update((key, backend) for key, (_, backend) in waiting.items() if key not in used)
        self.orphans = tuple(orphans.values())
        used |= {key for waiting in self._since.values() for key in waiting}
        gone = tuple(backend for key, backend in expired.items() if key not in used)
        starts = [since for waiting in self._since.values() for since, _ in waiting.values()]
        return out, gone, min(starts) + self.grace if starts else None
