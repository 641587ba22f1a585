# SPDX-License-Identifier: BSD-2-Clause
"""Other programs that want on a host what the mesh wants there: whose they usually are, and what to do. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

HOOKS: Mapping[str, int] = {
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
}
"""The mesh's hooks that decide where a connection goes: enum bpf_attach_type of include/uapi/linux/bpf.h."""

_PROGRAMS = {"cil_": ", Cilium's", "calico_": ", Calico's", "cali_": ", Calico's"}
_OVERLAYS = {"cilium": "Cilium's", "flannel": "flannel's, of k3s or Kubernetes", "vxlan.calico": "Calico's"}


def hook_words(found: Mapping[str, Sequence[str]], root: str) -> str:
    """Of programs at the mesh's hooks, by hook, in the cgroup2 hierarchy that is mounted at `root`."""
    names = sorted({name for some in found.values() for name in some})
    whose = next((words for start, words in _PROGRAMS.items() if any(one.startswith(start) for one in names)), "")
    return (
        f"Another program decides about connections at the mesh's hooks {', '.join(sorted(found))}: "
        f"{', '.join(names)}{whose} (`bpftool cgroup show {root}`). Which of the two chooses a service's backend "
        "would be chance. Take it off this host, or switch its socket load balancing off."
    )


def device_words(names: Iterable[str]) -> str:
    """VXLAN devices of others by name."""
    found = []
    for name in names:
        whose = next((words for start, words in _OVERLAYS.items() if name.startswith(start)), "")
        found.append(f"{name} ({whose})" if whose else name)
    return f"the VXLAN device {', '.join(found)}"


def port_words(port: int, holder: str) -> str:
    """Of whoever has the overlay's UDP port."""
    return (
        f"UDP port {port}, the overlay's, is used by {holder} (`ip -d link show type vxlan` lists VXLAN "
        "devices). Two overlays cannot share it: free it, or set another isthmus_estate.overlay.port, which "
        "is one for the whole estate, before its first run."
    )
