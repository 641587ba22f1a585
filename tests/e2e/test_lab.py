# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab is what the other end-to-end tests stand on: its promises, by tools that are not its own."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from isthmus_lab import Host, Lab, LabError

pytestmark = [pytest.mark.root, pytest.mark.lab]


def first_of(lab: Lab, site: str) -> Host:
    return next(host for host in lab.hosts.values() if host.site == site)


def two_sites(lab: Lab) -> tuple[Host, Host]:
    first, second, *_ = sorted(lab.sites)
    return first_of(lab, first), first_of(lab, second)


def reaches(lab: Lab, source: Host, target: Host) -> bool:
    probe = ["ping", "-q", "-c", "1", "-W", "1", str(target.address)]
    return lab.exec(source.name, probe, check=False).returncode == 0


def test_exec_passes_status_output_and_words_through(lab: Lab) -> None:
    host = next(iter(lab.hosts))
    script = 'cat; echo "$0 $1" \'$HOME\' %h "$HOME"; echo err >&2; exit 7'
    done = lab.exec(host, ["sh", "-c", script, "a$b", "${c} d"], feed="in\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\na$b ${c} d $HOME %h /root\n", "err\n")


def test_exec_runs_in_a_cgroup_of_the_machine(lab: Lab) -> None:
    host = next(iter(lab.hosts))
    inside = lab.exec(host, ["grep", "^0::", "/proc/self/cgroup"]).stdout
    assert re.fullmatch(r"0::/system\.slice/lab-exec-[0-9a-f]+\.service\n", inside)


def test_a_failing_command_is_named(lab: Lab) -> None:
    host = next(iter(lab.hosts))
    with pytest.raises(LabError, match=rf"{host}: `sh -c 'echo no >&2; exit 3'` failed \(3\): no"):
        lab.exec(host, ["sh", "-c", "echo no >&2; exit 3"])


def test_a_command_that_hangs_is_ended_on_the_machine(lab: Lab) -> None:
    host = next(iter(lab.hosts))
    with pytest.raises(LabError, match="did not end within 1 s"):
        lab.exec(host, ["sleep", "4711"], seconds=1)
    end = time.monotonic() + 5
    while lab.exec(host, ["pgrep", "-f", "^sleep 4711$"], check=False).returncode == 0:
        assert time.monotonic() < end, "the command still runs"


def test_ssh_enters_with_the_labs_key_and_a_known_host_key(lab: Lab) -> None:
    for name in lab.hosts:
        done = subprocess.run([*lab.ssh(name), "hostname"], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr


def test_a_machine_sees_its_own_bpffs(lab: Lab) -> None:
    here, there = two_sites(lab)
    try:
        lab.exec(here.name, ["mkdir", "/sys/fs/bpf/lab-test"])
        assert "lab-test" not in lab.exec(there.name, ["ls", "/sys/fs/bpf"]).stdout
        assert lab.exec(here.name, ["stat", "-f", "-c", "%T", "/sys/fs/bpf"]).stdout == "bpf_fs\n"
    finally:
        lab.exec(here.name, ["rmdir", "/sys/fs/bpf/lab-test"], check=False)


def test_cut_takes_a_site_from_the_others_and_not_from_the_controller(lab: Lab) -> None:
    here, there = two_sites(lab)
    assert reaches(lab, there, here)
    try:
        lab.cut(here.site)
        assert not reaches(lab, there, here)
        assert not reaches(lab, here, there)
        subprocess.run([*lab.ssh(here.name), "true"], timeout=10, check=True)
        neighbours = [host for host in lab.hosts.values() if host.site == here.site and host != here]
        assert all(reaches(lab, here, host) for host in neighbours)
    finally:
        lab.restore(here.site)
    assert reaches(lab, there, here)


def test_a_reboot_keeps_the_disk_and_nothing_else(lab: Lab) -> None:
    host = list(lab.hosts)[-1]
    identity = lab.exec(host, ["cat", "/etc/machine-id"]).stdout
    boot = lab.exec(host, ["cat", "/proc/sys/kernel/random/boot_id"]).stdout
    try:
        lab.exec(host, ["sh", "-c", "echo kept > /root/kept; echo lost > /run/lost; ip link add lost type bridge"])
        for hard in (False, True):
            lab.reboot(host, hard=hard)
            assert lab.exec(host, ["cat", "/root/kept"]).stdout == "kept\n"
            assert lab.exec(host, ["cat", "/etc/machine-id"]).stdout == identity
            assert lab.exec(host, ["test", "-e", "/run/lost"], check=False).returncode == 1
            assert lab.exec(host, ["ip", "link", "show", "lost"], check=False).returncode == 1
            now = lab.exec(host, ["cat", "/proc/sys/kernel/random/boot_id"]).stdout
            assert now != boot
            boot = now
    finally:
        lab.exec(host, ["rm", "-f", "/root/kept"], check=False)


def test_power_off_pulls_the_plug(lab: Lab) -> None:
    host = lab.hosts[list(lab.hosts)[-1]]
    try:
        began = time.monotonic()
        lab.power_off(host.name)
        assert time.monotonic() - began < 5, "nobody says goodbye when the plug is pulled"
        assert not lab.running(host)
        assert not Path("/run/netns", host.namespace).exists()
        with pytest.raises(LabError, match=f"{host.name} is not running; start it with"):
            lab.exec(host.name, ["true"])
    finally:
        lab.power_on(host.name)
    assert lab.system_state(host) == "running"


def test_a_sites_underlay_mtu(lab: Lab) -> None:
    here, there = two_sites(lab)

    def fits(size: int) -> bool:
        probe = ["ping", "-q", "-c", "1", "-W", "1", "-M", "do", "-s", str(size - 28), str(there.address)]
        return lab.exec(here.name, probe, check=False).returncode == 0

    assert fits(1500)
    try:
        lab.set_mtu(there.site, 1460)
        assert fits(1460)
        assert not fits(1461)
    finally:
        lab.set_mtu(there.site, 1500)


def test_up_again_changes_nothing(lab: Lab) -> None:
    before = [lab.leader(host) for host in lab.hosts.values()]
    lab.up()
    assert [lab.leader(host) for host in lab.hosts.values()] == before


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    tool = Path(__file__).parents[1] / "lab" / "lab"
    for words, answer in (
        (("exec", "nowhere-9", "--", "true"), "no machine 'nowhere-9'; there are: "),
        (("link", "nowhere", "cut"), "no site 'nowhere'; there are: "),
    ):
        done = subprocess.run([str(tool), *words], capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"lab: {answer}")
