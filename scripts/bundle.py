# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the agent bundle (docs/architecture.md, "Bundle") and the collection's artifact.

Runs under the controller's environment (`make setup`). Everything it makes lies under build/; what can be
fetched only once (wheels, packages) lies in the user's cache directory.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import installer
from installer.destinations import SchemeDictionaryDestination
from installer.sources import WheelFile

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
BUNDLES = BUILD / "bundle"
COLLECTIONS = BUILD / "collections"
AGENT_REQUIREMENTS = ROOT / "requirements" / "agent.txt"
HOME = "/opt/isthmus"  # of the environments on hosts
# What a collection consists of (the rest of the repository is for those who work on it).
SHIPPED = ("meta", "plugins", "roles", "playbooks", "extensions", "docs", "inventories", "changelogs", "LICENSES")
SHIPPED_FILES = ("README.md", "LICENSE", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "galaxy.yml")
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}  # as the kernel and as Debian name them
ARCH_ALIASES = {"amd64": "x86_64", "arm64": "aarch64", **{arch: arch for arch in ARCHES}}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EPOCH = 946684800  # 2000-01-01: the time of every file in an archive (zip cannot go below 1980)


class BuildError(Exception):
    """A build step failed; the message says which and why."""


def say(text: str) -> None:
    print(f"bundle: {text}", flush=True)


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "isthmus"


def run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        tail = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildError(f"`{' '.join(command)}` failed ({done.returncode}):\n  {tail}")
    return done.stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_below(top: Path) -> Iterable[Path]:
    """Files of a source tree in a fixed order, symbolic links to directories followed, caches left out."""
    for directory, names, files in os.walk(top, followlinks=True):
        names[:] = sorted(name for name in names if name not in ("__pycache__", "build") and "egg-info" not in name)
        for name in sorted(files):
            if not name.endswith((".pyc", ".tmp", ".swp")):
                yield Path(directory, name)


def digest_of(paths: Iterable[Path], *words: str) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}\0{sha256(path)}\n".encode())
    for word in words:
        total.update(f"{word}\n".encode())
    return total.hexdigest()


def project_version() -> str:
    """The one version of collection and agent; refuses when galaxy.yml and pyproject.toml differ."""
    found = {}
    for name, pattern in (("galaxy.yml", r"^version: *(\S+)"), ("pyproject.toml", r'^version = "([^"]+)"')):
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        found[name] = match.group(1) if match else None
    versions = set(found.values())
    if len(versions) != 1 or None in versions:
        raise BuildError(f"galaxy.yml and pyproject.toml must carry the same version: {found}")
    return str(versions.pop())


# --- third-party wheels --------------------------------------------------------------------------


def wheel_platforms(arch: str) -> list[str]:
    """Platform tags that run on every supported distribution (RHEL 8 and Debian 11 have glibc 2.28 or newer)."""
    return [*(f"manylinux_2_{minor}_{arch}" for minor in range(28, 16, -1)), f"manylinux2014_{arch}"]


def wheelhouse(arch: str, python: str) -> Path:
    """Directory with the agent's third-party wheels for one platform, fetched once from the pip index."""
    target = cache_directory() / "wheelhouse" / f"{arch}-py{python}-{sha256(AGENT_REQUIREMENTS)[:12]}"
    if target.exists():
        return target
    say(f"fetching wheels for Python {python} on {arch}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps"]
        command += ["--python-version", python, "--implementation", "cp", "--dest", str(part)]
        for tag in wheel_platforms(arch):
            command += ["--platform", tag]
        run(*command, "--requirement", str(AGENT_REQUIREMENTS))
        part.chmod(0o755)
        part.rename(target)
    finally:
        if part.exists():
            shutil.rmtree(part)
    return target


