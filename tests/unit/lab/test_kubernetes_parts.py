# SPDX-License-Identifier: GPL-3.0-or-later
"""How Kubernetes' programs come into the cache, with a `go` that only pretends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_parts as parts
import pytest

# Counts its builds, waits for a line in the fifo `gate` if there is one; makes what `go build -o=DIR/` makes.
# GO_FAILS: ends with an error before that.
GO = """\
#!/bin/sh
case "$1" in
    env) echo go{version} ;;
    list) printf 'example.com/one\\t%s\\tone.go\\n' "$FAKE" ;;
    build)
        echo build >> "$FAKE/builds"
        [ ! -p "$FAKE/gate" ] || read -r _ < "$FAKE/gate"
        for word; do case "$word" in -o=*) out=${{word#-o=}} ;; esac; done
        mkdir -p "$out"
        echo example.com/one
        [ -z "$GO_FAILS" ] || {{ echo "one.go:7: undefined: nothing"; exit 1; }}
        for name in kubernetes coredns containerd containerd-shim-runc-v2 ctr; do echo "$name" > "$out/$name"; done ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own and a `go` that is new enough."""
    (tmp_path / "bin").mkdir()
    put_go(tmp_path, parts.module_version("go"))
    (tmp_path / "one.go").write_text("package one\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(parts, "lacks", list)
    return tmp_path


def put_go(place: Path, version: str) -> None:
    program = place / "bin" / "go"
    program.write_text(GO.format(version=version))
    program.chmod(0o755)


def builds(place: Path) -> int:
    return (place / "builds").read_text().count("build")


def test_every_program_is_there_and_kept(place: Path) -> None:
    said: list[str] = []
    found = [parts.binary(name, said.append) for name in parts.PARTS]
    assert all(path.is_file() and path.name == name for path, name in zip(found, parts.PARTS, strict=True))
    assert len({path.stat().st_ino for path in found if path.name in parts.KUBERNETES}) == 1
    assert builds(place) == 1
    assert [path.name for path in (place / "cache" / "isthmus").glob("*.part-*")] == []
    assert any("min left" in line for line in said)


def test_an_unknown_program_is_refused(place: Path) -> None:
    with pytest.raises(parts.PartsError, match="kube-dns: no part of the lab's Kubernetes; there are: kube-apiserver"):
        parts.binary("kube-dns")


def test_two_processes_build_once(place: Path) -> None:
    """The second waits for the first, whose `go build` does not go on before it is told to."""
    os.mkfifo(place / "gate")
    command = [sys.executable, parts.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        assert any("compiling" in line for line in iter(first.stderr.readline, ""))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            assert "another process is building the programs" in second.stderr.readline()
            (place / "gate").write_text("go on\n")
            assert first.communicate()[0] == second.communicate()[0] == f"{parts.directory()}\n"
    assert builds(place) == 1


def test_a_build_that_fails_leaves_nothing_and_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GO_FAILS", "yes")
    with pytest.raises(parts.PartsError, match=r"go build failed \(exit 1\)[^\0]*one.go:7: undefined: nothing"):
        parts.build()
    monkeypatch.delenv("GO_FAILS")
    assert not parts.directory().exists()
    assert list(parts.directory().parent.glob("*.part-*")) == []
    assert parts.binary("kubelet").is_file()


def test_what_a_killed_build_left_is_removed(place: Path) -> None:
    left = parts.directory().with_name(f"{parts.directory().name}.part-1")
    left.mkdir(parents=True)
    parts.build()
    assert not left.exists()


def test_the_name_follows_what_is_built(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts.directory()
    source = tmp_path / "kubernetes"
    source.mkdir()
    for name in ("go.mod", "go.sum", "main.go"):
        (source / name).write_bytes((parts.SOURCE / name).read_bytes())
    monkeypatch.setattr(parts, "SOURCE", source)
    changed = parts.directory()
    (source / "main.go").write_text("package main\n")
    assert len({before, changed, parts.directory()}) == 3
    assert before.name.startswith(f"kubernetes-{parts.kubernetes_version()}-")


@pytest.mark.parametrize(
    ("version", "wanted", "enough"),
    [
        ("1.26.6", "1.26.6", True),
        ("1.26.10", "1.26.6", True),
        ("1.27", "1.26.6", True),
        ("1.26.5", "1.26.6", False),
        ("1.9", "1.26.6", False),
        ("1.27rc1", "1.26.6", False),
        ("1.26.8 X:nodwarf5", "1.26.6", True),
        ("", "1.26.6", False),
    ],
)
def test_a_toolchain_is_new_enough_or_not(version: str, wanted: str, enough: bool) -> None:
    assert parts.new_enough(version, wanted) == enough


def test_an_old_toolchain_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_go(place, "1.19.8")
    fetched = []

    def fetch(version: str, target: Path) -> None:
        fetched.append(version)
        (target / "go" / "bin").mkdir(parents=True)
        (target / "go" / "bin" / "go").write_text("")

    monkeypatch.setattr(parts, "fetch_go", fetch)
    found = parts.go(lambda text: None)
    assert (fetched, found.is_relative_to(place / "cache")) == ([parts.module_version("go")], True)


def test_the_estimate_follows_the_pace() -> None:
    """Slower than was expected takes longer than was expected; the link at the end is not forgotten."""
    cores = os.cpu_count() or 1
    total = parts.BYTES_PER_CORE_SECOND * cores * 600
    sizes = {"one": total}
    assert parts.estimate(sizes, 0, 0) == "about 11 min left"
    late = parts.BYTES_PER_CORE_SECOND * cores * 100
    assert parts.estimate(sizes, late, 1000) == "about 56 min left"
    assert parts.estimate(sizes, total, 600) == "about 1 min left"


def test_the_command_line_prints_the_directory(place: Path) -> None:
    done = subprocess.run([sys.executable, parts.__file__], capture_output=True, text=True, check=True)
    assert done.stdout == f"{parts.directory()}\n"
    assert "built in" in done.stderr
