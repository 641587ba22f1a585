# SPDX-License-Identifier: GPL-3.0-or-later
"""Our table in netfilter, on a Kubernetes node, where packets go natively and where packets that leave the mesh are
masqueraded: the source of packets of the mesh stays what it is. On other hosts there is one with a single rule, while
another program translates sources there: a chain of NAT has the kernel follow every connection of the host.

A CNI masquerades what leaves its pods, and kube-proxy what it marked for that. An `accept` in an earlier chain does not
stop a later masquerade; a null binding (`snat to ip saddr`) does, because a connection is given a source translation
once. Ours is a table of its own (`ip isthmus`), so neither `iptables-restore` nor the reload of a CNI or of kube-proxy
touches it; `nft flush ruleset` does, and the agent puts it back.

What was masqueraded before this table was there stays so until it ends: netfilter drops such a packet when it leaves by
another device than the first did, so it gets a mark, for which a rule leads it as before.

nf_tables is spoken directly (uapi/linux/netfilter/nf_tables.h), one transaction a change: the rules are few and fixed,
and a node need have neither the program nft nor its library.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import TracebackType

from isthmus_mesh.ipsec import GUARD, KEPT

from isthmus_agent.desired.datapath import MASQUERADED, BarePods, KeepSource
from isthmus_agent.netlink import messages
from isthmus_agent.netlink.errors import NetworkError
from isthmus_agent.netlink.messages import attribute, attributes

TABLE = "isthmus"
SET = "local"
MEMBERS = "members"
MESH = "mesh"
BARE = "bare"
GUARDS = (GUARD, KEPT)
"""Tables with the rules of gateways, which are not the agent's. A packet that one drops does not come to the other."""
MASQUERADE_MARK = 0x4000  # kube-proxy's (masqueradeBit 14): it masquerades what it marked, and has a reason to

NETLINK_NETFILTER = 12
_FAMILY = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_U32 = struct.Struct("!I")
_I32 = struct.Struct("!i")
_U64 = struct.Struct("!Q")
_APPEND = 0x800
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10
_INET, _IPV4 = 1, 2
_TIMEOUT = 10.0  # seconds; the kernel answers within the call
_BUFFER = 1 << 20
_SO_SNDBUFFORCE = 32  # a transaction is sent whole
_DUMPS = 5
_MANY = 512  # elements; an attribute holds 64 KiB
_SET_IDS = {SET: 1, MEMBERS: 2, MESH: 3, BARE: 4}  # within a transaction

# Messages.
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE, _GETRULE = 0, 1, 2, 3, 4, 6, 7
_NEWSET, _NEWSETELEM, _GETSETELEM = 9, 12, 13
# Attributes.
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 4, 7
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LENGTH, _SET_ID, _SET_USERDATA = 1, 2, 3, 4, 5, 10, 13
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS, _ELEMENTS_SET_ID = 1, 2, 3, 4
_ELEMENT_KEY, _ELEMENT_FLAGS = 1, 3
_LIST_ELEMENT, _EXPRESSION_NAME, _EXPRESSION_DATA, _DATA_VALUE = 1, 1, 2, 1
_COUNTER_PACKETS = 2
# Values.
_INTERVAL_SET, _INTERVAL_END = 0x4, 0x1
_TYPE_IPV4 = 7  # nft's number of ipv4_addr
_KEY_IS_BIG_ENDIAN = struct.pack("=BBI", 0, 4, 2)  # nft's userdata of a set: without it nft shows the keys reversed
_HOOK_PREROUTING, _HOOK_FORWARD, _HOOK_POSTROUTING = 0, 2, 4
_ACCEPT = 1
_REGISTER = 1
_META_MARK, _META_IN, _META_OUT = 3, 6, 7
_CT_DIRECTION = 1
_CT_SOURCE, _CT_DESTINATION = 19, 20  # of IPv4
_CT_ORIGINAL, _CT_REPLY = 0, 1
_SOURCE, _DESTINATION = 12, 16  # offsets in an IPv4 header
_EQUAL, _UNEQUAL = 0, 1

