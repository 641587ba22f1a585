# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""In which batches `site` goes over the hosts. Pure. Private to this collection."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

DEFAULT = (1, "20%", "100%")
_NAMES = 20


def newest_plan(members: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of variables of hosts the plan that the run goes by: it plans again with public keys and after each proof, and a
    host that fell silent keeps an older one. None where nothing was planned."""
    plans = [variables["__plan_result"] for variables in members if "__plan_result" in variables]

    def age(plan: Mapping[str, Any]) -> tuple[int, int]:
        return len(plan.get("proofs", ())), len(plan.get("basis", {}).get("keys", ()))

    return max(plans, key=age, default=None)


class SerialError(Exception):
    """`isthmus_serial` is none; the text is for the operator."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Names of hosts: those that go `together`, before all others, and the batches after them."""

    together: list[str]
    batches: list[list[str]]

    def words(self) -> list[str]:
        """A line each."""
        lines = [f"together, before the others: {_names(self.together)}"] if self.together else []
        return lines + [f"batch {number}: {_names(batch)}" for number, batch in enumerate(self.batches, 1)]


def serial_of(value: Any) -> list[int | str]:
    """The sizes that `isthmus_serial` gives: numbers from 1 on and percentages; commas make a list of a text.

    Raises SerialError.
    """
    if value is None or value == "":
        return list(DEFAULT)
    parts = value if isinstance(value, (list, tuple)) else value.split(",") if isinstance(value, str) else [value]
    sizes = [_size(part) for part in parts]
    if not sizes or None in sizes:
        raise SerialError(
            f"isthmus_serial: {value!r} is no size of a batch. Nothing was changed on any host. Why: it is meant as "
            "the serial of a play, for each cluster: a number of hosts from 1 on, a percentage from 1% to 100%, or a "
            f"list of these. Next: correct it, or leave it out for {', '.join(map(str, DEFAULT))}"
        )
    return [size for size in sizes if size is not None]


def _size(part: Any) -> int | str | None:
    """The number, or the percentage; None for anything else."""
    if isinstance(part, int) and not isinstance(part, bool):
        return part if part >= 1 else None
    found = re.fullmatch(r"\s*(\d+)\s*(%?)\s*", part) if isinstance(part, str) else None
    if found is None or not 1 <= int(found[1]) <= (100 if found[2] else 10**9):
        return None
    return f"{int(found[1])}%" if found[2] else int(found[1])


def split(
    specs: Mapping[str, Mapping[str, Any]],
    hosts: Collection[str],
    new: Collection[str],
    answering: Collection[str],
    serial: list[int | str],
) -> Batches:
    """Every one of ``hosts`` that the plan has, once; the order of the inventory is of no meaning.

    What needs each other goes together: the hosts of ``new`` clusters, whose etcd never ran, and the members of an etcd
    that is not among those ``answering``. No two members of an etcd that answers are in one batch, whatever ``serial``
    says. The batches of the clusters run side by side. Gateways have theirs before all other hosts, whose agents lead
    packets to them: one that has no tunnel to a new site yet would forward these in clear.
    """
    together: list[str] = []
    gateways: dict[str, tuple[list[str], list[str]]] = {}
    clusters: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted(set(hosts) & set(specs)):
        cluster, member = specs[name]["cluster"]["name"], specs[name].get("member") is not None
        if cluster in new or (member and cluster not in answering):
            together.append(name)
        else:
            part = gateways if "local" in specs[name].get("ipsec", {}) else clusters
            part.setdefault(cluster, ([], []))[0 if member else 1].append(name)
    return Batches(together, [*_side_by_side(gateways, serial), *_side_by_side(clusters, serial)])


def _side_by_side(clusters: Mapping[str, tuple[list[str], list[str]]], serial: list[int | str]) -> list[list[str]]:
    """By cluster, the members and the others."""
    parts = [_of_cluster(members, others, serial) for _cluster, (members, others) in sorted(clusters.items())]
    return [
        [name for part in parts for name in part[number : number + 1] for name in name]
        for number in range(max(map(len, parts), default=0))
    ]


def _of_cluster(members: list[str], others: list[str], serial: list[int | str]) -> list[list[str]]:
    """The first batch has no member when others are enough for it; members go into the largest, then into their own."""
    sizes = _sizes(len(members) + len(others), serial)
    open_to = [number for number, size in enumerate(sizes) if number > 0 or size > len(others)]
    chosen = sorted(sorted(open_to, key=lambda number: (-sizes[number], number))[: len(members)])
    batches = [[members[chosen.index(number)]] if number in chosen else [] for number in range(len(sizes))]
    left = list(others)
    for batch, size in zip(batches, sizes, strict=True):
        room = size - len(batch)
        batch += left[:room]
        del left[:room]
    return [batch for batch in batches if batch] + [[name] for name in members[len(chosen) :]]


def _sizes(total: int, serial: list[int | str]) -> list[int]:
    """As Ansible cuts a play's hosts: the last size again until all have their turn."""
    sizes: list[int] = []
    while sum(sizes) < total:
        size = serial[min(len(sizes), len(serial) - 1)]
        number = size if isinstance(size, int) else max(1, total * int(size[:-1]) // 100)
        sizes.append(min(number, total - sum(sizes)))
    return sizes


def _names(hosts: list[str]) -> str:
    more = len(hosts) - _NAMES
    return ", ".join(hosts[:_NAMES]) + (f" and {more} more" if more > 0 else "")
