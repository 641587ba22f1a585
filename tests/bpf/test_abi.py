# SPDX-License-Identifier: GPL-3.0-or-later
"""C and Python agree on every struct: the layouts against the BTF of the compiled objects."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from isthmus_agent.bpf import abi
from isthmus_agent.bpf.driver import OBJECTS_DIR

HEADER = Path(__file__).parents[2] / "bpf" / "include" / "abi.h"
STRUCTS = re.findall(r"^struct (isthmus_\w+) \{", HEADER.read_text(), re.MULTILINE)


def _btf() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in ("cgroup", "overlay"):
        raw = subprocess.run(
            ["bpftool", "-j", "btf", "dump", "file", str(OBJECTS_DIR / f"{name}.bpf.o"), "format", "raw"],
            check=True,
            capture_output=True,
        ).stdout
        for each in json.loads(raw)["types"]:
            if each["kind"] == "STRUCT":
                found.setdefault(each["name"], each)
            elif each["kind"] == "DATASEC" and each["name"] == ".rodata":
                found[f".rodata of {name}"] = each
    return found


@pytest.fixture(scope="module")
def btf() -> dict[str, dict[str, Any]]:
    return _btf()


def _offsets(layout: abi.Layout) -> dict[str, int]:
    items = re.findall(r"\d*[a-zA-Z]", layout.format)
    assert len(items) == len(layout.fields)
    return {name: struct.calcsize("<" + "".join(items[:index])) for index, name in enumerate(layout.fields)}


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_what_the_compiler_made(btf: dict[str, dict[str, Any]], name: str) -> None:
    layout = abi.LAYOUTS[name]
    compiled = btf[name]
    assert layout.struct.size == compiled["size"]
    assert _offsets(layout) == {member["name"]: member["bits_offset"] // 8 for member in compiled["members"]}


def test_no_layout_is_left_over() -> None:
    assert set(abi.LAYOUTS) == set(STRUCTS)


def test_the_configuration_is_all_of_rodata(btf: dict[str, dict[str, Any]]) -> None:
    for name in ("cgroup", "overlay"):
        (variable,) = btf[f".rodata of {name}"]["vars"]
        assert (variable["offset"], variable["size"]) == (0, abi.CONFIG.size)


@pytest.mark.parametrize(
    ("prefix", "enum", "extra"), [("ISTHMUS_DROP_", abi.Drop, {"MAX"}), ("ISTHMUS_META_", abi.Meta, {"MAX"})]
)
def test_enum_is_the_same(prefix: str, enum: type[abi.Drop] | type[abi.Meta], extra: set[str]) -> None:
    names = re.findall(rf"^\t{prefix}(\w+)(?: = \d+)?,", HEADER.read_text(), re.MULTILINE)
    assert [name for name in names if name not in extra] == [each.name for each in enum]
    assert [each.value for each in enum] == list(range(len(enum)))


def test_version_and_flags_are_the_same() -> None:
    text = HEADER.read_text()
    assert f"#define ISTHMUS_ABI_VERSION {abi.ABI_VERSION}\n" in text
    assert re.search(r"#define ISTHMUS_IPCACHE_NODE\s+\(1 << 0\)", text)
    assert re.search(r"#define ISTHMUS_IPCACHE_FIXED\s+\(1 << 1\)", text)
    assert re.search(r"#define ISTHMUS_IPCACHE_ENCRYPTED\s+\(1 << 2\)", text)
    assert re.search(r"#define ISTHMUS_IPCACHE_NATIVE\s+\(1 << 3\)", text)
    assert re.search(r"#define ISTHMUS_IPCACHE_INSIDE\s+\(1 << 4\)", text)
    assert re.search(r"#define ISTHMUS_PEER_NATIVE\s+\(1 << 1\)", text)
    assert re.search(r"#define ISTHMUS_PEER_ENCRYPTED\s+\(1 << 0\)", text)
    assert re.search(r"#define ISTHMUS_CONFIG_SET_RETVAL\s+\(1 << 0\)", text)
