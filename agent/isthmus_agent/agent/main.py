# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmusd`: the agent's entry point."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from isthmus_mesh.spec import REMEDY, ClusterDocument, NodeSpec, SpecError, is_cluster_document, spec_hash

from isthmus_agent.agent import memory, metrics, status
from isthmus_agent.agent.enrolment import NODE, Enrolment
from isthmus_agent.agent.http import LocalServer, Response
from isthmus_agent.agent.kernel import HostKernel, Kernel
from isthmus_agent.agent.log import configure, fields
from isthmus_agent.agent.loop import Agent, Paths
from isthmus_agent.bpf.driver import PIN_DIR
from isthmus_agent.bpf.errors import BpfError
from isthmus_agent.kvstore.client import EtcdClient

logger = logging.getLogger(__name__)

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; the unit does not restart on it


def installed_version() -> str:
    """The wheel's version; in a checkout, where nothing is installed, `checkout`."""
    try:
        return version("isthmus")
    except PackageNotFoundError:
        return "checkout"


def routes(agent: Agent) -> LocalServer:
    """The status API: GET /v1/status, /v1/services, /v1/pods, /v1/peers, /v1/audit; POST /v1/repair."""

    async def get_status() -> Response:
        return Response.json(await status.status(agent))

    async def get_services() -> Response:
        return Response.json(await status.services(agent))

    async def get_pods() -> Response:
        return Response.json(await status.pods(agent))

    async def get_peers() -> Response:
        return Response.json(await status.peers(agent))

    async def get_audit() -> Response:
        return Response.json({"problems": await agent.audit()})

    async def post_repair() -> Response:
        return Response.json({"repaired": await agent.audit(repair=True)})

    return LocalServer(
        {
            "GET /v1/status": get_status,
            "GET /v1/services": get_services,
            "GET /v1/pods": get_pods,
            "GET /v1/peers": get_peers,
            "GET /v1/audit": get_audit,
            "POST /v1/repair": post_repair,
        }
    )


def metrics_server(agent: Agent) -> LocalServer:
    connects = metrics.Connects()

    async def get_metrics() -> Response:
        return Response(await metrics.render(agent, connects), "text/plain; version=0.0.4; charset=utf-8")

    async def get_ready() -> Response:
        """For probes of a pod, which must not count as rolled out before its datapath is there."""
        if agent.ready:
            return Response(b"ready\n", "text/plain")
        why = agent.progress.error or "it waits for what it is to be"
        words = f"the datapath is not there yet: {why}\n"
        return Response(words.encode(), "text/plain", HTTPStatus.SERVICE_UNAVAILABLE)

    return LocalServer({"GET /metrics": get_metrics, "GET /ready": get_ready})


async def serve(
    agent: Agent, listen: tuple[str, int] | None, outdated: Callable[[], Awaitable[None]] | None = None
) -> bool:
    """Run the agent and its local servers until SIGTERM or SIGINT; the datapath stays as it is. `outdated` returns when
    the agent's spec is another: then it ends too, and the answer is True."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    api, scrape = routes(agent), metrics_server(agent)
    await api.listen_unix(agent.paths.socket)
    if listen is not None:
        try:
            await scrape.listen_tcp(*listen)
        except OSError as error:
            # Without metrics the mesh still works, and status says what is wrong.
            logger.error("metrics cannot be served", extra=fields(listen=f"{listen[0]}:{listen[1]}", error=str(error)))
    run = asyncio.create_task(agent.run(), name="agent")
    ends: list[asyncio.Future[Any]] = [asyncio.create_task(stop.wait(), name="stop")]
    if outdated is not None:
        ends.append(asyncio.ensure_future(outdated()))
    try:
        done, _ = await asyncio.wait({run, *ends}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return not stop.is_set()
    finally:
        logger.info("stopping; the datapath stays as it is")
        for task in (run, *ends):
            task.cancel()
        await asyncio.gather(run, *ends, return_exceptions=True)
        await scrape.close()
        await api.close()
        agent.paths.socket.unlink(missing_ok=True)
        await agent.client.close()


async def start(
    spec: NodeSpec, kernel: Kernel, cgroup_root: Path, paths: Paths, listen: tuple[str, int] | None
) -> None:
    """Make the agent inside the running loop and serve."""
    client = EtcdClient(spec.etcd.endpoints, spec.etcd.ca, spec.etcd.cert, spec.etcd.key)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    agent = Agent(spec, kernel, client, cgroup_root, paths, boot_id=boot_id, version=installed_version())
    await serve(agent, listen)


async def start_in_cluster(
    document: ClusterDocument,
    name: str,
    kernel: Kernel,
    cgroup_root: Path,
    paths: Paths,
    listen: tuple[str, int] | None,
) -> bool:
    """Wait for what the registrar dealt to the node `name`, then serve. True: begin anew, that has changed."""
    etcd = document.etcd
    client = EtcdClient(etcd.endpoints, etcd.ca, etcd.cert, etcd.key)
    enrolment = Enrolment(document, name, client, paths.state)
    if enrolment.node is None:
        await enrolment.run()
    assert enrolment.node is not None
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spec = document.of_node(enrolment.node)
    agent = Agent(spec, kernel, client, cgroup_root, paths, boot_id=boot_id, version=installed_version())
    return await serve(agent, listen, enrolment.run)


def _listen(text: str) -> tuple[str, int] | None:
    if text == "none":
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor none")
    return host, int(port)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 78 when the configuration cannot be used, 1 for anything else."""
    parser = argparse.ArgumentParser(prog="isthmusd", description="The Isthmus agent of this host.")
    parser.add_argument(
        "--config", type=Path, default=Path("/etc/isthmus/node.json"), help="the host's spec, or its cluster's"
    )
    parser.add_argument("--state-dir", type=Path, default=Paths().state)
    parser.add_argument("--run-dir", type=Path, default=Paths().run)
    parser.add_argument("--pin-dir", type=Path, default=PIN_DIR)
    parser.add_argument("--cgroup-root", type=Path, help="default: the cgroup2 mount of /proc/mounts")
    parser.add_argument("--metrics", type=_listen, default=("127.0.0.1", 9968), metavar="HOST:PORT|none")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    options = parser.parse_args(arguments)
    configure(options.log_level)
    memory.few_arenas()
    try:
        text = options.config.read_bytes()
        document = ClusterDocument(text) if is_cluster_document(text) else None
        if document is None:
            # Of what is really in the file: somebody may have changed it by hand.
            spec = replace(NodeSpec.from_json(text), hash=spec_hash(json.loads(text)))
        elif not os.environ.get(NODE):
            raise SpecError(f"it is a cluster's document, and {NODE} does not say on which node this is")
        kernel = HostKernel(options.pin_dir, options.cgroup_root)
        cgroup_root = kernel.cgroup_root
        # Nobody has looked at a node that Ansible does not enter. What runs already goes on.
        if document is not None and kernel.is_fresh() and (found := kernel.conflicts(document.overlay.port)):
            raise BpfError(" ".join(found))
    except (OSError, SpecError, BpfError) as error:
        words = f"{error}; next: {REMEDY}" if isinstance(error, SpecError) else str(error)
        logger.error("cannot start", extra=fields(config=str(options.config), error=words))
        return EXIT_CONFIG
    paths = Paths(options.state_dir, options.run_dir)
    if document is None:
        asyncio.run(start(spec, kernel, cgroup_root, paths, options.metrics))
    elif asyncio.run(start_in_cluster(document, os.environ[NODE], kernel, cgroup_root, paths, options.metrics)):
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program again
    return 0


if __name__ == "__main__":
    sys.exit(main())
