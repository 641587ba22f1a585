# SPDX-License-Identifier: GPL-3.0-or-later
"""Installs the wheels of an unpacked bundle into the environment whose interpreter runs this.

usage: ENVIRONMENT/bin/python install.py   (it lies in the archive, beside `wheels`)

By PyPA's `installer`, which is one of the wheels, so that an environment needs no pip: making one with pip and running
it takes three times as long, and on Debian a package more. Modules are compiled here, since an agent whose file system
is read-only would compile them at each start.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

WHEELS = Path(__file__).resolve().parent / "wheels"
TOOL = "installer"


def main() -> None:
    (tool,) = WHEELS.glob(f"{TOOL}-*.whl")
    sys.path.insert(0, str(tool))
    from installer import install
    from installer.destinations import SchemeDictionaryDestination
    from installer.sources import WheelFile

    destination = SchemeDictionaryDestination(
        sysconfig.get_paths(),
        interpreter=sys.executable,
        script_kind="posix",
        bytecode_optimization_levels=(0,),
    )
    for path in sorted(WHEELS.glob("*.whl")):
        if path != tool:
            with WheelFile.open(path) as wheel:
                install(wheel, destination, additional_metadata={"INSTALLER": b"isthmus.mesh.bundle\n"})


if __name__ == "__main__":
    main()