_AFTER_DSTNAT = -90  # destinations are translated at -100, also back
_BEFORE_SRCNAT = -199  # the first that a chain of NAT can have; iptables, kube-proxy and CNIs have 100
_FIRST, _LAST = -1000, 1000


def _nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | messages.NESTED, b"".join(parts))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, _U32.pack(value))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _expression(name: str, *parts: bytes) -> bytes:
    return _nested(_LIST_ELEMENT, _text(_EXPRESSION_NAME, name), _nested(_EXPRESSION_DATA, *parts))


def _value(kind: int, value: bytes) -> bytes:
    return _nested(kind, attribute(_DATA_VALUE, value))


def _compare(value: bytes, how: int = _EQUAL) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, how), _value(3, value))


def _mask(mask: bytes, flipped: bytes = b"") -> bytes:
    return _expression(
        "bitwise",
        _number(1, _REGISTER),
        _number(2, _REGISTER),
        _number(3, len(mask)),
        _value(4, mask),
        _value(5, flipped or bytes(len(mask))),
    )


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, _REGISTER), _number(2, key))


def _address(offset: int) -> bytes:
    return _expression("payload", _number(1, _REGISTER), _number(2, 1), _number(3, offset), _number(4, 4))


def _not_marked(how: int = _EQUAL) -> bytes:
    return _meta(_META_MARK) + _mask(struct.pack("=I", MASQUERADE_MARK)) + _compare(bytes(4), how)


def _device(key: int, name: str, how: int = _EQUAL) -> bytes:
    return _meta(key) + _compare(name.encode().ljust(16, b"\0"), how)


def _is_in(name: str, inverted: bool = False) -> bytes:
    flags = [_number(5, 1)] if inverted else []  # NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV
    return _expression("lookup", _text(1, name), _number(2, _REGISTER), _number(4, _SET_IDS[name]), *flags)


def _is_local(offset: int, inverted: bool = False) -> bytes:
    return _address(offset) + _is_in(SET, inverted)


def _connection(key: int, direction: int) -> bytes:
    return _expression("ct", _number(1, _REGISTER), _number(2, key), attribute(3, bytes((direction,))))


def _was_masqueraded() -> bytes:
    """A local address began the connection, and replies come to another that is none."""
    began, seen = _connection(_CT_SOURCE, _CT_ORIGINAL), _connection(_CT_DESTINATION, _CT_REPLY)
    return began + _is_in(SET) + seen + _is_in(SET, inverted=True)


def _mark(mark: int) -> bytes:
    """Sets the lowest byte of the mark."""
    changed = _mask(struct.pack("=I", 0xFFFFFF00), struct.pack("=I", mark))
    return _meta(_META_MARK) + changed + _expression("meta", _number(2, _META_MARK), _number(3, _REGISTER))


def _within(offset: int, network: IPv4Network) -> bytes:
    return _address(offset) + _mask(network.netmask.packed) + _compare(network.network_address.packed)


def _keep() -> bytes:
    """`snat to ip saddr`: type snat, family, register of the address."""
    return _address(_SOURCE) + _expression("nat", _number(1, 0), _number(2, _IPV4), _number(3, _REGISTER))


def _send_as(address: IPv4Address) -> bytes:
    """`snat to <address>`."""
    immediate = _expression("immediate", _number(1, _REGISTER), _value(2, address.packed))
    return immediate + _expression("nat", _number(1, 0), _number(2, _IPV4), _number(3, _REGISTER))


def _count() -> bytes:
    return _expression("counter")


@dataclass(frozen=True, slots=True)
class _Chain:
    name: str
    kind: str
    hook: int
    priority: int


_PREROUTING = _Chain("prerouting", "filter", _HOOK_PREROUTING, _AFTER_DSTNAT)
_POSTROUTING = _Chain("postrouting", "nat", _HOOK_POSTROUTING, _BEFORE_SRCNAT)
# What enters the first and never reaches the last was dropped by another filter of this node.
_FORWARD_FIRST = _Chain("forward-first", "filter", _HOOK_FORWARD, _FIRST)
_FORWARD_LAST = _Chain("forward-last", "filter", _HOOK_FORWARD, _LAST)
_CHAINS = (_PREROUTING, _POSTROUTING, _FORWARD_FIRST, _FORWARD_LAST)
_PRECAUTION = (_POSTROUTING,)
# The tables of the iptables that is not nf_tables', a name a line.
_XTABLES = Path("/proc/thread-self/net/ip_tables_names")


