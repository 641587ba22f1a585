# SPDX-License-Identifier: BSD-2-Clause
"""The inventory's schema as data: what an operator may write, in which shape, and what it means.

`model.py` reads inventories through it; `docs/inventory.md` and `docs/inventory.schema.json` are
generated from it, so that there is one truth. A kind knows how to read a value and how to describe
itself. Reading never stops at the first problem: each is added to a list, and `INVALID` stands for
the value.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .identity import LabelFilter

VERSION = 1
"""Version of this schema, `isthmus_estate.schema`."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong. `where` is a key path, or `host <name>: <variable>`."""

    where: str
    what: str
    why: str
    next: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Why: {self.why.rstrip('.')}. Next: {self.next}."


class _Invalid:
    def __repr__(self) -> str:
        return "INVALID"


INVALID: Any = _Invalid()


class Kind:
    """How one value is written."""

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        """The value, or INVALID after adding a problem."""
        raise NotImplementedError

    def json_schema(self) -> dict[str, Any]:
        raise NotImplementedError

    def words(self) -> str:
        """A few words for the type column of the documentation."""
        raise NotImplementedError


def shown(value: Any) -> str:
    """A value as it is repeated in a message: short, on one line."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """What a misspelt word was probably meant to be."""
    near = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def suggestion(word: Any, known: Iterable[str]) -> str:
    """`did you mean X?` for a near miss, else what is known."""
    names = sorted(known)
    near = nearest(word, names)
    if near:
        return f"did you mean {near!r}? Change it"
    if not names:
        return "remove it"
    return "use one of " + ", ".join(names[:20]) if len(names) <= 20 else "check the spelling"


@dataclass(frozen=True)
class Text(Kind):
    """A string that matches `pattern` whole. `rule` is that rule in words, `why` its reason."""

    pattern: str
    rule: str
    why: str
    longest: int = 253
    refused: tuple[str, ...] = ()

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if not isinstance(value, str):
            hint = "; put it in quotes" if isinstance(value, (bool, int, float)) else ""
            problems.append(Problem(where, f"{shown(value)} is not text", self.why, f"write {self.rule}{hint}"))
            return INVALID
        if len(value) > self.longest or value in self.refused or not re.fullmatch(self.pattern, value):
            problems.append(Problem(where, f"{shown(value)} is not {self.rule}", self.why, "change it"))
            return INVALID
        return str(value)

    def json_schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "string", "pattern": f"^(?:{self.pattern})$", "maxLength": self.longest}
        if self.refused:
            found["not"] = {"enum": list(self.refused)}
        return found

    def words(self) -> str:
        return re.sub("^an? ", "", self.rule.partition(" (")[0])


@dataclass(frozen=True)
class Integer(Kind):
    low: int
    high: int
    why: str

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value):
            value = int(value)  # templates and INI inventories give numbers as text
        if isinstance(value, bool) or not isinstance(value, int):
            problems.append(
                Problem(where, f"{shown(value)} is not a whole number", self.why, f"write one of {self.words()}")
            )
            return INVALID
        if not self.low <= value <= self.high:
            problems.append(
                Problem(where, f"{value} is out of range {self.low}..{self.high}", self.why, f"write {self.words()}")
            )
            return INVALID
        return int(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def words(self) -> str:
        return f"number {self.low}..{self.high}"


class AsNumber(Integer):
    """The number of an autonomous system, as a whole number (not `65000.1`)."""

    _reserved: ClassVar[dict[int, str]] = {23456: "RFC 6793", 65535: "RFC 7300"}

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        found = super().read(value, where, problems)
        if found is not INVALID and found in self._reserved:
            what = f"{found} is reserved ({self._reserved[found]})"
            problems.append(Problem(where, what, "it is no AS's", "use one of your own, or of 64512..65534"))
            return INVALID
        return found

    def json_schema(self) -> dict[str, Any]:
        return {**super().json_schema(), "not": {"enum": sorted(self._reserved)}}


@dataclass(frozen=True)
class Number(Kind):
    low: float
    high: float
    why: str

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            problems.append(Problem(where, f"{shown(value)} is not a {self.words()}", self.why, "change it"))
            return INVALID
        return float(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def words(self) -> str:
        return f"number {self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Flag(Kind):
    """true or false."""

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if not isinstance(value, bool):
            problems.append(
                Problem(where, f"{shown(value)} is not true or false", "it is a switch", "write true or false")
            )
            return INVALID
        return bool(value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def words(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Choice(Kind):
    """One of `values`; those in `later` are part of the model but not built yet."""

    values: tuple[Any, ...]
    later: Mapping[str, str] | None = None

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if isinstance(value, str) and value.isdigit() and int(value) in self.values:
            value = int(value)
        if self.later and isinstance(value, str) and value in self.later:
            problems.append(not_yet(where, value, self.later[value], str(self.values[0])))
            return INVALID
        if isinstance(value, (dict, list, bool)) or value not in self.values:
            known = ", ".join(str(known) for known in self.values)
            words = [known for known in self.values if isinstance(known, str)]
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f"did you mean {near[0]!r}? Change it" if near else f"write one of {known}"
            problems.append(Problem(where, f"{shown(value)} is not one of {known}", "nothing else is defined", hint))
            return INVALID
        return self.values[self.values.index(value)]

    def json_schema(self) -> dict[str, Any]:
        return {"enum": [*self.values, *(self.later or ())]}

    def words(self) -> str:
        return " or ".join(f"`{value}`" for value in self.values)


def not_yet(where: str, value: str, meaning: str, instead: str) -> Problem:
    """What the model has and this version does not do: refused, never ignored."""
    return Problem(where, f"{value} is not yet supported", meaning, f"use {instead} until a later version does it")


@dataclass(frozen=True)
class Address(Kind):
    """A literal unicast IP address."""

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        why = "other hosts send packets to it"
        try:
            address = ipaddress.ip_address(value if isinstance(value, str) else "")
        except ValueError:
            problems.append(
                Problem(where, f"{shown(value)} is not an IP address", why, "write a literal address such as 192.0.2.7")
            )
            return INVALID
        if isinstance(address, ipaddress.IPv6Address):
            problems.append(not_yet(where, str(address), "the datapath carries IPv4 only so far", "an IPv4 address"))
            return INVALID
        if address.is_loopback or address.is_multicast or address.is_unspecified or address == _BROADCAST:
            problems.append(Problem(where, f"{address} is no unicast address of one host", why, "write the host's own"))
            return INVALID
        return address

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}

    def words(self) -> str:
        return "IP address"


_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


@dataclass(frozen=True)
class Range(Kind):
    """An IP network in CIDR form whose prefix length lies in `shortest..longest`."""

    shortest: int
    longest: int
    why: str = "addresses are dealt from it"

    _forbidden: ClassVar[tuple[ipaddress.IPv4Network, ...]] = tuple(
        ipaddress.IPv4Network(text) for text in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
    )

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        why = self.why
        text = value if isinstance(value, str) and "/" in value else ""
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            try:
                fixed = str(ipaddress.ip_network(text, strict=False))
            except ValueError:
                fixed = ""
            if fixed:
                what, hint = f"{shown(value)} has bits set behind its prefix", f"write {fixed}"
            else:
                what, hint = f"{shown(value)} is not an IP range", "write one like 10.101.0.0/16"
            problems.append(Problem(where, what, why, hint))
            return INVALID
        if isinstance(network, ipaddress.IPv6Network):
            problems.append(not_yet(where, str(network), "the datapath carries IPv4 only so far", "an IPv4 range"))
            return INVALID
        if any(network.overlaps(bad) for bad in self._forbidden):
            problems.append(Problem(where, f"{network} is not usable unicast space", why, "use a private range"))
            return INVALID
        if not self.shortest <= network.prefixlen <= self.longest:
            what = f"{network} has prefix length {network.prefixlen}"
            problems.append(
                Problem(
                    where, what, f"/{self.shortest} to /{self.longest} can be used here", "choose another prefix length"
                )
            )
            return INVALID
        return network

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^[0-9a-fA-F:.]+/[0-9]{1,3}$"}

    def words(self) -> str:
        return "IP range"


@dataclass(frozen=True)
class Labels(Kind):
    """Kubernetes labels: text keys and text values."""

    _key: ClassVar[str] = r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
    _value: ClassVar[str] = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        why = "labels are Kubernetes labels, and policies select on them"
        if not isinstance(value, dict):
            problems.append(Problem(where, f"{shown(value)} is not a mapping", why, "write it like {app: web}"))
            return INVALID
        found: dict[str, str] = {}
        for key, entry in value.items():
            here = f"{where}.{key}"
            if not isinstance(key, str) or not re.fullmatch(self._key, key):
                problems.append(Problem(here, f"{shown(key)} is not a Kubernetes label key", why, "change it"))
            elif not isinstance(entry, str):
                problems.append(Problem(here, f"{shown(entry)} is not text", why, "put the value in quotes"))
            elif not re.fullmatch(self._value, entry):
                what = f"{shown(entry)} is not a Kubernetes label value"
                problems.append(Problem(here, what, why, "use up to 63 letters, digits, '-', '_' and '.'"))
            else:
                found[str(key)] = str(entry)
        return found

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^(?:{self._key})$"},
            "additionalProperties": {"type": "string", "pattern": f"^(?:{self._value})$"},
        }

    def words(self) -> str:
        return "labels"


class LabelPattern(Text):
    """An entry of `identity.LabelFilter`."""

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        found = super().read(value, where, problems)
        if found is not INVALID:
            try:
                LabelFilter([found])
            except ValueError as exc:
                problems.append(Problem(where, str(exc), self.why, "correct it"))
                return INVALID
        return found


@dataclass(frozen=True)
class Listing(Kind):
    item: Kind
    least: int = 0

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if not isinstance(value, (list, tuple)):
            problems.append(Problem(where, f"{shown(value)} is not a list", "several may follow", "write a list"))
            return INVALID
        if len(value) < self.least:
            problems.append(
                Problem(
                    where, "the list is empty", "at least one entry is needed", f"add {_article(self.item.words())}"
                )
            )
            return INVALID
        found = [self.item.read(entry, f"{where}[{index}]", problems) for index, entry in enumerate(value)]
        return [entry for entry in found if entry is not INVALID]

    def json_schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "array", "items": self.item.json_schema()}
        if self.least:
            found["minItems"] = self.least
        return found

    def words(self) -> str:
        return f"list of: {self.item.words()}"


def _article(words: str) -> str:
    return words if words.startswith(("a ", "an ")) else f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Mapped(Kind):
    """A mapping from names to values of one kind."""

    key: Text
    item: Kind
    key_words: str

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        if not isinstance(value, dict):
            problems.append(
                Problem(where, f"{shown(value)} is not a mapping", f"its keys are {self.key_words}", "write a mapping")
            )
            return INVALID
        found: dict[str, Any] = {}
        for key, entry in value.items():
            here = f"{where}.{key}"
            name = self.key.read(key, here, problems)
            read = self.item.read({} if entry is None else entry, here, problems)
            if name is not INVALID and read is not INVALID:
                found[name] = read
        return found

    def json_schema(self) -> dict[str, Any]:
        item = self.item.json_schema()
        return {
            "type": "object",
            "propertyNames": self.key.json_schema(),
            "additionalProperties": {"anyOf": [item, {"type": "null"}]} if isinstance(self.item, Table) else item,
        }

    def words(self) -> str:
        return f"mapping of {self.key_words}"


@dataclass(frozen=True)
class AllOr(Kind):
    """The word `all`, or something narrower."""

    narrower: Kind

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        return "all" if value == "all" else self.narrower.read(value, where, problems)

    def json_schema(self) -> dict[str, Any]:
        return {"anyOf": [{"const": "all"}, self.narrower.json_schema()]}

    def words(self) -> str:
        return f"`all` or {self.narrower.words()}"


@dataclass(frozen=True)
class FalseOr(Kind):
    """A text, or `false` (also the empty text) for none at all, which is read as False."""

    kind: Text

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        return False if value is False or value == "" else self.kind.read(value, where, problems)

    def json_schema(self) -> dict[str, Any]:
        return {"anyOf": [{"enum": [False, ""]}, self.kind.json_schema()]}

    def words(self) -> str:
        return f"{self.kind.words()} or `false`"


@dataclass(frozen=True)
class Later(Kind):
    """Something that is in the model and not built yet: read for its form, then refused."""

    kind: Kind
    what: str
    why: str
    instead: str

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        before = len(problems)
        self.kind.read(value, where, problems)
        if len(problems) == before:
            problems.append(not_yet(where, self.what, self.why, self.instead))
        return INVALID

    def json_schema(self) -> dict[str, Any]:
        return self.kind.json_schema()

    def words(self) -> str:
        return f"{self.kind.words()} (not yet)"


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Key:
    """One key of a table. `default` is REQUIRED, None (absent), or the value that is used."""

    kind: Kind
    doc: str
    default: Any = None
    default_doc: str = ""


@dataclass(frozen=True)
class Table(Kind):
    """A mapping with known keys; unknown ones are refused."""

    name: str
    keys: Mapping[str, Key]
    doc: str = ""

    def read(self, value: Any, where: str, problems: list[Problem]) -> Any:
        """A dict with every key of the table; absent ones have their default, bad ones INVALID."""
        if not isinstance(value, dict):
            problems.append(
                Problem(where, f"{shown(value)} is not a mapping", f"it is {_article(self.name)}", "write a mapping")
            )
            return INVALID
        for key in value:
            if key not in self.keys:
                problems.append(
                    Problem(
                        f"{where}.{key}",
                        f"{shown(key)} is not a key of {_article(self.name)}",
                        "an unknown key would be ignored in silence",
                        suggestion(key, self.keys),
                    )
                )
        found: dict[str, Any] = {}
        for name, key in self.keys.items():
            given = value.get(name)
            if given is not None:
                found[name] = key.kind.read(given, f"{where}.{name}", problems)
            elif key.default is REQUIRED:
                problems.append(Problem(f"{where}.{name}", "it is missing", key.doc, f"add {name}: {key.kind.words()}"))
                found[name] = INVALID
            else:
                found[name] = key.default
        return found

    def json_schema(self) -> dict[str, Any]:
        properties = {}
        for name, key in self.keys.items():
            entry = {"description": key.doc, **key.kind.json_schema()}
            if key.default is not None and key.default is not REQUIRED:
                entry["default"] = key.default
            properties[name] = entry
        found: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
        required = [name for name, key in self.keys.items() if key.default is REQUIRED]
        if required:
            found["required"] = required
        return found

    def words(self) -> str:
        return self.name


_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_RFC1123 = "an RFC 1123 label (lower-case letters, digits and '-', at most 63)"

LABEL = Text(_LABEL, _RFC1123, "the name becomes part of DNS names and etcd keys", 63)
CLUSTER_NAME = Text(
    "([a-z0-9][-a-z0-9]*)?[a-z0-9]",
    "a cluster name (an RFC 1123 label of at most 32 characters, not 'default')",
    "Cilium ClusterMesh accepts no other, and the name becomes part of etcd keys and certificates",
    32,
    ("default",),
)
HOST_NAME = Text(
    _SUBDOMAIN,
    "a host name of RFC 1123 labels (lower-case letters, digits, '-', joined by '.', at most 50)",
    "the name becomes part of etcd keys, and with 'isthmus-agent-' before it the name in a certificate (64 at most)",
    50,
)
_DOMAIN = Text(_SUBDOMAIN, "a DNS domain", "service names end with it", 200)
_PORT_NAME = Text(
    "[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?", "a port name (lower case, at most 15)", "Kubernetes accepts no other", 15
)
_PORT_WHY = "TCP and UDP have no other ports"
_PORT = Integer(1, 65535, _PORT_WHY)
_STATE = Choice(("present", "absent"))
_STATE_DOC = "`absent` removes it; leaving it out of the inventory removes nothing."
_HTTP_PATH = Text("/[!-~]*", "a path that begins with '/'", "it is requested by HTTP", 2048)
_UNIT = Text(
    r"[A-Za-z0-9:_.@\\-]+\.(service|scope)", "a systemd unit (service or scope)", "its cgroup is the workload", 255
)
_SLICE = Text(r"[A-Za-z0-9:_.@\\-]+\.slice", "a systemd slice", "its cgroup is the workload", 255)
_CGROUP_PATH = Text(
    r"/?(?!\.\.?(/|$))[^/\x00]+(/(?!\.\.?(/|$))[^/\x00]+)*",
    "a path below the cgroup2 root without '..'",
    "it names the workload's cgroup",
    4096,
)
IN_CLUSTER_API = "https://kubernetes.default.svc"
"""The API server as pods reach it."""
_API_SERVER = Text(
    r"https://([A-Za-z0-9]([-A-Za-z0-9.]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?/?",
    "an https URL of a host and a port, such as https://192.0.2.7:6443",
    "the registrar watches Kubernetes there",
    300,
)
_IDENTITY_LABEL = LabelPattern(
    r"(k8s:)?!?[!-~]+",
    "a regular expression for the beginning of a label's key, such as `app` or `!job-name` (which leaves out)",
    "labels make the identity of pods",
)
_KUBERNETES_NODE = Text(
    _SUBDOMAIN, "a name of a Kubernetes node (RFC 1123 labels joined by '.')", "Kubernetes accepts no other", 253
)
_STORAGE_CLASS = Text(_SUBDOMAIN, "a name of a StorageClass (RFC 1123 labels joined by '.')", "volumes are asked of it")
_QUANTITY = Text("[1-9][0-9]{0,5}(Mi|Gi|Ti)", "an amount such as 8Gi", "Kubernetes gives a volume of that size", 9)
_ARCHIVE_URL = Text(r"https?://[!-~]+", "an http or https URL", "the archive is fetched from it", 2048)
_ANNOTATION = Text(r"[ -~]*", "a text of printable ASCII characters", "it is an annotation's value", 4096)
_FILE_PATH = Text(r"/[^\x00]*", "an absolute path on the controller", "the archive is read from it", 4096)
_SHA256 = Text("[0-9a-f]{64}", "a sha256 in hex", "what was fetched is compared with it", 64)
_WORKLOAD_REF = Text(rf"{_SUBDOMAIN}/{_LABEL}", "'<host>/<workload>'", "a backend is one workload of one host", 130)
_ROUTING = Choice(("tunnel", "native", "hybrid", "auto"))
_ENCRYPTION = Choice(("none", "wireguard", "ipsec-gateway"))
_IKE_IDENTITY = Text(
    "[A-Za-z0-9]([-A-Za-z0-9._@]{0,251}[A-Za-z0-9])?",
    "an identity of IKE (a domain name, a mail address or an IP address)",
    "the two gateways name themselves by it",
)

_WORD = Text(r"[!-~]+", "a name without blanks", "the provider knows it by it", 255)
_ENDPOINT = Text(r"https?://[!-~]+", "an http or https URL", "the provider's API is asked there", 2048)

VPC_GATEWAY = Table(
    "gateway of a VPC",
    {
        "gateway": Key(
            _WORD,
            "AWS: its id (`vgw-`, `tgw-`...). Google: partial URL of a VPN tunnel, forwarding rule or instance. Azure: "
            "`VirtualNetworkGateway`.",
            REQUIRED,
        ),
        "sites": Key(Listing(LABEL, 1), "Sites whose ranges it leads to.", REQUIRED),
    },
)

VPC = Table(
    "VPC section",
    {
        "provider": Key(Choice(("aws", "google", "azure")), "Whose API is asked.", REQUIRED),
        "network": Key(_WORD, "AWS: id of the VPC. Google, Azure: name of the network.", REQUIRED),
        "manage": Key(
            Listing(Choice(("routes", "firewall")), 1),
            "`routes`: routes to the hosts' ranges, and source/destination check off. `firewall`: the mesh's ports are "
            "opened on the hosts.",
            REQUIRED,
        ),
        "ranges": Key(
            Listing(Range(8, 32, "no range of the mesh may overlap it")),
            "Ranges of the VPC itself, for the address plan ([addresses.md](addresses.md)): the provider is not asked.",
            (),
        ),
        "region": Key(_WORD, "AWS: region.", None, "that of profile or environment"),
        "profile": Key(_WORD, "AWS: name of a profile on the controller.", None, "that of the environment"),
        "project": Key(_WORD, "Google: project.", None, "that of the credentials"),
        "subscription": Key(_WORD, "Azure: subscription.", None, "`AZURE_SUBSCRIPTION_ID`"),
        "resource_group": Key(_WORD, "Azure: resource group of the network.", None, "none; Azure needs it"),
        "endpoint": Key(_ENDPOINT, "Base URL of the provider's API.", None, "the public one"),
        "route_tables": Key(Listing(_WORD), "AWS: ids of the route tables.", (), "those of the hosts' subnets"),
        "route_limit": Key(
            Integer(1, 100_000, "it is a number of routes"), "Routes that a table holds.", None, "the provider is asked"
        ),
        "gateways": Key(Listing(VPC_GATEWAY), "Gateways of the VPC, and what is behind them.", ()),
        "state": Key(_STATE, "`absent` takes out of the VPC all that is ours.", "present"),
    },
)

IPSEC_GATEWAY = Table(
    "gateway of a site",
    {
        "host": Key(HOST_NAME, "Host of the site that is its gateway.", REQUIRED),
        "address": Key(
            Address(),
            "Address at which gateways of other sites reach it.",
            None,
            "the host's `isthmus_underlay`",
        ),
    },
)

_PEER = {
    "address": Key(Address(), "Address at which our gateways reach it.", REQUIRED),
    "id": Key(_IKE_IDENTITY, "Its identity in IKE.", None, "its address"),
}

IPSEC_SECOND = Table("second gateway that is not ours", _PEER)

IPSEC_PEER = Table(
    "gateway that is not ours",
    {
        **_PEER,
        "second": Key(
            IPSEC_SECOND, "Another one, or another address of the same, that carries the site as well.", None, "none"
        ),
    },
)

IPSEC = Table(
    "ipsec section",
    {
        "networks": Key(
            Listing(Range(8, 32, "only what lies in it goes through the tunnel"), 1),
            "Networks of the site that go through its gateway: those of its hosts' `isthmus_underlay`, and what else "
            "is to be reached from the other site.",
            REQUIRED,
        ),
        "gateways": Key(
            Listing(IPSEC_GATEWAY),
            "One or two hosts that are the site's gateways, first the one that is used while it works.",
            (),
        ),
        "peer": Key(IPSEC_PEER, "A gateway that is not ours: a cloud's, an appliance.", None, "a host of ours"),
    },
)

_AS_NUMBER = AsNumber(1, 4294967294, "AS numbers have 32 bits (RFC 6793)")

BGP_ROUTER = Table(
    "router",
    {
        "address": Key(Address(), "Its address on the hosts' subnet.", REQUIRED),
        "as_number": Key(_AS_NUMBER, "Its AS number; that of the hosts for iBGP.", REQUIRED),
        "bfd": Key(Flag(), "Whether each side notices by BFD within a second that the other is gone.", False),
    },
)

_BGP = {
    "as_number": Key(_AS_NUMBER, "AS number of the hosts.", None, "none; each host needs one"),
    "routers": Key(Listing(BGP_ROUTER), "Routers to which hosts announce their ranges.", ()),
}

BGP = Table("bgp section", {**_BGP, "state": Key(_STATE, "`absent` takes it off the hosts.", "present")})

HOST_BGP = Table("bgp section of a host", _BGP)

SITE = Table(
    "site",
    {
        "inbound": Key(
            Flag(),
            "Whether other sites can open connections to this one. `false`, of a site behind an address translation: "
            "its hosts open all sessions themselves, by WireGuard, which each pair with another site then needs "
            "([encryption.md](encryption.md)).",
            True,
        ),
        "routing": Key(
            _ROUTING,
            "How packets go among its hosts and to other sites, where a pair of sites says nothing else.",
            None,
            "that of the estate",
        ),
        "encryption": Key(
            _ENCRYPTION,
            "Whether packets of the mesh among its hosts and to other sites are encrypted, where a pair of sites says "
            "nothing else; `ipsec-gateway` to other sites only. Two sites that say different things are refused until "
            "`site_pairs` says what they use.",
            None,
            "that of the estate",
        ),
        "masquerade": Key(
            Flag(),
            "Whether packets of workloads that leave the mesh get their host's address, so that what is there can "
            "answer. See [routing.md](routing.md#source-address).",
            False,
        ),
        "ipsec": Key(
            IPSEC,
            "The site's gateway, for pairs with `encryption: ipsec-gateway`. See [ipsec.md](ipsec.md).",
            None,
            "none",
        ),
        "vpc": Key(
            VPC, "The VPC that its hosts are in, as far as the provider's API is to be used. See [vpc.md](vpc.md)."
        ),
        "bgp": Key(BGP, "Its hosts announce their ranges to routers, by FRR. See [bgp.md](bgp.md)."),
    },
)

SITE_PAIR = Table(
    "pair of sites",
    {
        "sites": Key(Listing(LABEL, 2), "The two sites; the same one twice: its hosts among themselves.", REQUIRED),
        "routing": Key(
            Choice(("tunnel", "native", "auto")),
            "How packets go between them.",
            None,
            "what the two sites say: `native` or `auto` if both do, else `tunnel`; `auto` goes along with another",
        ),
        "encryption": Key(
            _ENCRYPTION,
            "Whether packets of the mesh between them are encrypted.",
            None,
            "what the two sites say, if it is the same",
        ),
        "ipsec_authentication": Key(
            Choice(("certificate", "psk")),
            "How their gateways authenticate each other: `certificate` of the mesh's authorities, or `psk`, the "
            "pre-shared key in `isthmus_ipsec_secrets`.",
            None,
            "`certificate`; `psk` with a gateway that is not ours",
        ),
        "vpc_peering": Key(
            Flag(), "Whether their VPCs are peered; `false` ends a peering that was made by it.", None, "not looked at"
        ),
    },
)

ETCD_SOURCE = Table(
    "source of etcd",
    {
        "type": Key(
            Choice(("package", "archive")),
            "`package` of the distribution, or an `archive` of an etcd release.",
            "package",
        ),
        "path": Key(_FILE_PATH, "The archive on the controller."),
        "url": Key(_ARCHIVE_URL, "Where hosts fetch the archive."),
        "sha256": Key(_SHA256, "Digest of the archive; needed with `archive`."),
    },
)

ETCD = Table(
    "etcd section",
    {
        "hosts": Key(
            Listing(HOST_NAME),
            "Hosts of this cluster that carry its etcd members: 1 to 7, an odd number. With `in_cluster` the one host "
            "of the inventory that stands for the pods of etcd.",
            (),
        ),
        "replicas": Key(Choice((1, 3, 5)), "With `in_cluster`: pods that carry its etcd members.", None, "3"),
        "storage_class": Key(
            _STORAGE_CLASS, "With `in_cluster`: StorageClass of the members' volumes.", None, "the cluster's default"
        ),
        "storage": Key(_QUANTITY, "With `in_cluster`: size of each member's volume.", None, "8Gi"),
        "client_port": Key(_PORT, "TCP port for clients.", 2379),
        "peer_port": Key(_PORT, "TCP port among members.", 2380),
        "source": Key(ETCD_SOURCE, "Where etcd comes from.", None, "`{type: package}`"),
        "quota_bytes": Key(
            Integer(64 * 1024**2, 8 * 1024**3, "etcd recommends at most 8 GiB"),
            "Backend quota in bytes.",
            2 * 1024**3,
        ),
    },
)

EXPOSE = Table(
    "expose section",
    {
        "type": Key(
            Choice(("load_balancer", "node_port", "host")),
            "`load_balancer`: a Service of that type. `node_port`: a port of nodes. `host`: the members' own nodes.",
            "load_balancer",
        ),
        "provider": Key(
            Choice(("aws", "google", "azure", "metallb", "none")),
            "Whose annotations a load balancer gets, besides those of `annotations`.",
            "none",
        ),
        "scope": Key(
            Choice(("internal", "external")),
            "`internal`: an address of the private network. `external`: a public one, with `source_ranges`.",
            "internal",
        ),
        "source_ranges": Key(
            Listing(Range(8, 32, "only peers are to reach the etcd")), "Who may dial a load balancer.", ()
        ),
        "annotations": Key(
            Mapped(Text(r"[!-~]+", "an annotation's name", "Kubernetes accepts no other"), _ANNOTATION, "annotations"),
            "Further annotations of the Service.",
            {},
        ),
        "node_port": Key(
            Integer(1, 65535, _PORT_WHY), "Port on the nodes, with `node_port`.", None, "one that Kubernetes gives"
        ),
        "hosts": Key(
            Listing(_KUBERNETES_NODE),
            "Names of the nodes that peers dial, with `node_port`, or that the members run on, with `host`.",
            (),
            "chosen once",
        ),
    },
)

KUBERNETES = Table(
    "kubernetes section",
    {
        "api_server": Key(
            _API_SERVER,
            "URL of the API server as the cluster's etcd hosts reach it, where the registrar runs; needed on `hosts`.",
            None,
            f"with `in_cluster` {IN_CLUSTER_API}",
        ),
        "pod_ranges": Key(
            Listing(Range(8, 28), 1),
            "Ranges of the cluster's pods, as its CNI deals them. More can be added; one left out stays until pruned.",
            REQUIRED,
        ),
        "service_range": Key(
            Range(8, 28),
            "Kubernetes' own range of ClusterIPs (`--service-cluster-ip-range`); it can only grow.",
            REQUIRED,
        ),
        "identity_labels": Key(
            Listing(_IDENTITY_LABEL),
            "Which labels make the identity of pods, beside Cilium's default; entries of Cilium's setting `labels`. As "
            "soon as one takes in (has no `!`), only what some entry takes in counts.",
            (),
        ),
    },
)

EXPORT = Table(
    "export section",
    {
        "namespaces": Key(Listing(LABEL, 1), "Namespaces whose global services are offered to peers."),
        "labels": Key(Labels(), "Labels of the global services that are offered to peers."),
    },
)

CLUSTER = Table(
    "cluster",
    {
        "id": Key(
            Integer(1, 511, "identities carry the cluster's id in 8 bits, or 9 with max_clusters: 511"),
            "Number of the cluster, 1..255 (1..511 with `max_clusters: 511`), never changed.",
            REQUIRED,
        ),
        "site": Key(LABEL, "Site of its hosts.", None, "the cluster's name"),
        "control_plane": Key(
            Choice(("hosts", "in_cluster")),
            "Where etcd and registrar run: on `hosts` of the inventory, or in the Kubernetes cluster that it is, whose "
            "nodes Ansible does not enter.",
            "hosts",
        ),
        "workload_ranges": Key(
            Listing(Range(8, 28), 1),
            "Ranges that node ranges are dealt from. More can be added later.",
            REQUIRED,
        ),
        "service_range": Key(
            Range(8, 28), "Range that addresses of services are dealt from; it can only grow.", REQUIRED
        ),
        "node_prefix": Key(
            Integer(24, 29, "the node range must hold the host and its workloads"),
            "Prefix length of the range that each new host gets: 28 holds 13 workloads.",
            28,
        ),
        "kubernetes": Key(
            KUBERNETES, "The Kubernetes cluster that this cluster is.", None, "none: a cluster of machines"
        ),
        "etcd": Key(ETCD, "The cluster's etcd.", None, "no members"),
        "expose": Key(EXPOSE, "With `in_cluster`: how peers reach its etcd.", None, "`{type: load_balancer}`"),
        "ca_host": Key(HOST_NAME, "Host that keeps the cluster's CA.", None, "the first of `etcd.hosts`"),
        "peers": Key(
            AllOr(Listing(CLUSTER_NAME)),
            "Clusters it exchanges state with; so far `all` or all of them by name.",
            "all",
        ),
        "export": Key(
            AllOr(
                Later(
                    EXPORT,
                    "a part of the global services",
                    "every global service is offered to every peer so far",
                    "all",
                )
            ),
            "Which global services it offers to peers; so far `all`.",
            "all",
        ),
        "state": Key(_STATE, _STATE_DOC, "present"),
    },
)

SERVICE_PORT = Table(
    "service port",
    {
        "name": Key(_PORT_NAME, "Name; may be left out if there is only one port.", ""),
        "port": Key(_PORT, "Port of the service address.", REQUIRED),
        "target_port": Key(_PORT, "Port of the workload.", None, "`port`"),
        "protocol": Key(Choice(("TCP", "UDP")), "Transport.", "TCP"),
    },
)

SERVICE_BACKENDS = Table(
    "backends section",
    {
        "labels": Key(Labels(), "Workloads of the service's namespace that carry all of these labels."),
        "workloads": Key(Listing(_WORKLOAD_REF, 1), "Workloads of the service's namespace by `<host>/<name>`."),
    },
)

_SECONDS = Number(0.1, 3600, "it is a time in seconds")
_TIMES = Integer(1, 100, "it is a number of results in a row")

HEALTH = Table(
    "health check",
    {
        "type": Key(
            Choice(("tcp", "http", "exec")),
            "`tcp`: connects. `http`: 200..399 to GET. `exec`: command ends with 0.",
            REQUIRED,
        ),
        "port": Key(_PORT, "Port of the workload.", None, "target port of the first TCP port"),
        "path": Key(_HTTP_PATH, "Path for `http`.", None, "`/`"),
        "command": Key(
            Listing(Text(r"[^\x00]*", "an argument", "the command is run without a shell", 4096), 1),
            "Command and arguments for `exec`, run on the host without a shell.",
        ),
        "interval": Key(_SECONDS, "Seconds between checks.", 1.0),
        "timeout": Key(_SECONDS, "Seconds until a check counts as failed.", 1.0),
        "rise": Key(_TIMES, "Good results in a row until ready.", 2),
        "fall": Key(_TIMES, "Bad results in a row until not ready.", 2),
    },
)

SERVICE = Table(
    "service",
    {
        "name": Key(LABEL, "Name of the service.", REQUIRED),
        "namespace": Key(LABEL, "Namespace of the service and its backends.", "default"),
        "ports": Key(Listing(SERVICE_PORT, 1), "Ports of the service.", REQUIRED),
        "backends": Key(SERVICE_BACKENDS, "Which workloads answer.", REQUIRED),
        "health": Key(HEALTH, "How a backend is checked.", None, "ready while its cgroup exists"),
        "global": Key(Flag(), "Whether clusters use each other's backends (`service.cilium.io/global`).", False),
        "shared": Key(
            Flag(),
            "Whether a cluster offers its backends to others (`service.cilium.io/shared`).",
            True,
        ),
        "affinity": Key(
            Choice(("none", "local", "remote")),
            "Which backends are preferred (`service.cilium.io/affinity`).",
            "none",
        ),
        "clusters": Key(AllOr(Listing(CLUSTER_NAME, 1)), "Clusters in which the service exists.", "all"),
        "kubernetes": Key(
            Flag(),
            "Whether it becomes a Service of the same name in those of its clusters that are Kubernetes clusters; "
            "with `global` only.",
            False,
        ),
        "labels": Key(Labels(), "Labels of the service itself.", {}),
        "state": Key(_STATE, _STATE_DOC, "present"),
    },
)

RESERVED_RANGE = Table(
    "reserved range",
    {
        "name": Key(
            Text(r"[!-~]([ -~]{0,61}[!-~])?", "a name (1 to 63 printable ASCII characters)", "messages name it", 63),
            "Whose it is, in words.",
            REQUIRED,
        ),
        "range": Key(
            Range(8, 32, "no range of the mesh may overlap it"),
            "The range, of the underlay or of a network that hosts reach without the mesh.",
            REQUIRED,
        ),
    },
)

OVERLAY = Table(
    "overlay section",
    {
        "port": Key(_PORT, "UDP port of VXLAN, the same in the whole mesh.", 8472),
        "mtu": Key(
            Integer(576, 9000, "IPv4 needs 576, Ethernet carries 9000"),
            "Most bytes of a packet inside the tunnel; native ones are not bound by it.",
            None,
            "what the path carries, found out on each host ([routing.md](routing.md#mtu))",
        ),
    },
)

ESTATE = Table(
    "estate",
    {
        "schema": Key(Integer(1, 1000, "it says how the rest is to be read"), "Version of this schema.", VERSION),
        "name": Key(LABEL, "Name of the estate; never changed.", REQUIRED),
        "domain": Key(_DOMAIN, "Services are `<service>.<namespace>.svc.<domain>`.", "clusterset.local"),
        "max_clusters": Key(
            Choice((255, 511)),
            "Highest cluster id; 511 halves the identities of each. Never changed, equal for every member.",
            255,
        ),
        "overlay": Key(OVERLAY, "The VXLAN overlay.", None, "`{port: 8472}`"),
        "sites": Key(
            Mapped(LABEL, SITE, "site names"),
            "Networks whose hosts reach each other directly.",
            None,
            "those that clusters and hosts name",
        ),
        "routing": Key(
            _ROUTING,
            "How packets of the mesh go between hosts: through a VXLAN `tunnel`, `native` as the network itself routes "
            "the ranges of workloads, or as they are inside WireGuard where that encrypts, `hybrid`, native among the "
            "hosts of a site and through the tunnel to other sites, or `auto`, native where all hosts of two sites "
            "have proven that they reach each other so, else through the tunnel. See [routing.md](routing.md).",
            "tunnel",
        ),
        "encryption": Key(
            _ENCRYPTION,
            "How packets of the mesh between hosts are encrypted, where a site or a pair of them says nothing else: by "
            "`wireguard` from host to host ([encryption.md](encryption.md)), or between sites by their gateways, "
            "`ipsec-gateway` ([ipsec.md](ipsec.md)).",
            "none",
        ),
        "site_pairs": Key(Listing(SITE_PAIR), "What differs for a pair of sites.", ()),
        "clusters": Key(Mapped(CLUSTER_NAME, CLUSTER, "cluster names"), "The clusters.", REQUIRED),
        "reserved_ranges": Key(
            Listing(RESERVED_RANGE),
            "Ranges that the mesh must not use: of the underlay, VPNs, VPCs, offices.",
            (),
        ),
        "services": Key(Listing(SERVICE), "Services of machines.", ()),
    },
)

WORKLOAD = Table(
    "workload",
    {
        "name": Key(LABEL, "Name of the workload.", REQUIRED),
        "namespace": Key(LABEL, "Namespace.", "default"),
        "service_account": Key(LABEL, "Service account, part of its identity.", "default"),
        "labels": Key(Labels(), "Labels, part of its identity.", {}),
        "unit": Key(_UNIT, "systemd unit that is the workload."),
        "slice": Key(_SLICE, "systemd slice that is the workload."),
        "path": Key(_CGROUP_PATH, "cgroup that is the workload, below the cgroup2 root."),
        "address": Key(Address(), "Its address, inside the node range.", None, "dealt by the planner"),
        "state": Key(_STATE, _STATE_DOC, "present"),
    },
)

HOST = Table(
    "host variables",
    {
        "isthmus_cluster": Key(
            CLUSTER_NAME, "Cluster of the host. A host without it is not part of the mesh.", REQUIRED
        ),
        "isthmus_site": Key(LABEL, "Site of the host.", None, "its cluster's site"),
        "isthmus_underlay": Key(
            Address(),
            "Address that the host has on the network below the mesh.",
            None,
            "`ansible_host`, when that is a literal address",
        ),
        "isthmus_advertise": Key(
            Address(),
            "Address at which hosts of other sites reach it. Workloads and pods reach the host at its address in the "
            "mesh, not at this one where it is that of a NAT.",
            None,
            "`isthmus_underlay`",
        ),
        "isthmus_node_range": Key(
            Range(20, 30),
            "Range of the host's mesh address and workloads. It may grow around what was dealt, never move.",
            None,
            "dealt by the planner",
        ),
        "isthmus_kubernetes_node": Key(
            FalseOr(_KUBERNETES_NODE),
            "Name of the Kubernetes node that the host is; `false` for a machine of a Kubernetes cluster that is none.",
            None,
            "in a cluster with `kubernetes` the host's inventory name",
        ),
        "isthmus_bgp": Key(
            HOST_BGP, "What differs for the host from the `bgp` of its site, such as the router of its rack."
        ),
        "isthmus_labels": Key(Labels(), "Labels of the node.", {}),
        "isthmus_workloads": Key(Listing(WORKLOAD), "Processes with an address and identity of their own.", ()),
        "isthmus_state": Key(_STATE, _STATE_DOC, "present"),
    },
)

HOST_VARIABLES = (*HOST.keys, "ansible_host")
"""All that is read of a host's variables; others may hold anybody's secrets."""


PLAY_VARIABLES = {
    "isthmus_hosts": "Hosts that a playbook works on, as a pattern; `all` without it.",
    "isthmus_serial": "Hosts of each cluster that `site` changes at once, as `serial` of a play; else 1, 20%, 100%.",
    "isthmus_version": "Version of the collection that `site` may apply; a running estate is upgraded only by it.",
    "isthmus_prune": "Names of orphans to remove, as the plan lists them.",
    "isthmus_forget": "Names of lost hosts and clusters that `forget` takes out of the mesh for good.",
    "isthmus_break_lock": "Name of another run whose lock this run takes away, as the message about the lock gives it.",
    "isthmus_distrust": "Names of clusters whose etcd `plan` and `site` neither believe nor write, with commas.",
    "isthmus_confirm_teardown": "Name of the estate that `teardown` may take off the hosts.",
    "isthmus_backup_dir": "Directory on the controller where `backup` keeps what it makes.",
    "isthmus_backup_key": "File on the controller: an RSA public key, or its certificate, that `backup` encrypts to.",
    "isthmus_restore": "Cluster that `restore` restores.",
    "isthmus_rotate_wireguard_keys": "`true`: `site` and `plan` do what `rotate_wireguard_keys` does (encryption.md).",
    "isthmus_try_native": "`true`: `site` tries native again where `routing: auto` came to the tunnel (routing.md).",
    "isthmus_replace_authority": "Cluster whose certificate authority `replace_authority` replaces.",
    "isthmus_restore_from": "Time of the backup to restore (the name of its directory); by default the newest.",
    "isthmus_restore_key": "File on the controller: the private key that opens what `backup` encrypted.",
    "isthmus_restore_only": "`authority`: `restore` puts the certificate authority back and leaves the etcd as it is.",
    "isthmus_confirm_restore": "Cluster whose running etcd `restore` may replace, and whose silent hosts are off.",
    "isthmus_new_cluster": "Name of a cluster for which `address_plan` proposes an id and ranges.",
    "isthmus_new_nodes": "How many hosts the cluster `isthmus_new_cluster` is to have.",
    "isthmus_growth": "What `address_plan` looks for room for: hosts=40,services=100,onprem.hosts=200 (addresses.md).",
    "isthmus_address_file": "File on the controller that gets what `address_plan` shows, as JSON if it is .json.",
    "isthmus_firewall": "Of a host or group: `managed` opens the mesh's ports in ufw and firewalld; else `unmanaged`.",
    "isthmus_ipsec_secrets": "Pre-shared keys of pairs of sites, {cloud onprem: KEY}, in the order of the alphabet; "
    "in a vault.",
    "isthmus_bgp_passwords": "Of a host or group, also of all: by address of a router, the password of the session; "
    "in a vault.",
    "isthmus_api_host": "Of a host or group: where the API of its Kubernetes cluster is asked from; else localhost.",
    "isthmus_kubeconfig": "Of a host or group: kubeconfig on `isthmus_api_host` for its Kubernetes cluster; else what "
    "the environment there says (K8S_AUTH_*, KUBECONFIG), or ~/.kube/config.",
    "isthmus_kubeconfig_context": "Of a host or group: context in that kubeconfig; else its current one.",
    "isthmus_image": "With `control_plane: in_cluster`: registry, name and tag of the image that pods use.",
    "isthmus_image_archive": "The archive of `make image` on the controller, which is pushed there; else it is there.",
    "isthmus_image_username": "User of that registry; else what `skopeo login` left.",
    "isthmus_image_password": "Their password or token, from a vault.",
    "isthmus_image_ca_certificates": "Directory with the authority (ca.crt) of a registry that is not publicly known.",
    "isthmus_image_import": "Hosts of the inventory that import the archive into containerd; nothing is pushed then.",
    "isthmus_bundles": "List of further directories on the controller with bundles of the agent.",
    "isthmus_bundle_python": "Interpreter of the agent on the host, instead of the newest that a bundle fits.",
}
"""What the playbooks and roles read besides; nothing of the mesh's plan."""

_PREFIX = "isthmus_"
_VARIABLES = (*HOST.keys, *PLAY_VARIABLES, "isthmus_estate")


def misspelt_variable(name: str) -> str | None:
    """The variable of the plan that one was certainly meant to be: a slip of a letter or two."""
    known = [*HOST.keys, "isthmus_estate"]
    return None if name in _VARIABLES else nearest(name, known, 0.9)


def unknown_variable(name: str) -> str | None:
    """What to do about a variable with our prefix that is none of ours; None for every other one."""
    if not name.startswith(_PREFIX) or name in _VARIABLES:
        return None
    near = nearest(name[len(_PREFIX) :], [known[len(_PREFIX) :] for known in _VARIABLES])
    return f"did you mean {_PREFIX + near!r}?" if near else "rename it, if it is your own"