def libbpf(arch: str) -> Path:
    """`libbpf.so.1` of Debian's libbpf1: this machine's own, or for another architecture the package's."""
    if arch == platform.machine():
        for directory in (f"/usr/lib/{arch}-linux-gnu", "/usr/lib64", "/usr/lib"):
            path = Path(directory, "libbpf.so.1")
            if path.exists():
                return path.resolve()
        raise BuildError("libbpf.so.1 is not installed (Debian: libbpf1); `make setup` installs it")
    target = cache_directory() / "libbpf" / arch / "libbpf.so.1"
    if target.exists():
        return target
    debian = ARCHES[arch]
    say(f"fetching Debian's libbpf1 for {debian}")
    with tempfile.TemporaryDirectory() as place:
        # apt with lists of its own, so that this machine's apt learns no foreign architecture.
        for name in ("lists/partial", "cache/archives/partial"):
            Path(place, name).mkdir(parents=True)
        Path(place, "status").touch()
        options = {
            "APT::Architecture": debian,
            "APT::Architectures": debian,
            "Dir::State": place,
            "Dir::State::lists": f"{place}/lists",
            "Dir::State::status": f"{place}/status",
            "Dir::Cache": f"{place}/cache",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        apt = ["apt-get", "--quiet", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
        run(*apt, "update")
        run(*apt, "download", "libbpf1", cwd=Path(place))
        package = next(Path(place).glob("libbpf1_*.deb"))
        run("dpkg-deb", "--extract", str(package), f"{place}/root")
        found = next(Path(place, "root").rglob("libbpf.so.1")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)
    return target


# --- our own wheel -------------------------------------------------------------------------------


def bpf_objects() -> list[Path]:
    """Compile bpf/ into the agent's package; returns the objects."""
    run("make", "--silent", "-C", str(ROOT / "bpf"))
    objects = sorted((ROOT / "agent" / "isthmus_agent" / "bpf" / "objects").glob("*.bpf.o"))
    if not objects:
        raise BuildError("make -C bpf made no object in agent/isthmus_agent/bpf/objects")
    return objects


def own_wheel(version: str) -> Path:
    """Our wheel in build/wheel, made when its sources changed. Same sources, same bytes."""
    bpf_objects()
    inputs = digest_of([*files_below(ROOT / "agent"), ROOT / "pyproject.toml"], version)
    directory = BUILD / "wheel"
    wheel = directory / f"isthmus-{version}-py3-none-any.whl"
    marker = directory / "inputs"
    if wheel.exists() and marker.exists() and marker.read_text() == inputs:
        return wheel
    say("building the agent's wheel")
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        # A copy with the link agent/isthmus_mesh resolved; setuptools writes beside its sources.
        shutil.copytree(
            ROOT / "agent", Path(place, "agent"), ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
        shutil.copy(ROOT / "pyproject.toml", place)
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
            *("--wheel-dir", str(directory), place),
            SOURCE_DATE_EPOCH=str(EPOCH),
        )
    if not wheel.exists():
        raise BuildError(f"pip wheel made {[path.name for path in directory.iterdir()]}, not {wheel.name}")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    wanted = ["isthmus_mesh/keys.py", "isthmus_agent/__init__.py"]
    wanted += [f"isthmus_agent/bpf/objects/{path.name}" for path in bpf_objects()]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise BuildError(f"{wheel.name} lacks {', '.join(missing)} (pyproject.toml: package-data)")
    marker.write_text(inputs)
    return wheel


# --- the bundle ----------------------------------------------------------------------------------


def executable(path: Path) -> bool:
    return path.parent.name == "bin" or ".so" in path.suffixes


def install(wheels: Iterable[Path], home: str, python: str, place: Path) -> None:
    """Lay down below `place` what the wheels put into the environment `home` of a host, compiled when this machine's
    Python is of that version. A host then needs no pip, which takes longer than all else of an installation."""
    packages = place / "lib" / f"python{python}" / "site-packages"
    schemes = {"purelib": packages, "platlib": packages, "scripts": place / "bin", "data": place, "headers": place}
    destination = SchemeDictionaryDestination(
        {name: str(path) for name, path in schemes.items()}, interpreter=f"{home}/bin/python", script_kind="posix"
    )
    for path in wheels:
        with WheelFile.open(path) as wheel:
            installer.install(wheel, destination, additional_metadata={"INSTALLER": b"isthmus.mesh\n"})
    for file in place.rglob("*"):
        os.utime(file, (EPOCH, EPOCH))
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        compileall = (sys.executable, "-m", "compileall", "-q", "-s", str(place), "-p", home, str(place))
        run(*compileall, PYTHONHASHSEED="0")


def make_bundle(arch: str, python: str) -> None:
    """One archive in build/bundle, and its line in bundle.json; nothing when it is there from the same inputs."""
    version = project_version()
    wheels = sorted([own_wheel(version), *wheelhouse(arch, python).glob("*.whl")], key=lambda path: path.name)
    library = libbpf(arch)
    digest = digest_of([*wheels, library], f"installer {importlib.metadata.version('installer')}")
    BUNDLES.mkdir(parents=True, exist_ok=True)
    archive = BUNDLES / f"isthmus-{version}-{arch}-py{python}.tar.gz"
    platforms = read_platforms()
    present = next((item for item in platforms if (item["arch"], item["python"]) == (arch, python)), None)
    if present and present["digest"] == digest and archive.exists() and sha256(archive) == present["sha256"]:
        say(f"{archive.name}: up to date")
        return
    about = {"version": version, "digest": digest, "arch": arch, "python": python}
    for old in BUNDLES.glob(f"isthmus-*-{arch}-py{python}.tar.gz"):
        old.unlink()
    part = archive.with_suffix(".part")
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        place = Path(temporary)
        install(wheels, f"{HOME}/{version}-{digest[:8]}", python, place)
        shutil.copyfile(library, place / "lib" / "libbpf.so.1")
        (place / "bundle.json").write_text(json.dumps(about, indent=2) + "\n")
        with (
            part.open("wb") as raw,
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=EPOCH) as packed,  # in its header
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for path in sorted(path for path in place.rglob("*") if not path.is_dir()):
                info = tarfile.TarInfo(str(path.relative_to(place)))
                info.size, info.mtime, info.mode = path.stat().st_size, EPOCH, 0o755 if executable(path) else 0o644
                with path.open("rb") as content:
                    tar.addfile(info, content)
    part.rename(archive)
    size = archive.stat().st_size
    entry = {"arch": arch, "python": python, "archive": archive.name, "size": size}
    entry |= {"sha256": sha256(archive), "digest": digest}
    others = [item for item in platforms if (item["arch"], item["python"]) != (arch, python)]
    # An archive of another version must not stay beside this one.
    others = [item for item in others if str(item["archive"]).startswith(f"isthmus-{version}-")]
    write_platforms(version, [*others, entry])
    say(f"{archive.name}: {size / 1e6:.1f} MB, digest {digest[:12]}")


def make_bundles(arch: str, python: str) -> None:
    """The wanted platform's bundle; those made before follow, so that all carry the same agent."""
    for known in read_platforms():
        if (known["arch"], known["python"]) != (arch, python):
            make_bundle(str(known["arch"]), str(known["python"]))
    make_bundle(arch, python)


def read_platforms() -> list[dict[str, object]]:
    try:
        known = json.loads((BUNDLES / "bundle.json").read_text())
    except FileNotFoundError:
        return []
    return [item for item in known["platforms"] if (BUNDLES / item["archive"]).exists()]


def write_platforms(version: str, platforms: list[dict[str, object]]) -> None:
    ordered = sorted(platforms, key=lambda item: (str(item["arch"]), int(str(item["python"]).split(".")[1])))
    content = {"schema": 1, "version": version, "platforms": ordered}
    (BUNDLES / "bundle.json").write_text(json.dumps(content, indent=2) + "\n")


# --- the collection ------------------------------------------------------------------------------


def collection_sources() -> list[Path]:
    sources = [path for name in SHIPPED if (ROOT / name).is_dir() for path in files_below(ROOT / name)]
    return sources + [ROOT / name for name in SHIPPED_FILES if (ROOT / name).exists()]


def copy_sources(stage: Path) -> None:
    """The collection's files, without bundles, into a directory of their own: what is linted and what is built."""
    for path in collection_sources():
        target = stage / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def make_stage() -> None:
    """build/stage/ansible_collections/isthmus/mesh, for gates that insist on that path."""
    stage = BUILD / "stage" / "ansible_collections" / "isthmus" / "mesh"
    if stage.exists():
        shutil.rmtree(stage)
    copy_sources(stage)


def make_collection() -> None:
    """Build the artifact into build/dist and install it, as a user would, into build/collections."""
    version = project_version()
    if not read_platforms():
        raise BuildError("there is no agent bundle in build/bundle; make it: make bundle")
    bundles = sorted(path for path in BUNDLES.iterdir() if path.suffix in (".gz", ".json"))
    inputs = digest_of([*collection_sources(), *bundles], version)
    installed = COLLECTIONS / "ansible_collections" / "isthmus" / "mesh"
    marker = COLLECTIONS / "inputs"
    if installed.exists() and marker.exists() and marker.read_text() == inputs:
        say("collection: up to date")
        return
    galaxy = str(Path(sys.executable).with_name("ansible-galaxy"))
    dist = BUILD / "dist"
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        stage = Path(place, "mesh")
        copy_sources(stage)
        files = stage / "roles" / "bundle" / "files"
        files.mkdir(parents=True, exist_ok=True)
        for path in bundles:
            shutil.copy(path, files)
        run(galaxy, "collection", "build", "--force", "--output-path", str(dist), str(stage))
    artifact = dist / f"isthmus-mesh-{version}.tar.gz"
    run(
        *(galaxy, "collection", "install", "--offline", "--no-deps", "--force"),
        *("--collections-path", str(COLLECTIONS), str(artifact)),
    )
    marker.write_text(inputs)
    say(f"collection: {artifact.name} ({artifact.stat().st_size / 1e6:.1f} MB), installed in {COLLECTIONS}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("bundle", "wheelhouse", "collection", "stage"))
    parser.add_argument("--python", default="3.11", choices=PYTHONS)
    parser.add_argument("--arch", default=platform.machine(), choices=sorted(ARCH_ALIASES))
    options = parser.parse_args()
    arch = ARCH_ALIASES[options.arch]
    jobs: dict[str, Callable[[], object]] = {
        "bundle": lambda: make_bundles(arch, options.python),
        "wheelhouse": lambda: say(f"wheels: {wheelhouse(arch, options.python)}"),
        "collection": make_collection,
        "stage": make_stage,
    }
    BUILD.mkdir(exist_ok=True)
    try:
        with (BUILD / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            jobs[options.what]()
    except BuildError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