@dataclass(frozen=True, slots=True)
class _Rule:
    """`comment` is what tells whether a rule that is there is this one: it has a digest of the expressions."""

    chain: str
    expressions: bytes
    comment: str


def _rule(chain: _Chain, words: str, *expressions: bytes) -> _Rule:
    body = b"".join(expressions)
    return _Rule(chain.name, body, f"{words} [{hashlib.sha256(body).hexdigest()[:8]}]")


def _ways(wanted: KeepSource, device: str) -> Iterator[tuple[str, bytes, int]]:
    """By which packets between pods and the mesh go and come: (words, what matches them, where pods' addresses are)."""
    for name in (device, *(wanted.bare.devices if wanted.bare is not None else ())):
        words = "" if name == device else f" by {name}"
        yield f"into the mesh{words}", _device(_META_OUT, name), _SOURCE
        yield f"out of the mesh{words}", _device(_META_IN, name), _DESTINATION
    if wanted.bare is not None and wanted.bare.networks:
        for words, offset, key, pods in (
            ("into", _DESTINATION, _META_OUT, _SOURCE),
            ("out of", _SOURCE, _META_IN, _DESTINATION),
        ):
            yield f"{words} the mesh natively", _device(key, device, _UNEQUAL) + _address(offset) + _is_in(BARE), pods


def _bare_rules(bare: BarePods) -> Iterator[_Rule]:
    for address in sorted(bare.underlay):
        yield _rule(
            _PREROUTING,
            f"replies of backends to what came to {address}",
            _expression("ct", _number(1, _REGISTER), _number(2, _CT_DIRECTION)),
            _compare(bytes((_CT_REPLY,))),
            _connection(_CT_DESTINATION, _CT_ORIGINAL),
            _compare(address.packed),
            _mark(MASQUERADED),
        )
    going = {f"by {name}": _device(_META_OUT, name) for name in bare.devices}
    if bare.networks:
        # However it goes: netfilter would drop what was masqueraded for another device.
        going["natively"] = _address(_DESTINATION) + _is_in(BARE)
    for words, matched in going.items():
        yield _rule(
            _POSTROUTING, f"masqueraded by kube-proxy, {words}", matched, _not_marked(_UNEQUAL), _send_as(bare.mesh)
        )
    if bare.networks:
        yield _rule(
            _POSTROUTING,
            "from pods to members",
            _is_local(_SOURCE),
            _not_marked(),
            _address(_DESTINATION),
            _is_in(MEMBERS),
            _keep(),
        )
        # Not what was sent to a port of this node, which is the CNI's.
        yield _rule(
            _POSTROUTING,
            "from members to pods",
            _address(_SOURCE),
            _is_in(MEMBERS),
            _not_marked(),
            _is_local(_DESTINATION),
            _connection(_CT_DESTINATION, _CT_ORIGINAL),
            _is_in(SET),
            _keep(),
        )


