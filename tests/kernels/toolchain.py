"""Builds the kernel tests, linked statically, for the machines that they run on."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import packages
from packages import CACHE, ROOT, Missing, need, say

TARGETS = {
    "x86_64": "x86_64-unknown-linux-gnu",
    "um": "x86_64-unknown-linux-gnu",
    "aarch64": "aarch64-unknown-linux-gnu",
    "mips64": "mips64-unknown-linux-gnuabi64",
}


def tests_for(arch: str) -> Path:
    return built(TARGETS[arch])


@cache
def built(target: str) -> Path:
    """Uses the installed Rust for this machine's own target, and Debian's for others."""
    say(f"building the tests for {target}")
    environment = dict(os.environ, RUSTFLAGS="-C target-feature=+crt-static")
    # In an emulator, code without optimization takes minutes.
    environment |= {"CARGO_PROFILE_DEV_OPT_LEVEL": "1", "CARGO_PROFILE_TEST_OPT_LEVEL": "1"}
    if target.startswith("aarch64"):
        need({"aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"})
        environment |= debian("arm64")
        environment |= {
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER": "aarch64-linux-gnu-gcc",
            # This machine's headers are not the target's.
            "FUSE_BACKING_UAPI_CHECK": "off",
        }
    extra = []
    if target.startswith("mips64"):
        # There is no prebuilt standard library for this target.
        environment |= debian("amd64", "rust-web-src")
        environment |= {
            "CARGO_TARGET_MIPS64_UNKNOWN_LINUX_GNUABI64_LINKER": "mips64-linux-gnuabi64-gcc",
            "FUSE_BACKING_UAPI_CHECK": "off",
            "RUSTC_BOOTSTRAP": "1",
        }
        extra = ["-Zbuild-std"]
    command = ["cargo", "test", *extra, "--locked", "--no-run", "--test", "kernel", "--target", target]
    done = subprocess.run(
        [*command, "--message-format=json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-4000:])
        raise Missing(f"failed: {' '.join(command)}")
    made = [json.loads(line).get("executable") for line in done.stdout.splitlines() if line.startswith("{")]
    # Another build of the tests must not replace this program.
    CACHE.mkdir(parents=True, exist_ok=True)
    tests = CACHE / f"tests-{target}"
    new = tests.with_suffix(".new")
    shutil.copy(next(path for path in reversed(made) if path), new)
    # Renamed, because another run may be executing the old program.
    return new.replace(tests)


def rust(architecture: str, *further: str) -> Path:
    """The folder with Debian's compiler, the standard library of an architecture, and further packages."""
    compiler = packages.fetched("rustc-web")
    version = compiler.name.split("_")[1].split(".")
    folder = CACHE / "-".join(["rust", compiler.stem.split("_")[1], architecture, *further])
    if not folder.exists():
        std = f"libstd-rust-web-{version[0]}.{version[1]}"
        llvm = re.search(r"libllvm\d+", packages.call("dpkg-deb", "-f", packages.fetched(std), "Depends").stdout)
        if not llvm:
            raise Missing(f"{std} does not depend on LLVM")
        names = ["rustc-web", std, "libstd-rust-web-dev", llvm[0]]
        with packages.partial(folder) as new:
            for name in [*names, f"libstd-rust-web-dev:{architecture}", *further]:
                packages.call("dpkg", "-x", packages.fetched(name), new)
    return folder


def debian(architecture: str, *further: str) -> dict[str, str]:
    """The environment in which cargo uses that compiler."""
    folder = rust(architecture, *further)
    return {"RUSTC": str(folder / "usr/bin/rustc"), "LD_LIBRARY_PATH": str(folder / "usr/lib/x86_64-linux-gnu")}
