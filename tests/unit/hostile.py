# SPDX-License-Identifier: GPL-3.0-or-later
"""What somebody who wants harm writes instead of a JSON document: strategies for the tests of decoders."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]


class Raw(str):
    """JSON text that stands for itself: what `json.dumps` would never write."""


class Twice:
    """An object with one more entry, whose name is there already (or differs from another's in case only)."""

    def __init__(self, document: dict[str, Any], name: str, value: Any, first: bool) -> None:
        entries = list(document.items())
        self.entries = [(name, value), *entries] if first else [*entries, (name, value)]


RAW = (
    *("1e999", "-1e999", "NaN", "Infinity", "1e-999", "-0", "1.0", "007", "18446744073709551616", "9" * 5000),
    *('"\\ud800"', '"\\u0000"', '"' + "x" * 70_000 + '"', "[" * 300 + "]" * 300, "[" * 50_000, '{"a":' * 300 + "0"),
    *('"' + "\\u2028" * 2000 + '"', "[" + ",".join(["{}"] * 5000) + "]", '"::ffff:198.18.1.11"', '"fe80::1%eth0"', ""),
)
WORDS = (
    *(
        "10.101.0.2",
        "198.18.1.11",
        "10.102.0.1",
        "0.0.0.0",  # noqa: S104 - an address that is claimed, not bound
        "::1",
        "10.101.0.0/28",
        "0.0.0.0/0",
        "fd00::/64",
        "//8AAA==",
    ),
    *(
        "onprem",
        "cloud",
        "shop",
        "present",
        "absent",
        "TCP",
        "2026-01-02T03:04:05Z",
        "a/b/c",
        "",
        "..",
        "\x1b[31m",
        "\n",
    ),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2**65)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS)
    | st.sampled_from(RAW).map(Raw)
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OPERATIONS = ("drop", "replace", "replace", "replace", "wrap", "twice first", "twice last", "other case", "add", "swap")


def places(document: Any, here: Path = ()) -> list[Path]:
    """The way to everything inside a document, from the outside to the inside."""
    found = [here]
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*here, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            found += places(value, (*here, index))
    return found


def changed(document: Any, path: Path, how: str, junk: Any, other: Any) -> Any:
    """A copy of `document` in which one place is not what it was."""
    if path:
        head, *rest = path
        if len(path) == 1 and isinstance(document, dict):
            if how == "drop":
                return {key: value for key, value in document.items() if key != head}
            if how.startswith("twice"):
                return Twice(document, head, junk, how.endswith("first"))
            if how == "other case":
                return Twice(document, head.swapcase(), junk, first=False)
        if isinstance(document, dict):
            return {**document, head: changed(document[head], tuple(rest), how, junk, other)}
        inner = changed(document[head], tuple(rest), how, junk, other)
        return [*document[:head], inner, *document[head + 1 :]]
    if how == "wrap":
        return [document]
    if how == "swap":
        return other
    if how == "add" and isinstance(document, dict):
        return {**document, "added": junk}
    return junk


def say(value: Any) -> str:
    """JSON text of a document and of what is none."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, (dict, Twice)):
        entries = value.items() if isinstance(value, dict) else value.entries
        return "{" + ",".join(f"{json.dumps(key)}:{say(inner)}" for key, inner in entries) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(say, value)) + "]"
    return json.dumps(value)


def at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> bytes:
    """A valid document with one to three changes, as bytes; now and then cut off or with strange bytes in it."""
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(document, (dict, list)):
            break
        path = draw(st.sampled_from(places(document)))
        other = at(document, draw(st.sampled_from(places(document))))
        document = changed(document, path, draw(st.sampled_from(OPERATIONS)), draw(JUNK), other)
        if "Twice" in repr(document):
            break
    raw = say(document).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        where = draw(st.integers(0, len(raw)))
        raw = raw[:where] + draw(st.binary(max_size=4)) + raw[where + draw(st.integers(0, 4)) :]
    return raw


def hostile(document: Any) -> st.SearchStrategy[bytes]:
    """Instead of `document`: itself with changes, any JSON, any bytes."""
    anything = JUNK.map(say).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(mutated(document), mutated(document), anything, st.binary(max_size=80))