def _rules(wanted: KeepSource, device: str) -> tuple[_Rule, ...]:
    unmarked = _not_marked() if wanted.bare is not None else b""
    natively = _rule(_POSTROUTING, "from this host's mesh addresses", _within(_SOURCE, wanted.host), unmarked, _keep())
    if wanted.precaution:
        return (natively,)
    ways = tuple(_ways(wanted, device))
    outside = _rule(
        _POSTROUTING,
        "from this host's mesh addresses to outside the mesh",
        _within(_SOURCE, wanted.host),
        _device(_META_OUT, device, _UNEQUAL),
        _device(_META_OUT, "lo", _UNEQUAL),
        _address(_DESTINATION),
        _is_in(MESH, inverted=True),
        _expression("masq"),
    )
    return (
        *(
            _rule(
                _PREROUTING,
                f"masqueraded before, {words} members",
                _address(offset),
                _is_in(MEMBERS),
                _was_masqueraded(),
                _mark(MASQUERADED),
            )
            for words, offset in (("to", _DESTINATION), ("from", _SOURCE))
        ),
        *((outside,) if wanted.mesh is not None else ()),
        *(_bare_rules(wanted.bare) if wanted.bare is not None else ()),
        *((natively,) if wanted.native else ()),
        *(
            _rule(_POSTROUTING, words, matched, _not_marked(), _is_local(offset), _keep())
            for words, matched, offset in ways
        ),
        _rule(
            _POSTROUTING,
            "from this host's mesh addresses to its pods",
            _within(_SOURCE, wanted.host),
            _not_marked(),
            _is_local(_DESTINATION),
            _keep(),
        ),
        *(
            _rule(
                _POSTROUTING,
                f"from pods to those of other nodes in {pods}",
                _is_local(_SOURCE),
                _not_marked(),
                _within(_DESTINATION, pods),
                _is_local(_DESTINATION, inverted=True),
                _keep(),
            )
            for pods in sorted(wanted.pods)
        ),
        *(
            _rule(chain, words, matched, _count())
            for chain in (_FORWARD_FIRST, _FORWARD_LAST)
            for words, matched, _offset in ways
        ),
    )


def _comment(text: str) -> bytes:
    """nft's userdata of a rule: a comment."""
    return struct.pack("=BB", 0, len(text) + 1) + text.encode() + b"\0"


def _elements(networks: Sequence[IPv4Network]) -> list[tuple[bytes, bool]]:
    """(first address of the interval, False), (the one behind it, True)."""
    found = []
    for network in sorted(networks):
        found.append((network.network_address.packed, False))
        found.append(((network.broadcast_address + 1).packed, True))
    return found


@dataclass(frozen=True, slots=True)
class _Real:
    """What the kernel has of our table. `forwarded`: packets of the first and of the last chain of forward.
    `chains` None: not asked for, and neither for the elements of `members` and `mesh`."""

    chains: frozenset[_Chain] | None
    rules: tuple[tuple[str, str], ...]  # chain, comment
    elements: dict[str, frozenset[tuple[bytes, bool]]]  # by set
    forwarded: tuple[int, int]


