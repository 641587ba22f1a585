# SPDX-License-Identifier: BSD-2-Clause
"""An OCI image archive (image layout in a tar) as `make image` makes it: which image it holds."""

from __future__ import annotations

import json
import tarfile


class ImageError(Exception):
    """The file is no such archive; the text says why."""


def manifest_digest(archive: str) -> str:
    """`sha256:...` of the one manifest in the archive: what a registry and containerd know the image by."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile("index.json")
            index = json.load(member) if member is not None else {}
        (manifest,) = index["manifests"]
        digest = str(manifest["digest"])
    except (OSError, tarfile.TarError, KeyError, ValueError, TypeError) as exc:
        raise ImageError(
            f"{archive} is no OCI archive with one image ({exc}). Next: make it with `make image`, or correct "
            "isthmus_image_archive"
        ) from exc
    return digest
