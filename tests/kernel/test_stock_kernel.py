# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests again on the stock kernel of Debian, in a virtual machine: those of the datapath (tests/bpf), and those of the
tunnels that the kernel under the other tests may have in user space only, here with its WireGuard and its ESP.

The guest is emulated (TCG): no machine has to have KVM. Its root is the controller's own, shared by virtiofs and
read-only, so that it has the same Python environment, tools and compiled objects.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from bpf.topology import wait_for
from kernel.stock_kernel import QEMU, VIRTIOFSD, Kernel, guest, make_initramfs, needed, sharing

pytestmark = [pytest.mark.root, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
IPSEC, WIREGUARD = "tests/integration/test_ipsec.py", "tests/integration/test_agent_wireguard.py"


@dataclass(frozen=True)
class Suite:
    """Tests, and how long they take: `expected` is in seconds on two cores, measured while another run used them as
    well."""

    name: str
    tests: tuple[str, ...]
    expected: float


SUITES = (
    Suite("datapath", ("tests/bpf",), 260),
    Suite(
        "wireguard",
        (
            f"{WIREGUARD}::test_traffic_is_encrypted_also_at_full_size",
            f"{WIREGUARD}::test_status_says_who_is_encrypted_and_by_what",
            f"{WIREGUARD}::test_a_peers_overlay_packet_in_clear_is_dropped_and_counted",
            f"{WIREGUARD}::test_rules_that_somebody_removes_let_nothing_out_and_come_back",
        ),
        200,
    ),
    Suite(
        "ipsec",
        (
            f"{IPSEC}::test_a_pair_is_led_into_the_tunnel_with_certificates_and_nothing_goes_beside_it",
            f"{IPSEC}::test_each_host_reaches_each_of_the_other_site_over_two_gateways_each",
            f"{IPSEC}::test_when_a_gateway_is_lost_the_other_takes_over_and_nothing_goes_in_clear[o1]",
            f"{IPSEC}::test_a_gateway_without_strongswan_leads_over_the_other_and_none_goes_back_and_forth",
        ),
        900,
    ),
)


def boot(kernel: Kernel, directory: Path, console: Path, tests: Sequence[str], seconds: float) -> None:
    """Until the guest turns itself off; AssertionError when that takes longer than `seconds`."""
    socket = directory / "virtiofs"
    settings = {
        "ROOT": ROOT,
        "BIN": Path(sys.executable).parent,
        "MODULES": kernel.modules,
        "TESTS": " ".join(tests),
    }
    init = Path(__file__).with_name("init.sh")
    initramfs = make_initramfs(kernel, directory, init, settings, ("virtio_pci", "virtiofs", "overlay"))
    with subprocess.Popen(sharing(socket, Path("/"))) as server:
        try:
            wait_for(socket.exists, f"{VIRTIOFSD} listens")
            machine = guest(kernel, socket, console, initramfs)
            ended = subprocess.run(machine, capture_output=True, text=True, timeout=seconds)
            assert ended.returncode == 0, f"{QEMU} ended with {ended.returncode}: {ended.stderr}"
        except subprocess.TimeoutExpired:
            pytest.fail(f"the guest was not through after {seconds:.0f} s; how far it came: {console}")
        finally:
            server.kill()


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_on_debians_stock_kernel(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = needed()
    console = ROOT / "build" / f"kernel-{kernel.release}-{suite.name}.log"
    console.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    boot(kernel, tmp_path, console, suite.tests, 3 * suite.expected)
    text = console.read_text(errors="replace").replace("\r", "")
    summary = re.search(r"^=+ (.* in [\d.]+s.*) =+$", text, re.MULTILINE)
    status = re.search(r"^guest: pytest ended with status (\d+)$", text, re.MULTILINE)
    tail = "\n".join(text.splitlines()[-40:])
    assert summary, f"the guest's pytest did not get to its end; the end of {console}:\n{tail}"
    with capsys.disabled():
        print(f"\nLinux {kernel.release}, {suite.name}: {summary[1]}, {time.monotonic() - began:.0f} s with its boot")
    assert status, tail
    assert status[1] == "0", f"{summary[1]}; the end of {console}:\n{tail}"
    assert re.search(r"\b[1-9]\d* passed", summary[1]), f"none ran: {summary[1]}"
    # The datapath's own say themselves what a kernel lacks; what tunnels need this one has.
    assert suite.name == "datapath" or "skipped" not in summary[1], summary[1]
