"""A guest runs one command in a kernel of its own. Its console shows whether that succeeded."""

import gzip
import os
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import packages
from kernels import Kernel
from packages import CACHE, HERE, Missing, is_within, need

# Messages of a kernel that has a problem.
TROUBLE = re.compile(
    r"BUG:|WARNING:|Kernel panic|Oops|KASAN|general protection fault|unreferenced object"
    r"|INFO: (possible|trying|task .* blocked|rcu)|possible (circular|recursive|irq lock)"
    r"|inconsistent lock state|suspicious RCU usage|Unable to handle kernel|segfault at"
    r"|kmemleak: (Cannot|Memory pool|Kernel memory leak detector disabled)"
)
RESULT = re.compile(r"^test result: .*?(\d+) passed; (\d+) failed; (\d+) ignored", re.MULTILINE)
TOLD = re.compile(r"^test expect::kernel_is_as_told +\.\.\. ok$", re.MULTILINE)
RELEASE = re.compile(r"^guest: release (\S+)", re.MULTILINE)
BUG = re.compile(r"^\S+: CVE-.*", re.MULTILINE)
CODE = re.compile(r"^guest: exit code (\d+)", re.MULTILINE)


@dataclass
class Outcome:
    release: str = "?"
    passed: int = 0
    failed: int = 0
    ignored: int = 0
    seconds: float = 0
    # Whether the test of FUSE_BACKING_EXPECT ran and passed.
    told: bool = False
    # Whether its package is no longer available.
    gone: bool = False
    # Kernel bugs that the tests worked around.
    bugs: list[str] = field(default_factory=list)
    # Each reason why the run failed.
    problems: list[str] = field(default_factory=list)


@dataclass
class Image:
    kernel: Path
    # Names and contents, in the order in which they are loaded.
    modules: list[tuple[str, bytes]]


def image(kernel: Kernel) -> Image:
    """Fetches or builds the kernel."""
    if not kernel.wheel and not kernel.source:
        architecture = "arm64" if kernel.arch == "aarch64" else "amd64"
        found = packages.debian_kernel(*kernel.versions, architecture, bool(kernel.modules))
        trees = [packages.unpacked(package, packages.KERNELS) for package in found]
        # From 7.2 on the kernel is in the folder of its modules.
        places = ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz")
        file = next((file for place in places for file in trees[0].glob(place)), None)
        if not file:
            raise Missing(f"no kernel in {found[0]}")
        tree = trees[-1]
    elif kernel.wheel:
        tree = packages.wheel(kernel.wheel)
        file = next(tree.rglob("*.kernel"))
        need({"cpio": "cpio"})
        if not (tree / "modules").exists():
            with packages.partial(tree / "modules") as new:
                archive = gzip.decompress(next(tree.rglob("*.initrd")).read_bytes())
                subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=new, check=True)
        tree = tree / "modules"
    else:
        if kernel.arch == "um":
            tree = packages.built(kernel.source, "um", kernel.fragments, "linux")
        else:
            need({"mips64-linux-gnuabi64-gcc": "gcc-mips64-linux-gnuabi64 libc6-dev-mips64-cross"})
            tree = packages.built(kernel.source, "mips", kernel.fragments, "vmlinux", CROSS_COMPILE="mips64-linux-gnuabi64-")
        file = tree / "kernel"
    return Image(file, [(name, packages.module(tree, name)) for name in kernel.modules])


def busybox(kernel: Kernel) -> Path:
    debian = {"um": "amd64", "x86_64": "amd64", "aarch64": "arm64"}[kernel.arch]
    return packages.unpacked(f"busybox-static:{debian}") / "bin" / "busybox"


def prepare(kernel: Kernel) -> None:
    """Fetches and builds what the guest needs. Call it for one guest at a time, since they share folders."""
    need({"cpio": "cpio"})
    image(kernel)
    # Debian has no busybox for mips64.
    if kernel.arch != "mips64":
        busybox(kernel)


def initramfs(kernel: Kernel, modules: list[tuple[str, bytes]], command: str, files: dict[str, Path]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("bin", "dev", "proc", "sys", "tmp", "modules"):
            (root / name).mkdir()
        if kernel.arch == "mips64":
            packages.call("mips64-linux-gnuabi64-gcc", "-static", "-O1", "-o", root / "init", HERE / "init.c")
        else:
            (root / "bin/busybox").write_bytes(busybox(kernel).read_bytes())
            (root / "init").write_bytes((HERE / "init").read_bytes())
            (root / "command").write_text(command)
        for number, (name, data) in enumerate(modules):
            (root / "modules" / f"{number}-{name}.ko").write_bytes(data)
        for name, file in files.items():
            (root / name).write_bytes(file.read_bytes())
        for path in root.rglob("*"):
            path.chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
        done = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            input=names.encode(),
            stdout=subprocess.PIPE,
            cwd=root,
            check=True,
        )
    return gzip.compress(done.stdout, 1)


# Loglevel 5 prints warnings on the console; panic=-1 ends the guest.
COMMON = "loglevel=5 panic=-1"
# The factor for the tests' timeouts: a guest is emulated, or has debugging checks.
PATIENCE = "5"


