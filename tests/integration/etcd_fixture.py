# SPDX-License-Identifier: GPL-3.0-or-later
"""Real etcd servers on loopback for tests: TLS with client certificates, authentication by certificate name.

    with EtcdServer(tmp_path / "a", name="onprem") as server:
        server.enable_auth()
        client = server.client("root")              # EtcdClient; the test closes it
        server.etcdctl("get", "--prefix", "cilium/")  # as root, by etcd's own tool

Each server has its own directory, CA and free ports, and is stopped by its own pid.
"""

from __future__ import annotations

import datetime
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from isthmus_agent.kvstore import EtcdClient, EtcdExists, Permission, SyncEtcd

START_DEADLINE = 20.0


def require_etcd() -> None:
    """Skip the calling test, naming what lacks."""
    missing = [tool for tool in ("etcd", "etcdctl") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} (Debian: etcd-server, etcd-client)")


_GIVEN: set[int] = set()


def free_port() -> int:
    """A TCP port of loopback that nobody listens on and that no process of this run of the tests gave away before.

    Below the ports that the kernel gives to outgoing connections, any of which could take it before its server does;
    each of pytest-xdist's workers has its own share of them for the same reason.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = random.randrange(15000 + worker, 32000, workers)  # noqa: S311 - no secret
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port


class Ca:
    """A throw-away CA; `issue` writes `<name>.crt` and `<name>.key` into its directory."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.days: tuple[float, float] = (-1 / 24, 1)
        """When its certificates begin and end, from now."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
        self.crt = directory / "ca.crt"
        self.crt.write_text(self.certificate())

    def certificate(self) -> str:
        """Its own, of the present `days`."""
        made = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM).decode()

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=self.days[0]))
            .not_valid_after(now + datetime.timedelta(days=self.days[1]))
        )

    def revoked(self, *certificates: Path, encoding: serialization.Encoding = serialization.Encoding.DER) -> bytes:
        """A list of revoked certificates."""
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateRevocationListBuilder(self._name, now, now + datetime.timedelta(days=1))
        for path in certificates:
            serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(encoding)

    def issue(self, cn: str, file: str | None = None, organization: str = "") -> tuple[Path, Path]:
        """Certificate and key for `cn`, valid for 127.0.0.1 and localhost, client and server."""
        crt, pem = self.directory / f"{file or cn}.crt", self.directory / f"{file or cn}.key"
        if crt.exists():
            return crt, pem
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, cn))
        certificate = (
            self._builder(x509.Name(subject), key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            # By it two authorities of one name are told apart.
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        crt.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return crt, pem


class EtcdServer:
    """One etcd member. A context manager: starts on entry, ends (and forgets its data) on exit."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "m1",
        ca: Ca | None = None,
        token: str = "test",  # noqa: S107 - etcd's name for what tells two clusters apart; no secret
        initial_cluster: dict[str, str] | None = None,
        peer_port: int = 0,
        arguments: tuple[str, ...] = (),
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.name, self.token = directory, name, token
        self.data = directory / "data"
        self.ca = ca or Ca(directory / "pki", name)
        self.port, self.peer_port = free_port(), peer_port or free_port()
        self.endpoint = f"https://127.0.0.1:{self.port}"
        self.peer_url = f"https://127.0.0.1:{self.peer_port}"
        self.initial_cluster = initial_cluster
        self._arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EtcdServer:
        require_etcd()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL)
        self.wipe()

    # --- process

    def start(self, *, wait: bool = True, state: str = "new") -> None:
        """Start on the existing data (or new); returns when it answers its health endpoint."""
        crt, key = self.ca.issue("etcd-server")
        cluster = self.initial_cluster or {self.name: self.peer_url}
        command = [
            "etcd",
            f"--name={self.name}",
            f"--data-dir={self.data}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={','.join(f'{name}={url}' for name, url in cluster.items())}",
            f"--initial-cluster-token={self.token}",
            f"--initial-cluster-state={state}",
            f"--cert-file={crt}",
            f"--key-file={key}",
            f"--trusted-ca-file={self.ca.crt}",
            "--client-cert-auth",
            f"--peer-cert-file={crt}",
            f"--peer-key-file={key}",
            f"--peer-trusted-ca-file={self.ca.crt}",
            "--peer-client-cert-auth",
            "--unsafe-no-fsync",
            *self._arguments,
        ]
        if subprocess.run(["etcd", "--help"], capture_output=True, check=True).stdout.find(b"unsafe-no-fsync") < 0:
            command.remove("--unsafe-no-fsync")  # 3.4 cannot do without
        log = (self.directory / "etcd.log").open("ab")
        with log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until the member answers a linearizable read; RuntimeError with its log's end after 20 s."""
        deadline = time.monotonic() + START_DEADLINE
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                break
            if self._run_etcdctl(["endpoint", "health"], "root").returncode == 0:
                return
            time.sleep(0.05)
        tail = (self.directory / "etcd.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"etcd {self.name} did not become ready in {START_DEADLINE:.0f} s:\n{tail}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process and wait for it; it may be stopped (SIGSTOP) or gone already."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(how)
            if how is not signal.SIGKILL:
                self.process.send_signal(signal.SIGCONT)
            self.process.wait(timeout=20)
        self.process = None

    def signal(self, how: signal.Signals) -> None:
        """Send a signal (SIGSTOP, SIGCONT) to the process."""
        assert self.process is not None
        self.process.send_signal(how)

    def wipe(self) -> None:
        """Forget all data; the member must be stopped."""
        shutil.rmtree(self.data, ignore_errors=True)

    def restore(self, snapshot: Path, *, token: str | None = None) -> None:
        """Replace the data by a snapshot; the member must be stopped. Another `token` gives another cluster id."""
        self.wipe()
        self.token = token or self.token
        subprocess.run(
            [
                "etcdctl",
                "snapshot",
                "restore",
                str(snapshot),
                f"--name={self.name}",
                f"--data-dir={self.data}",
                f"--initial-cluster={self.name}={self.peer_url}",
                f"--initial-cluster-token={self.token}",
                f"--initial-advertise-peer-urls={self.peer_url}",
            ],
            env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]},
            check=True,
            capture_output=True,
        )

    # --- access

    def _run_etcdctl(self, arguments: list[str], cn: str) -> subprocess.CompletedProcess[str]:
        crt, key = self.ca.issue(cn)
        files = [f"--cacert={self.ca.crt}", f"--cert={crt}", f"--key={key}"]
        return subprocess.run(
            ["etcdctl", f"--endpoints={self.endpoint}", *files, "--command-timeout=5s", *arguments],
            env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]},
            text=True,
            capture_output=True,
        )

    def etcdctl(self, *arguments: str, cn: str = "root") -> str:
        """What etcd's own tool prints; RuntimeError with its words when it fails."""
        done = self._run_etcdctl(list(arguments), cn)
        if done.returncode:
            raise RuntimeError(f"etcdctl {' '.join(arguments)} as {cn}: {done.stderr.strip()}")
        return done.stdout

    def dump(self, prefix: str = "") -> dict[str, str]:
        """All keys below `prefix` with their values, read by etcd's own tool."""
        lines = self.etcdctl("get", "--prefix", "--", prefix).splitlines()
        return dict(zip(lines[::2], lines[1::2], strict=True))

    def client(self, cn: str = "root", *, endpoints: list[str] | None = None, timeout: float = 2.0) -> EtcdClient:
        """A client with the certificate of `cn`; close it."""
        crt, key = self.ca.issue(cn)
        return EtcdClient(endpoints or [self.endpoint], self.ca.crt, crt, key, timeout=timeout)

    def sync_client(self, cn: str = "root") -> SyncEtcd:
        """A synchronous client with the certificate of `cn`; close it."""
        crt, key = self.ca.issue(cn)
        return SyncEtcd([self.endpoint], self.ca.crt, crt, key)

    def add_user(self, cn: str, *permissions: Permission) -> None:
        """A user named as the certificate `cn` with exactly these permissions (role of the same name)."""
        with self.sync_client() as client:
            for add, name in ((client.role_add, cn), (client.user_add, cn)):
                try:
                    add(name)
                except EtcdExists:
                    continue
            for permission in permissions:
                client.role_grant_permission(cn, permission)
            client.user_grant_role(cn, cn)

    def enable_auth(self) -> None:
        """User and role `root`, then authentication on."""
        with self.sync_client() as client:
            for add in (client.role_add, client.user_add):
                try:
                    add("root")
                except EtcdExists:
                    continue
            client.user_grant_role("root", "root")
            client.auth_enable()
