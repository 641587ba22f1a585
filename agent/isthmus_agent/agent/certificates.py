# SPDX-License-Identifier: GPL-3.0-or-later
"""When this host's certificates end.

The few bytes that matter are read out of the DER here: the standard library shows the dates of a certificate only
through a private function, and the `cryptography` package would cost the agent's memory more than all of this is worth.
"""

from __future__ import annotations

import binascii
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from isthmus_agent.agent.log import fields

logger = logging.getLogger(__name__)

WARN_SECONDS = 30 * 86400.0

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17


@dataclass(frozen=True, slots=True)
class Validity:
    """Seconds since the epoch."""

    begin: float
    end: float

    def ends_soon(self, now: float) -> bool:
        """From 30 days before the end on, or in the last third of a shorter life."""
        return self.end - now < min(WARN_SECONDS, (self.end - self.begin) / 3)


def _element(data: bytes, offset: int) -> tuple[int, int, int]:
    """Tag, start and end of the content of the DER element at `offset`."""
    tag, length, start = data[offset], data[offset + 1], offset + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(data[start : start + size], "big"), start + size
    if start + length > len(data):
        raise ValueError("it is cut off")
    return tag, start, start + length


def _time(data: bytes, offset: int) -> tuple[float, int]:
    """A UTCTime or GeneralizedTime as RFC 5280 wants it, and where the next element is."""
    tag, start, end = _element(data, offset)
    text = data[start:end].decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text >= "5" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc).timestamp(), end


def validity(pem: str) -> Validity:
    """Of the first certificate in `pem`. ValueError when there is none."""
    begin = pem.find(_BEGIN)
    end = pem.find(_END, begin)
    if begin < 0 or end < 0:
        raise ValueError("there is no certificate in it")
    try:
        data = ssl.PEM_cert_to_DER_cert(pem[begin : end + len(_END)])
        _, offset, _ = _element(data, 0)  # Certificate
        _, offset, _ = _element(data, offset)  # TBSCertificate
        tag, _, after = _element(data, offset)
        if tag == _VERSION:
            offset = after
        for _ in range(3):  # serial number, signature, issuer
            _, _, offset = _element(data, offset)
        tag, offset, _ = _element(data, offset)
        if tag != _SEQUENCE:
            raise ValueError("no validity where it should be")
        first, offset = _time(data, offset)
        last, _ = _time(data, offset)
    except (IndexError, binascii.Error) as error:
        raise ValueError("it is damaged") from error
    return Validity(first, last)


def read(directory: Path) -> dict[str, Validity]:
    """Every certificate in `directory` and its `trust` it can read, by name ("agent", "trust/onprem")."""
    found = {}
    for path in sorted((*directory.glob("*.crt"), *directory.glob("trust/*.crt"))):
        name = str(path.relative_to(directory).with_suffix(""))
        try:
            found[name] = validity(path.read_text())
        except (FileNotFoundError, PermissionError):
            continue  # being renewed, or another process's
        except (OSError, ValueError) as error:
            logger.debug("certificate cannot be read", extra=fields(path=str(path), reason=str(error)))
    return found


def warnings(certificates: dict[str, Validity], now: float) -> Sequence[str]:
    """Those that end soon, have ended, or have not begun, in words."""
    words = []
    for name, valid in certificates.items():
        if valid.begin > now:
            day = datetime.fromtimestamp(valid.begin, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            words.append(
                f"certificate {name} begins at {day} only, by this host's clock; what uses it fails until then. Next: "
                "set the clock (chrony or systemd-timesyncd)"
            )
        elif valid.ends_soon(now):
            day = datetime.fromtimestamp(valid.end, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            verb = "ended" if valid.end <= now else "ends"
            words.append(f"certificate {name} {verb} at {day}; what uses it fails then. Next: {_renewal(name)}")
    return words


def _renewal(name: str) -> str:
    """How a person has it renewed: `site` signs certificates anew and never makes another authority."""
    if name != "ca" and not name.startswith("trust/"):
        return "run site to renew it"
    cluster = name.removeprefix("trust/") if name != "ca" else "CLUSTER, the one of this host"
    return f"it is an authority's; run replace_authority -e isthmus_replace_authority={cluster}"
