"""Fetches what guests are made of with package managers, which verify it, and keeps it in target/kernels/."""

import functools
import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "target" / "kernels"


class Missing(Exception):
    """Something that is needed is missing and could not be fetched or built."""


def say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def call(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Runs a command, and prints its output only if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        # apt's messages are matched.
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        **options,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout[-4000:])
        raise Missing(f"failed: {' '.join(map(str, command))}")
    return done


def need(tools: dict[str, str]) -> None:
    """Installs the packages of missing tools as root; otherwise the error names them."""
    missing = {tool: package for tool, package in tools.items() if not shutil.which(tool)}
    if not missing:
        return
    packages = sorted(set(" ".join(missing.values()).split()))
    if os.geteuid() != 0:
        raise Missing(f"{', '.join(missing)} not found: apt-get install {' '.join(packages)}")
    say(f"installing {' '.join(packages)}")
    call("apt-get", "update", "-qq")
    call("apt-get", "install", "-qq", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", *packages)


# The sources of kernels, for any release of Debian on the machine. Each suite has other kernels.
SUITES = """\
Types: deb
URIs: http://deb.debian.org/debian
Suites: bookworm bookworm-backports trixie-backports sid
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


class Apt:
    """apt with its own package lists, for several architectures. Needs no root."""

    def __init__(self, name: str, sources: str = ""):
        self.state = CACHE / name
        # Touched at each update: its age is that of the lists.
        self.updated = self.state / "updated"
        self.sources = sources

    def __call__(self, *arguments: str) -> str:
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        options: dict[str, str | Path] = {
            "Dir::State": self.state / "state",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": self.state / "cache",
            "APT::Sandbox::User": "",
            # By default a source that fails is only a warning.
            "APT::Update::Error-Mode": "any",
            # Not needed, and larger than the rest.
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        }
        if self.sources:
            parts = self.state / "sources"
            parts.mkdir(exist_ok=True)
            file = parts / "suites.sources"
            if not file.exists() or file.read_text() != self.sources:
                file.write_text(self.sources)
                self.updated.unlink(missing_ok=True)
            options |= {"Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": parts}
        command: list[str | Path] = [arguments[0]]
        for name, value in options.items():
            command += ["-o", f"{name}={value}"]
        for architecture in ("amd64", "arm64"):
            command += ["-o", f"APT::Architectures::={architecture}"]
        packages = CACHE / "packages"
        packages.mkdir(parents=True, exist_ok=True)
        return call(*command, *arguments[1:], cwd=packages).stdout

    @functools.cache
    def update(self) -> None:
        """Updates the lists if they are older than an hour."""
        if self.is_current():
            return
        # Some of several sources may fail. A package that is then not found has an error of its own.
        try:
            self("apt-get", "update", "-q")
        except Missing:
            say("apt-get update failed, continuing with the lists that exist")
        else:
            self.updated.touch()

    def is_current(self) -> bool:
        return self.updated.exists() and time.time() - self.updated.stat().st_mtime < 3600


# The tools that make guests and tests come from the machine's own sources.
TOOLS = Apt("apt")
KERNELS = Apt("apt-kernels", SUITES)


def fetched(package: str, apt: Apt = TOOLS) -> Path:
    """The file of a Debian package, fetched unless some version of it is kept."""
    name, _, architecture = package.partition(":")

    def kept() -> list[Path]:
        architectures = [architecture] if architecture else ["amd64", "all"]
        packages = CACHE / "packages"
        return sorted(file for each in architectures for file in packages.glob(f"{name}_*_{each}.deb"))

    found = kept()
    if not found:
        apt.update()
        say(f"fetching {package}")
        apt("apt-get", "download", "-q", package)
        found = kept()
    if not found:
        raise Missing(f"no package {package}")
    return max(found, key=lambda file: (version_of(file.stem.split("_")[1]), file.name))


def unpacked(package: str, apt: Apt = TOOLS) -> Path:
    """The folder with the contents of a Debian package."""
    file = fetched(package, apt)
    folder = CACHE / file.stem
    if not folder.exists():
        with partial(folder) as new:
            call("dpkg", "-x", file, new)
    return folder


def version_of(text: str) -> tuple[int, ...]:
    """`(6, 12, 43)` for `6.12.43-1~bpo12+1` and for `6.12.43+deb12-cloud-amd64`; empty for a release candidate."""
    found = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(map(int, found[0].split("."))) if found and "rc" not in text else ()


def is_within(version: str, least: str, below: str) -> bool:
    return version_of(least) <= version_of(version) < version_of(below)


class Gone(Missing):
    """No suite has a kernel of this version any more."""


def kernel_packages(known: dict[str, str], least: str, below: str, modules: bool) -> list[str]:
    """From packages and their versions, those of the newest kernel in these bounds."""
    able = {}
    for package, version in known.items():
        _, kind, release = package.split("-", 2)
        number = version_of(version)
        if not is_within(version, least, below):
            continue
        # From 6.19 on an image is a stub that depends on the other two packages.
        if kind == "image" and number < (6, 19) or kind == "binary" and not modules:
            able[number] = [package]
        elif kind == "binary" and f"linux-modules-{release}" in known:
            able[number] = [package, f"linux-modules-{release}"]
    return able[max(able)] if able else []


def is_kernel(package: str, architecture: str) -> bool:
    name = rf"linux-(image|binary|modules)-[0-9]+\.[0-9]+\.[0-9]+[^_]*-cloud-{architecture}"
    return bool(re.fullmatch(name, package))


def available(*packages: str) -> list[tuple[str, str]]:
    """The packages that the suites have, with their versions."""
    KERNELS.update()
    lines = KERNELS("apt-cache", "madison", *packages).splitlines() if packages else []
    found = [re.match(r" *(\S+?)(?::\w+)? \| +(\S+) \|", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


@functools.cache
def available_kernels(architecture: str) -> dict[str, str]:
    """Debian's cloud kernels, with their versions."""
    KERNELS.update()
    names = (name for name in KERNELS("apt-cache", "pkgnames", "linux-").split() if is_kernel(name, architecture))
    # If a name has several versions, the newest comes first, and that is the one that is fetched.
    return dict(reversed(available(*(f"{name}:{architecture}" for name in names))))


def debian_kernel(least: str, below: str, architecture: str, modules: bool) -> list[str]:
    """The packages of the newest cloud kernel in these bounds that is kept, or else available."""
    files = (file.stem.split("_") for file in (CACHE / "packages").glob("linux-*.deb"))
    kept = {name: version for name, version, _ in files if is_kernel(name, architecture)}
    found = kernel_packages(kept, least, below, modules)
    found = found or kernel_packages(available_kernels(architecture), least, below, modules)
    if not found:
        if not KERNELS.is_current():
            raise Missing("the package lists of the suites are unavailable")
        raise Gone(f"no suite has a kernel from {least} up to {below} for {architecture}")
    return [f"{package}:{architecture}" for package in found]


def header() -> Path:
    """The include folder with the newest <linux/fuse.h> that is kept, or else available."""
    name = "linux-libc-dev"
    if not any((CACHE / "packages").glob(f"{name}_*.deb")):
        versions = [version for _, version in available(name)]
        if not versions:
            raise Missing(f"no package {name}")
        KERNELS("apt-get", "download", "-q", f"{name}={max(versions, key=version_of)}")
    return unpacked(name, KERNELS) / "usr/include"


def wheel(requirement: str) -> Path:
    """The folder with the contents of a wheel."""
    name, _, version = requirement.partition("==")
    folder = CACHE / f"{name}-{version}"
    if not folder.exists():
        need({"pip3": "python3-pip"})
        say(f"fetching {requirement}")
        with partial(folder) as new:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            call(*pip, "--no-deps", "--only-binary", ":all:", "--dest", new, requirement)
            for file in new.glob("*.whl"):
                shutil.unpack_archive(file, new, "zip")
                file.unlink()
    return folder


def source(package: str) -> Path:
    """The folder with a kernel's source."""
    deb = fetched(package, KERNELS)
    folder = CACHE / f"source-{deb.stem}"
    if not folder.exists():
        say(f"unpacking {package}")
        with partial(folder) as new:
            archive = next((unpacked(package, KERNELS) / "usr/src").glob("linux-source-*.tar.xz"))
            call("tar", "-C", new, "--strip-components=1", "-xf", archive)
            fit_registers(new)
    return folder


def fit_registers(tree: Path) -> None:
    """User-mode Linux reserves a fixed size for the extended registers of its processes, and cannot start on a
    processor with AMX, which has more of them."""
    if re.search(r"^flags\b.*\bamx_tile\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        offsets = tree / "arch/x86/um/user-offsets.c"
        offsets.write_text(offsets.read_text().replace("HOST_FP_SIZE, 2696", "HOST_FP_SIZE, 11008"))


def built(package: str, architecture: str, fragments: tuple[str, ...], image: str, **variables: str) -> Path:
    """The folder with a kernel, its modules and its config. All options are off except those in the fragments."""
    wanted = "".join((HERE / fragment).read_text() for fragment in fragments)
    deb = fetched(package, KERNELS)
    key = hashlib.sha256((deb.stem + wanted + repr(variables)).encode()).hexdigest()[:12]
    folder = CACHE / f"{architecture}-{key}"
    if folder.exists():
        return folder
    need({"make": "make", "gcc": "gcc libc6-dev", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils"})
    tree = source(package)
    say(f"building {package} with {' and '.join(fragments)}: minutes")
    # Kept, so that the next kernel builds only what differs.
    tree_out = CACHE / f"{architecture}-build-{package}"
    tree_out.mkdir(exist_ok=True)
    with partial(folder) as new:
        (tree_out / "fragment").write_text(wanted)
        make = ["make", "-s", "-C", tree, f"O={tree_out}", f"ARCH={architecture}", f"-j{os.cpu_count()}"]
        make += [f"{name}={value}" for name, value in variables.items()]
        call(*make, f"KCONFIG_ALLCONFIG={tree_out / 'fragment'}", "allnoconfig")
        config = (tree_out / ".config").read_text()
        for line in wanted.splitlines():
            is_option = re.match(r"CONFIG_|# CONFIG_\w+ is not set", line)
            if is_option and line not in config.splitlines():
                raise Missing(f"the kernel's configuration does not accept {line}")
        targets = [image] + (["modules"] if "CONFIG_MODULES=y" in config else [])
        call(*make, *targets)
        shutil.copy(tree_out / image, new / "kernel")
        shutil.copy(tree_out / ".config", new / "config")
        for module in tree_out.rglob("*.ko"):
            shutil.copy(module, new)
    return folder


def module(tree: Path, name: str) -> bytes:
    """The unpacked contents of a kernel module."""
    for path in tree.rglob(f"{name}.ko*"):
        data = path.read_bytes()
        return {".ko": bytes, ".xz": lzma.decompress, ".gz": gzip.decompress}[path.suffix](data)
    raise Missing(f"no module {name} in {tree}")


class partial:
    """A folder that gets its name when it is complete."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.new = folder.with_name(folder.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.new.rename(self.folder)