class _Netfilter:
    """A netlink socket of the calling thread's namespace."""

    def __init__(self) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT)
        self._socket.bind((0, 0))

    def __enter__(self) -> _Netfilter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._socket.close()

    def _message(self, kind: int, flags: int, body: bytes, family: int = _IPV4, resource: int = 0) -> bytes:
        self._sequence += 1
        return messages.message(kind, flags, self._sequence, _FAMILY.pack(family, 0, resource) + body)

    def transaction(self, parts: Sequence[tuple[int, int, bytes]]) -> int:
        """Does all of (message, flags, body), or nothing; answers an errno, 0 when it was done."""
        begin = self._message(_BATCH_BEGIN, messages.REQUEST, b"", 0, _SUBSYSTEM)
        first = self._sequence
        asked = messages.REQUEST | messages.ACK
        changes = [self._message(_SUBSYSTEM << 8 | kind, asked | flags, body) for kind, flags, body in parts]
        end = self._message(_BATCH_END, messages.REQUEST, b"", 0, _SUBSYSTEM)
        data = b"".join((begin, *changes, end))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, len(data))
        self._socket.send(data)
        done = 0
        for kind, _, sequence, payload in self._answers():
            if kind != messages.ERROR or sequence < first:
                continue
            number = messages.error_number(payload)
            done += 1
            if number or done == len(parts):
                return number
        raise AssertionError("answers do not end")

    def dump(self, kind: int, body: bytes = b"", family: int = _IPV4) -> list[dict[int, bytes]]:
        """Attributes of all objects of a kind; none when the table is not there."""
        found: list[dict[int, bytes]] = []
        for _ in range(_DUMPS):
            self._socket.send(self._message(_SUBSYSTEM << 8 | kind, messages.REQUEST | messages.DUMP, body, family))
            number = self._sequence
            found = []
            whole = True
            for answer, flags, sequence, payload in self._answers():
                if sequence != number:
                    continue
                whole = whole and not flags & messages.DUMP_INTERRUPTED
                if answer == messages.DONE:
                    break
                if answer == messages.ERROR:
                    code = messages.error_number(payload)
                    if code == errno.ENOENT:
                        return []
                    raise NetworkError(f"cannot read nf_tables: {os.strerror(code)}")
                found.append(dict(attributes(payload[_FAMILY.size :])))
            if whole:
                break
        return found

    def _answers(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, sequence, payload) of what comes, without end."""
        while True:
            yield from messages.split(self._socket.recv(_BUFFER))


def _is_there(netfilter: _Netfilter) -> bool:
    """Whether there is a table of ours; a kernel without nf_tables has none."""
    try:
        return any(_name(each.get(_TABLE_NAME)) == TABLE for each in netfilter.dump(_GETTABLE))
    except NetworkError:
        return False


def _chains(netfilter: _Netfilter, family: int = _IPV4) -> Iterator[tuple[str, _Chain]]:
    """With the table of each."""
    for each in netfilter.dump(_GETCHAIN, family=family):
        hook = dict(attributes(each.get(_CHAIN_HOOK, b"")))
        place = (_U32.unpack(hook[_HOOK_NUMBER])[0], _I32.unpack(hook[_HOOK_PRIORITY])[0]) if hook else (-1, 0)
        chain = _Chain(_name(each.get(_CHAIN_NAME)), _name(each.get(_CHAIN_TYPE)), *place)
        yield _name(each.get(_CHAIN_TABLE)), chain


def _others_translate(netfilter: _Netfilter) -> bool:
    """Whether another program has a place here where sources are translated."""
    try:
        for family in (_IPV4, _INET):
            for table, chain in _chains(netfilter, family):
                ours = family == _IPV4 and table == TABLE
                if not ours and (chain.kind, chain.hook) == (_POSTROUTING.kind, _POSTROUTING.hook):
                    return True
    except NetworkError:
        pass  # a kernel without nf_tables may have the other
    try:
        return "nat" in _XTABLES.read_text().split()
    except OSError:
        return False  # a kernel, or a namespace, without it


def _read(netfilter: _Netfilter, whole: bool = True) -> _Real | None:
    """None when the table is not there. The kernel lists the chains of all tables or none, and members may be many:
    without `whole` neither are asked for."""
    if not _is_there(netfilter):
        return None
    rules: list[tuple[str, str]] = []
    packets = {_FORWARD_FIRST.name: 0, _FORWARD_LAST.name: 0}
    for each in netfilter.dump(_GETRULE, _text(_RULE_TABLE, TABLE)):
        if _name(each.get(_RULE_TABLE)) != TABLE:  # kernels that do not filter
            continue
        chain = _name(each.get(_RULE_CHAIN))
        rules.append((chain, _name(each.get(_RULE_USERDATA, b"\0\0")[2:])))
        if chain in packets:
            packets[chain] += _packets(each.get(_RULE_EXPRESSIONS, b""))
    elements = {name: _read_set(netfilter, name) for name in _SET_IDS if whole or name == SET}
    forwarded = (packets[_FORWARD_FIRST.name], packets[_FORWARD_LAST.name])
    chains = frozenset(chain for table, chain in _chains(netfilter) if table == TABLE) if whole else None
    return _Real(chains, tuple(rules), elements, forwarded)


def _read_set(netfilter: _Netfilter, name: str) -> frozenset[tuple[bytes, bool]]:
    elements = set()
    for each in netfilter.dump(_GETSETELEM, _text(_ELEMENTS_TABLE, TABLE) + _text(_ELEMENTS_SET, name)):
        for _, raw in attributes(each.get(_ELEMENTS, b"")):
            element = dict(attributes(raw))
            key = dict(attributes(element.get(_ELEMENT_KEY, b""))).get(_DATA_VALUE, b"")
            flags = _U32.unpack(element[_ELEMENT_FLAGS])[0] if _ELEMENT_FLAGS in element else 0
            elements.add((key, bool(flags & _INTERVAL_END)))
    return frozenset(elements)


def _name(raw: bytes | None) -> str:
    return (raw or b"").split(b"\0")[0].decode(errors="replace")


def _packets(expressions: bytes) -> int:
    """What the counter of a rule has counted."""
    for _, raw in attributes(expressions):
        expression = dict(attributes(raw))
        if _name(expression.get(_EXPRESSION_NAME)) == "counter":
            counter = dict(attributes(expression.get(_EXPRESSION_DATA, b"")))
            return int(_U64.unpack(counter[_COUNTER_PACKETS])[0])
    return 0


def _differences(real: _Real | None, wanted: KeepSource, device: str) -> list[str]:
    words = f"nft table ip {TABLE}"
    if real is None:
        return [f"{words} is missing"]
    found = []
    if real.chains is not None and real.chains != set(_chains_of(wanted)):
        found.append(f"{words} has other chains than wanted")
    rules = _rules(wanted, device)
    if sorted(real.rules) != sorted((each.chain, each.comment) for each in rules):
        found.append(f"{words} has other rules than wanted")
    for name, networks in _sets(wanted).items():
        if name not in real.elements or real.elements[name] == set(_elements(list(networks))):
            continue
        begins = sorted(key for key, end in real.elements[name] if not end and len(key) == 4)
        has = ", ".join(str(IPv4Address(key)) for key in begins)
        wants = ", ".join(str(each) for each in sorted(networks))
        found.append(f"{words}: set {name} begins intervals at {has or 'nothing'}; wanted: {wants or 'nothing'}")
    return found


def _chains_of(wanted: KeepSource) -> tuple[_Chain, ...]:
    return _PRECAUTION if wanted.precaution else _CHAINS


def _chain_body(chain: _Chain) -> bytes:
    hook = _nested(
        _CHAIN_HOOK,
        _number(_HOOK_NUMBER, chain.hook),
        attribute(_HOOK_PRIORITY, _I32.pack(chain.priority)),
    )
    return (
        _text(_CHAIN_TABLE, TABLE)
        + _text(_CHAIN_NAME, chain.name)
        + hook
        + _number(_CHAIN_POLICY, _ACCEPT)
        + _text(_CHAIN_TYPE, chain.kind)
    )


def _sets(wanted: KeepSource) -> dict[str, frozenset[IPv4Network]]:
    if wanted.precaution:
        return {}
    outside = {} if wanted.mesh is None else {MESH: wanted.mesh}
    natively = {BARE: wanted.bare.networks} if wanted.bare is not None and wanted.bare.networks else {}
    return {SET: wanted.local, MEMBERS: wanted.members, **outside, **natively}


def _set_parts(name: str, networks: Sequence[IPv4Network]) -> Iterator[tuple[int, int, bytes]]:
    yield (
        _NEWSET,
        messages.CREATE,
        _text(_SET_TABLE, TABLE)
        + _text(_SET_NAME, name)
        + _number(_SET_FLAGS, _INTERVAL_SET)
        + _number(_SET_KEY_TYPE, _TYPE_IPV4)
        + _number(_SET_KEY_LENGTH, 4)
        + _number(_SET_ID, _SET_IDS[name])
        + attribute(_SET_USERDATA, _KEY_IS_BIG_ENDIAN),
    )
    elements = [
        _nested(_LIST_ELEMENT, *([_number(_ELEMENT_FLAGS, _INTERVAL_END)] if end else []), _value(_ELEMENT_KEY, key))
        for key, end in _elements(networks)
    ]
    for start in range(0, len(elements), _MANY):
        yield (
            _NEWSETELEM,
            messages.CREATE,
            _text(_ELEMENTS_TABLE, TABLE)
            + _text(_ELEMENTS_SET, name)
            + _number(_ELEMENTS_SET_ID, _SET_IDS[name])
            + _nested(_ELEMENTS, *elements[start : start + _MANY]),
        )


def _parts(wanted: KeepSource, device: str) -> list[tuple[int, int, bytes]]:
    """The table as it should be, instead of what is there."""
    table = _text(_TABLE_NAME, TABLE)
    return [
        (_NEWTABLE, messages.CREATE, table),
        (_DELTABLE, 0, table),
        (_NEWTABLE, messages.CREATE, table),
        *((_NEWCHAIN, messages.CREATE, _chain_body(chain)) for chain in _chains_of(wanted)),
        *(part for name, networks in _sets(wanted).items() for part in _set_parts(name, list(networks))),
        *(
            (
                _NEWRULE,
                messages.CREATE | _APPEND,
                _text(_RULE_TABLE, TABLE)
                + _text(_RULE_CHAIN, rule.chain)
                + _nested(_RULE_EXPRESSIONS, rule.expressions)
                + attribute(_RULE_USERDATA, _comment(rule.comment)),
            )
            for rule in _rules(wanted, device)
        ),
    ]


def apply_keep_source(wanted: KeepSource | None, device: str, settled: bool = True) -> tuple[str, ...]:
    """Makes our table what is wanted (None: there is none), in one step; answers what was done.

    `device` is the overlay's name. NetworkError when the kernel refuses it; what was there stays then. Not `settled`:
    a precaution against nobody stays, as whoever loads rules anew may have taken away what comes back at once."""
    with _Netfilter() as netfilter:
        if wanted is None or (wanted.precaution and not _others_translate(netfilter)):
            return tuple(f"remove {words}" for words in _remove(netfilter)) if wanted is None or settled else ()
        real = _read(netfilter)
        if not _differences(real, wanted, device):
            return ()
        if number := netfilter.transaction(_parts(wanted, device)):
            raise NetworkError(
                f"cannot write nft table ip {TABLE}: {os.strerror(number)}; is nf_tables with NAT there "
                "(CONFIG_NF_TABLES, CONFIG_NFT_NAT, CONFIG_NFT_CT, to masquerade CONFIG_NFT_MASQ; modprobe "
                "nft_chain_nat nft_ct nft_masq)?"
            )
        return (f"{'add' if real is None else 'change'} nft table ip {TABLE}",)


def audit_keep_source(wanted: KeepSource | None, device: str) -> list[str]:
    """What differs from what is wanted, in words. Changes nothing. Whether a precaution is there is no part of it:
    `mend_keep_source` sees to that, and tells when it cannot be made."""
    with _Netfilter() as netfilter:
        if wanted is None:
            return [f"nft table ip {TABLE} is not wanted"] if _is_there(netfilter) else []
        real = _read(netfilter)
        return [] if real is None and wanted.precaution else _differences(real, wanted, device)


def remove_keep_source() -> list[str]:
    """Removes our table; answers what was removed."""
    with _Netfilter() as netfilter:
        return _remove(netfilter)


def _remove(netfilter: _Netfilter) -> list[str]:
    if not _is_there(netfilter):
        return []
    number = netfilter.transaction([(_DELTABLE, 0, _text(_TABLE_NAME, TABLE))])
    if number and number != errno.ENOENT:
        raise NetworkError(f"cannot remove nft table ip {TABLE}: {os.strerror(number)}")
    return [f"nft table ip {TABLE}"]


def mend_keep_source(wanted: KeepSource, device: str, settled: bool = True) -> tuple[tuple[str, ...], int]:
    """Puts our table back when another program changed it or took it away: (what differed, in words; packets between
    pods and the mesh that another filter of this host dropped while they were forwarded, since our table was made).
    NetworkError when the kernel refuses it.

    Asks for our own rules only, so that it costs little beside a kube-proxy with tens of thousands.

    A precaution is made, and goes if others have `settled`: (what was done; 0)."""
    if wanted.precaution:
        return apply_keep_source(wanted, device, settled), 0
    with _Netfilter() as netfilter:
        real = _read(netfilter, whole=False)
        found = _differences(real, wanted, device)
    if found:
        apply_keep_source(wanted, device)
        return tuple(found), 0
    if real is None:
        return (), 0
    first, last = real.forwarded
    return (), max(0, first - last)


def guard_drops() -> int:
    """Packets that the rules of gateways of this host dropped since they were loaded. Only a drop has a counter there.
    NetworkError."""
    with _Netfilter() as netfilter:
        return sum(
            _packets(rule.get(_RULE_EXPRESSIONS, b""))
            for name in GUARDS
            for rule in netfilter.dump(_GETRULE, _text(_RULE_TABLE, name))
            if _name(rule.get(_RULE_TABLE)) == name  # kernels that do not filter
        )
