# SPDX-License-Identifier: BSD-2-Clause
"""Strict reading and canonical writing of JSON objects, shared by the codecs of this package.

Everything that is read here may come from another cluster. `Fields` therefore checks the type and
range of each value, names the field that is wrong, and raises nothing but the error class it was
given.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar, Union

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

UINT8 = 0xFF
UINT16 = 0xFFFF
UINT32 = 0xFFFFFFFF
UINT64 = 0xFFFFFFFFFFFFFFFF

_T = TypeVar("_T")

# encoding/json of Go escapes these in strings; emitting the same bytes keeps a Cilium writer and
# ours from rewriting each other's keys over a difference that means nothing.
_GO_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def dumps(value: Any) -> str:
    """Compact JSON in the field order given, with Go's escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).translate(_GO_ESCAPES)


def canonical(value: Any) -> str:
    """Compact JSON with sorted keys and ASCII only: equal values give equal bytes; used for hashes."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def loads(text: str | bytes, error: Callable[[str], Exception]) -> Any:
    """Parse JSON; anything that is not JSON or not encodable as UTF-8 raises `error(reason)`."""
    try:
        # Text of bytes that were no UTF-8 holds lone surrogates, and so breaks whoever writes it later.
        decoded = (text if isinstance(text, bytes) else text.encode("utf-8")).decode("utf-8")
        value = json.loads(decoded, parse_constant=_refuse_constant)
        if "\\u" in decoded:
            # A lone surrogate parses, but breaks whoever writes the string later.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as exc:
        raise error("not UTF-8") from exc
    except RecursionError as exc:
        raise error("JSON is nested too deeply") from exc
    except ValueError as exc:
        raise error("not JSON") from exc
    return value


class Fields:
    """Typed access to one JSON object; `where` names it in errors."""

    def __init__(self, value: Any, error: Callable[[str], Exception], where: str = "") -> None:
        self.error = error
        self.where = where
        if not isinstance(value, dict):
            raise error(f"{where or 'value'} is not an object")
        self.value: dict[str, Any] = value

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def fail(self, name: str, reason: str) -> NoReturn:
        raise self.error(f"{self.path(name)} {reason}")

    def text(self, name: str, default: str | None = "") -> str:
        """A string; missing or null gives `default`, and is an error when that is None."""
        found = self.value.get(name)
        if found is None:
            if default is None:
                self.fail(name, "is missing")
            return default
        if not isinstance(found, str):
            self.fail(name, "is not a string")
        return found

    def optional_text(self, name: str) -> str | None:
        found = self.value.get(name)
        if found is not None and not isinstance(found, str):
            self.fail(name, "is not a string")
        return found

    def integer(self, name: str, maximum: int, default: int | None = 0, minimum: int = 0) -> int:
        found = self.value.get(name)
        if found is None:
            if default is None:
                self.fail(name, "is missing")
            return default
        if isinstance(found, bool) or not isinstance(found, int):
            self.fail(name, "is not an integer")
        if not minimum <= found <= maximum:
            self.fail(name, f"is out of range {minimum}..{maximum}")
        return found

    def number(self, name: str, default: float) -> float:
        found = self.value.get(name)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            self.fail(name, "is not a number")
        try:
            return float(found)
        except OverflowError:
            self.fail(name, "is too large")

    def boolean(self, name: str, default: bool = False) -> bool:
        found = self.value.get(name)
        if found is None:
            return default
        if not isinstance(found, bool):
            self.fail(name, "is not true or false")
        return found

    def items(self, name: str) -> list[Any]:
        found = self.value.get(name)
        if found is None:
            return []
        if not isinstance(found, list):
            self.fail(name, "is not a list")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        found = self.items(name)
        if not all(isinstance(item, str) for item in found):
            self.fail(name, "is not a list of strings")
        return tuple(found)

    def mapping(self, name: str) -> dict[str, Any]:
        found = self.value.get(name)
        if found is None:
            return {}
        if not isinstance(found, dict):
            self.fail(name, "is not an object")
        return found

    def text_mapping(self, name: str) -> dict[str, str]:
        found = self.mapping(name)
        if not all(isinstance(item, str) for item in found.values()):
            self.fail(name, "is not an object of strings")
        return found

    def object(self, name: str) -> Fields:
        return Fields(self.value.get(name), self.error, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        return [Fields(item, self.error, f"{self.path(name)}[{index}]") for index, item in enumerate(self.items(name))]

    def _parsed(self, name: str, parse: Callable[[str], _T], what: str) -> _T:
        text = self.text(name, None)
        try:
            return parse(text)
        except ValueError as exc:
            raise self.error(f"{self.path(name)} is not {what}") from exc

    def address4(self, name: str) -> ipaddress.IPv4Address:
        return self._parsed(name, ipaddress.IPv4Address, "an IPv4 address")

    def network4(self, name: str) -> ipaddress.IPv4Network:
        return self._parsed(name, ipaddress.IPv4Network, "an IPv4 network")

    def networks4(self, name: str) -> tuple[ipaddress.IPv4Network, ...]:
        texts = self.texts(name)
        try:
            return tuple(ipaddress.IPv4Network(item) for item in texts)
        except ValueError as exc:
            raise self.error(f"{self.path(name)} is not a list of IPv4 networks") from exc


def sorted_mapping(value: Mapping[str, _T]) -> dict[str, _T]:
    """Keys in byte order, as Go marshals a map."""
    return {key: value[key] for key in sorted(value, key=lambda text: text.encode("utf-8"))}


def filled(**entries: Any) -> dict[str, Any]:
    """Those that say anything: a document without them stays as it was written before there were such."""
    return {name: value for name, value in entries.items() if value}
