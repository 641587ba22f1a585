# SPDX-License-Identifier: GPL-3.0-or-later
"""Kubernetes clusters in the running lab: real control planes and nodes on machines of their own.

    cluster = Kubernetes(Lab(HYBRID), "kube")
    cluster.up()                            # builds what is missing, boots, waits until every node is Ready
    cluster.kubectl("get", "nodes")

`kubernetes_machine` says what is on the machines, `kubernetes_parts` builds the programs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kubernetes_images
import kubernetes_machine
import kubernetes_parts
from isthmus_lab import NSPAWN_OPTIONS, ROOT, ROUTER, Customer, Lab
from kubernetes_balancer import Balancer
from lab_inventory import Host, KubernetesCluster
from lab_system import LabError, hierarchies, ip, remove_cgroups, run, wait_for

HYBRID = ROOT / "inventories" / "lab_hybrid"
EVERY_CLUSTER = ROOT / "inventories" / "lab_hybrid_two"
IN_CLUSTER = ROOT / "inventories" / "lab_in_cluster"
TWO_IN_CLUSTER = ROOT / "inventories" / "lab_in_cluster_two"
READY_SECONDS = 120
NEEDED_MEMORY = 4 << 30
CERTIFICATE_DAYS = 3650


class Kubernetes:
    """One Kubernetes cluster of the lab's inventory."""

    def __init__(self, lab: Lab, name: str) -> None:
        if name not in lab.kubernetes:
            there = ", ".join(lab.kubernetes) or "none"
            raise LabError(f"no Kubernetes cluster {name!r} in {lab.inventory}; there are: {there}")
        self.lab = lab
        self.cluster: KubernetesCluster = lab.kubernetes[name]

    # -- names and files

    @property
    def name(self) -> str:
        return self.cluster.name

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self.cluster.hosts

    @property
    def directory(self) -> Path:
        return self.lab.kubernetes_directory / self.name

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, on the controller."""
        return self.directory / "admin.kubeconfig"

    @property
    def images(self) -> Path:
        return self.lab.kubernetes_directory / "images" / "images.tar"

    # -- up

    def up(self, proxy_mode: str = kubernetes_machine.PROXY_MODES[0]) -> None:
        """Bring up every machine of the cluster and wait until all its nodes are Ready and its DNS answers. Idempotent.

        `proxy_mode`: of kube-proxy, on machines that are made now.
        """
        self.refuse_if_lacking()
        try:
            programs = kubernetes_parts.build(self.lab.say)
        except kubernetes_parts.PartsError as error:
            raise LabError(str(error)) from error
        with self.lab.locked():
            began = time.monotonic()
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lab.raise_inotify_limit()
            self.lab.make_ground(self.hosts)
            self.make_images(programs)
            pki = self.make_pki()
            for host in self.hosts:
                self.furnish(host, programs, pki, proxy_mode)
            wanted = [host for host in self.hosts if not self.lab.running(host)]
            if wanted:
                self.lab.boot_all(wanted)
            self.settle()
            if self.cluster.in_cluster:
                self.play_cloud()
            version = kubernetes_parts.kubernetes_version()
            self.lab.say(
                f"{self.name}: Kubernetes {version}, {len(self.cluster.nodes)} nodes Ready after "
                f"{time.monotonic() - began:.1f} s; use it with `tests/lab/lab kubectl {self.name} get nodes` or "
                f"KUBECONFIG={self.kubeconfig}"
            )

    def refuse_if_lacking(self) -> None:
        self.lab.refuse_if_lacking()
        missing = self.lacks()
        if missing:
            raise LabError(f"this machine cannot carry cluster {self.name}:\n  - " + "\n  - ".join(missing))

    def lacks(self) -> list[str]:
        """What this machine lacks to carry the cluster beside the lab's machines, each in words. Changes nothing."""
        missing = []
        if not any("memory" in hierarchy.controllers for hierarchy in hierarchies()):
            missing.append(
                "cgroups: a node needs controllers, and only those of cgroup v1 are given to the lab's machines; boot "
                "this machine with systemd.unified_cgroup_hierarchy=0 (the machines without Kubernetes run as it is)"
            )
        if all(self.lab.running(host) for host in self.hosts):
            return missing
        if not kubernetes_parts.directory().exists():
            missing += kubernetes_parts.lacks()
        memory = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
        available = int(memory["MemAvailable"]) << 10
        if available < NEEDED_MEMORY:
            missing.append(
                f"memory: cluster {self.name} needs {NEEDED_MEMORY >> 20} MiB, {available >> 20} are available"
            )
        return missing

    def make_images(self, programs: Path) -> None:
        if self.images.exists():
            return
        self.images.parent.mkdir(parents=True, exist_ok=True)
        root = Path((self.lab.state / "rootfs").read_text())
        kubernetes_images.write(self.images, root, programs / "coredns")

    def make_pki(self) -> dict[str, str]:
        """Certificates and keys of the cluster, file name -> PEM: made once, with the administrator's kubeconfig."""
        place = self.directory / "pki"
        if not place.exists():
            part = self.directory / "pki.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(mode=0o700)
            authority = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign")
            certificate(part / "ca", f"/CN={self.name}", authority)
            for name, (subject, extensions) in kubernetes_machine.certificates(self.cluster).items():
                certificate(part / name, subject, extensions.splitlines(), signer=part / "ca")
            part.rename(place)
        pki = {path.name: path.read_text() for path in place.iterdir()}
        text = kubernetes_machine.kubeconfig(self.cluster, pki["ca.crt"], pki["admin.crt"], pki["admin.key"])
        part = self.directory / "admin.kubeconfig.part"
        part.touch(mode=0o600)
        part.write_text(text)
        part.rename(self.kubeconfig)
        return pki

    def furnish(self, host: Host, programs: Path, pki: dict[str, str], proxy_mode: str) -> None:
        directory = self.lab.directory(host)
        (directory / "containerd").mkdir(parents=True, exist_ok=True)
        options = (
            "--bind=/dev/kmsg",  # the kubelet reads of processes that the kernel killed
            # An overlay's upper directory cannot be on an overlay.
            f"--bind={directory}/containerd:/var/lib/containerd",
            f"--bind-ro={programs}:{kubernetes_machine.PROGRAMS}",
            f"--bind-ro={self.images.parent}:{kubernetes_machine.IMAGES}",
        )
        (directory / NSPAWN_OPTIONS).write_text("\n".join(options) + "\n")
        self.lab.furnish(host, kubernetes_machine.files(self.cluster, host, pki, proxy_mode))

    def settle(self) -> None:
        """Wait for the API; say what an operator says to a new cluster; wait for nodes and for the cluster's DNS."""
        server = self.cluster.control_plane.name
        look = (
            f"the API server is ready (`tests/lab/lab exec {server} -- journalctl -u kube-apiserver` says what it does)"
        )
        wait_for(f"{self.name}: {look}", READY_SECONDS, self.api_ready)
        texts = (kubernetes_machine.BINDINGS, kubernetes_machine.coredns(self.cluster))
        self.apply(kubernetes_machine.nodes(self.cluster))
        with ThreadPoolExecutor(len(self.cluster.nodes)) as pool:
            list(pool.map(self.import_images, self.cluster.nodes.values()))
        for text in texts:
            self.apply(text)
        wait_for(
            f"{self.name}: every node is Ready", READY_SECONDS, lambda: self.ready_nodes() == {*self.cluster.nodes}
        )
        wait_for(f"{self.name}: pods can be made", READY_SECONDS, self.has_default_account)
        self.kubectl(
            *("rollout", "status", "deployment/coredns", "--namespace=kube-system", f"--timeout={READY_SECONDS}s")
        )

    @property
    def cloud_group(self) -> str:
        """Cgroup of the process that plays a cloud's part."""
        return f"cloud-{self.name}"

    def play_cloud(self) -> None:
        """Volumes, and addresses for Services of the type LoadBalancer."""
        self.apply(kubernetes_machine.volumes(self.cluster))
        self.lab.kill_group(self.cloud_group)
        self.lab.in_background(self.directory / "cloud.log", "cloud", self.name, group=self.cloud_group)

    def balance(self) -> None:
        """Play the cloud's part, until it is ended."""
        server = f"{self.cluster.control_plane.address}:{kubernetes_machine.API_PORT}"
        site = self.lab.sites[self.cluster.control_plane.site].network

        def lead(address: str, node: str) -> None:
            if node:
                ip("route", "replace", f"{address}/32", "via", node, namespace=ROUTER)
            else:
                ip("route", "delete", f"{address}/32", namespace=ROUTER, check=False)

        Balancer(server, self.directory / "pki", site, lead).serve()

    def api_ready(self) -> bool:
        return self.kubectl("get", "--raw=/readyz", check=False).stdout == "ok"

    def ready_nodes(self) -> set[str]:
        """Names of the nodes that are Ready, as the API says."""
        form = '{range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\\n"}{end}'
        lines = self.kubectl("get", "nodes", f"--output=jsonpath={form}").stdout.splitlines()
        return {name for name, _, status in (line.partition(" ") for line in lines) if status == "True"}

    def has_default_account(self) -> bool:
        return self.kubectl("get", "serviceaccount", "default", check=False).returncode == 0

    def import_images(self, host: Host) -> None:
        """Into the node's containerd, unless they are there."""
        wait_for(f"{host.name}: containerd is up", 30, lambda: self.containerd_is_up(host))
        images = [f"{kubernetes_machine.PROGRAMS}/ctr", "--namespace=k8s.io", "images"]
        there = set(self.lab.exec(host.name, [*images, "list", "--quiet"]).stdout.split())
        if not there >= {*kubernetes_machine.ALL_IMAGES}:
            archive = f"{kubernetes_machine.IMAGES}/{self.images.name}"
            self.lab.exec(host.name, [*images, "import", "--local", archive])

    def containerd_is_up(self, host: Host) -> bool:
        return self.lab.exec(host.name, ["systemctl", "is-active", "containerd"], check=False).returncode == 0

    # -- down

    def down(self) -> None:
        """End the cluster's machines and remove them, their disks and everything that `up` made for them."""
        if not self.directory.exists():
            self.lab.say(f"{self.name}: there is no such cluster in the lab now")
            return
        with self.lab.locked():
            self.lab.kill_group(self.cloud_group)
            remove_cgroups(self.cloud_group)
            for host in self.hosts:
                self.lab.stop(host)
                if self.lab.directory(host).exists():
                    shutil.rmtree(self.lab.directory(host))
                for name in (f"host-{host.name}", f"host-{host.name}.pub"):
                    (self.lab.key.parent / name).unlink(missing_ok=True)
            self.lab.known_hosts.write_text("".join(self.lab.known_host_lines(without=self.hosts)))
            for name in dict.fromkeys(host.site for host in self.hosts):
                self.lab.remove_site(self.lab.sites[name])
            shutil.rmtree(self.directory)
            if not any(path != self.images.parent for path in self.directory.parent.iterdir()):
                shutil.rmtree(self.directory.parent)
                self.lab.restore_inotify_limit()
        self.lab.say(f"{self.name}: down")

    # -- using it

    def command(self, *arguments: str) -> list[str]:
        """The command line of `kubectl` as the administrator."""
        return [str(kubernetes_parts.binary("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]

    def kubectl(
        self, *arguments: str, feed: str | None = None, check: bool = True, seconds: float = 150
    ) -> subprocess.CompletedProcess[str]:
        """Run `kubectl` as the administrator; `check`: a non-zero exit raises LabError."""
        try:
            done = subprocess.run(
                self.command(*arguments), input=feed, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name}: kubectl {' '.join(arguments)}: not within {seconds:.0f} s") from error
        if check and done.returncode != 0:
            raise LabError(f"{self.name}: kubectl {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout}")
        return done

    def get(self, *arguments: str) -> Any:
        """What `kubectl get` shows, as JSON."""
        return json.loads(self.kubectl("get", *arguments, "--output=json").stdout)

    def apply(self, manifest: str) -> None:
        """Server-side apply of YAML or JSON text."""
        self.kubectl(
            "apply", "--server-side", "--field-manager=lab", "--force-conflicts", "--filename=-", feed=manifest
        )

    def exec(self, pod: str, argv: Sequence[str], namespace: str = "default", **options: Any) -> str:
        """Run a command in a pod; its standard output."""
        done = self.kubectl("exec", f"--namespace={namespace}", pod, "--", *argv, **options)
        return done.stdout

    def set_proxy_mode(self, mode: str) -> None:
        """Change kube-proxy's mode on every node; when it starts, it removes the rules of another mode."""
        if mode not in kubernetes_machine.PROXY_MODES:
            raise LabError(
                f"kube-proxy has no mode {mode!r} here; there are: {', '.join(kubernetes_machine.PROXY_MODES)}"
            )
        script = f"cat > /{kubernetes_machine.DIRECTORY}/kube-proxy.json && systemctl restart kube-proxy"
        for name, host in self.cluster.nodes.items():
            self.lab.exec(host.name, ["sh", "-c", script], feed=kubernetes_machine.proxy(self.cluster, name, mode))


def clusters_there(lab: Lab) -> list[Kubernetes]:
    """The clusters of the lab's inventory that were made and not taken down."""
    return [cluster for cluster in (Kubernetes(lab, name) for name in lab.kubernetes) if cluster.directory.exists()]


class PodCustomer(Customer):
    """The same customer in a pod that runs the demo's client. It is asked through the API server; its requests go on
    without."""

    TALK = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/run/client.sock'); "
        "s.sendall(sys.argv[1].encode() + b'\\n'); print(s.makefile().readline(), end='')"
    )

    def __init__(self, kube: Kubernetes, pod: str, namespace: str) -> None:
        super().__init__(kube.lab, pod)
        self.kube = kube
        self.namespace = namespace

    def ask(self, order: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        talk = ["python3", "-c", self.TALK, json.dumps(order)]
        answer: dict[str, Any] = json.loads(self.kube.exec(self.host, talk, self.namespace, seconds=seconds + 5))
        return answer


def certificate(path: Path, subject: str, extensions: Sequence[str], signer: Path | None = None) -> None:
    """Make `path`.key and `path`.crt, signed by `signer`'s or by itself."""
    run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"),
        *("-days", str(CERTIFICATE_DAYS), "-subj", subject, "-keyout", f"{path}.key", "-out", f"{path}.crt"),
        *(("-CA", f"{signer}.crt", "-CAkey", f"{signer}.key") if signer else ()),
        *(word for line in extensions for word in ("-addext", line)),
    )