def machine(kernel: Kernel, file: Path, ramdisk: Path) -> list[str]:
    """The command that boots the guest, with its console on stdout."""
    if kernel.arch == "um":
        return [str(file), "mem=2G", f"initrd={ramdisk}", "con=null", "con0=null,fd:1", f"uml_dir={ramdisk.parent}",
                *COMMON.split()]
    # An x86-64 kernel modifies its own code while it runs, which qemu's threads do not always see in time.
    # A Malta board has one processor.
    processors = "2" if kernel.arch == "aarch64" else "1"
    qemu = ["-m", "2048", "-smp", processors, "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    qemu += ["-kernel", str(file), "-initrd", str(ramdisk), "-append"]
    if kernel.arch == "x86_64":
        need({"qemu-system-x86_64": "qemu-system-x86"})
        append = f"console=ttyS0 {COMMON} mitigations=off nokaslr random.trust_cpu=on"
        return ["qemu-system-x86_64", "-M", "pc,accel=tcg", "-cpu", "max", *qemu, append]
    if kernel.arch == "mips64":
        need({"qemu-system-mips64": "qemu-system-mips"})
        environment = {
            "FUSE_BACKING_TEST": "require",
            "FUSE_BACKING_PATIENCE": PATIENCE,
            "FUSE_BACKING_EXPECT": kernel.expect.replace(" ", ","),
        }
        append = " ".join(["console=ttyS0", COMMON, *(f"{name}={value}" for name, value in environment.items())])
        return ["qemu-system-mips64", "-M", "malta", "-cpu", "MIPS64R2-generic", *qemu, append]
    need({"qemu-system-aarch64": "qemu-system-arm"})
    append = f"console=ttyAMA0 {COMMON} mitigations=off nokaslr"
    return ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57", *qemu, append]


def boot(kernel: Kernel, made: Image, command: str, files: dict[str, Path]) -> Outcome:
    """Runs a shell command in a guest that has these files in its root. The console's log is logs/NAME.log in CACHE."""
    logs = CACHE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{kernel.name}.log"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as console:
        ramdisk = Path(folder) / "initramfs"
        ramdisk.write_bytes(initramfs(kernel, made.modules, command, files))
        # User-mode Linux has many processes, so it gets a process group of its own.
        guest = subprocess.Popen(
            machine(kernel, made.kernel, ramdisk),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        hangs = False
        try:
            wait(guest, log, kernel)
        except subprocess.TimeoutExpired:
            hangs = True
        finally:
            try:
                os.killpg(guest.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            guest.wait()
    text = log.read_text(errors="replace").replace("\r", "")
    outcome = judge(kernel, text)
    if hangs:
        outcome.problems.insert(0, f"it hangs: it did not end in {kernel.patience} s")
    outcome.seconds = time.monotonic() - start
    return outcome


def wait(guest: subprocess.Popen, log: Path, kernel: Kernel) -> None:
    """Waits until the guest ends, or has halted: a Malta machine does not end by itself."""
    if kernel.arch != "mips64":
        guest.wait(kernel.patience)
        return
    deadline = time.monotonic() + kernel.patience
    while guest.poll() is None and "System halted" not in log.read_text(errors="replace"):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(guest.args, kernel.patience)
        time.sleep(1)


def judge(kernel: Kernel, console: str) -> Outcome:
    """Reads the outcome from the console."""
    outcome = Outcome()
    if found := RELEASE.search(console):
        outcome.release = found[1]
    least, below = kernel.versions
    if not is_within(outcome.release, least, below):
        outcome.problems.append(f"it is Linux {outcome.release}, not from {least} up to {below}")
    if results := RESULT.findall(console):
        outcome.passed, outcome.failed, outcome.ignored = map(int, results[-1])
    outcome.told = bool(TOLD.search(console))
    outcome.bugs = BUG.findall(console)
    outcome.problems += shortcomings(outcome)
    code = CODE.search(console)
    if not code:
        outcome.problems.append("it gave no exit code")
    elif code[1] != "0":
        outcome.problems.append(f"exit code {code[1]}")
    trouble = [line.strip() for line in console.splitlines() if TROUBLE.search(line)]
    outcome.problems += [f"the kernel says: {line}" for line in trouble[:5]]
    return outcome


def unlike(kernel: Kernel, outcome: Outcome, passed: int | None) -> list[str]:
    """How a run of all tests differs from what is known of the kernel, and from the number that passed before."""
    problems = []
    # Of an unknown kernel the tests assert only what they detect, with one test less.
    if not kernel.expect:
        return problems
    if not outcome.told:
        problems.append("the tests were not told what the kernel has")
    if passed is not None and outcome.passed != passed:
        problems.append(f"{passed} passed when it was recorded: if the change is intended, --record")
    return problems


def shortcomings(outcome: Outcome) -> list[str]:
    problems = []
    if outcome.passed == 0:
        problems.append("no test passed")
    if outcome.failed:
        problems.append(f"{outcome.failed} tests failed")
    if outcome.ignored:
        problems.append(f"{outcome.ignored} tests were ignored")
    return problems
