# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmus-registrar --config /etc/isthmus/node.json`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from isthmus_mesh.spec import REMEDY, ClusterDocument, MeshSpec, NodeSpec, SpecError, is_cluster_document

from isthmus_agent.agent.log import configure

from .service import ESTATE_FILE, STATE_DIRECTORY, Registrar

POD = "ISTHMUS_POD"
"""Name of the environment variable that a pod of the control plane has its own name from."""
EX_CONFIG = 78
"""sysexits.h; the unit does not start a process again that ended with it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 0 then, 78 (EX_CONFIG) with one line on stderr when the spec does not allow it."""
    parser = argparse.ArgumentParser(prog="isthmus-registrar", description="publish this cluster and mirror its peers")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("/etc/isthmus/node.json"),
        help="the host's node spec, or the cluster's document",
    )
    parser.add_argument("--estate", type=Path, default=ESTATE_FILE, help="the host's copy of the estate record")
    parser.add_argument("--state-dir", type=Path, default=STATE_DIRECTORY, help="where own output is remembered")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options = parser.parse_args(arguments)
    configure(options.log_level)
    try:
        spec = _spec(options.config.read_bytes())
    except (OSError, SpecError) as error:
        print(f"isthmus-registrar: {options.config}: {error}; next: {REMEDY}", file=sys.stderr)
        return EX_CONFIG
    if spec.registrar is None:
        print(f"isthmus-registrar: {options.config}: host {spec.host} carries no registrar", file=sys.stderr)
        return EX_CONFIG
    asyncio.run(_run(spec, options.estate, options.state_dir))
    return 0


def _spec(text: bytes) -> MeshSpec:
    """A host's spec; of a cluster's document that of this pod."""
    if not is_cluster_document(text):
        return NodeSpec.from_json(text)
    return ClusterDocument(text).of_pod(os.environ.get(POD) or socket.gethostname())


async def _run(spec: MeshSpec, estate_file: Path, state_directory: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Registrar(spec, estate_file=estate_file, state_directory=state_directory).run(stop)


if __name__ == "__main__":
    sys.exit(main())
