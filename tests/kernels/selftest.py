"""Boots guests that fail in different ways, and checks that each failure is noticed."""

from dataclasses import replace

import guest
import packages
from kernels import KERNELS

PASSED = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out'"
# CONFIG_LKDTM makes the kernel fail on request.
PROVOKE = f"{PASSED}; echo %s >/sys/kernel/debug/provoke-crash/DIRECT"

# The name, what the guest does, and the problem that must be noticed, if any.
GUESTS = (
    ("passes", PASSED, None),
    ("fails", f"{PASSED}; exit 101", "exit code 101"),
    ("runs no test", "true", "no test passed"),
    ("ignores a test", PASSED.replace("0 ignored", "1 ignored"), "1 tests were ignored"),
    ("counts a failure", PASSED.replace("0 failed", "1 failed"), "1 tests failed"),
    ("gives no exit code", f"{PASSED}; poweroff -f", "it gave no exit code"),
    ("hangs", f"{PASSED}; sleep 1000", "it hangs"),
    ("panics", PROVOKE % "PANIC", "the kernel says: Kernel panic"),
    ("warns", PROVOKE % "WARNING", "the kernel says: WARNING:"),
    ("has a bug", PROVOKE % "BUG", "the kernel says: "),
    ("writes to freed memory", PROVOKE % "WRITE_AFTER_FREE", "the kernel says: BUG: KASAN"),
    ("keeps a lock", PROVOKE % "SPINLOCKUP", "BUG: Invalid wait context"),
    ("leaks memory", f"{PASSED}; insmod /kmemleak-test.ko", "the kernel says: unreferenced object"),
    ("finds no leaks any more", f"{PASSED}; echo off >/sys/kernel/debug/kmemleak", "exit code 125"),
    ("is another kernel", PASSED, "it is Linux"),
)


# Outcomes of a run whose tests passed, where two tests passed before.
OUTCOMES = (
    ("is not told about its kernel", guest.Outcome(passed=2), "not told"),
    ("passes one test less than before", guest.Outcome(passed=1, told=True), "2 passed when it was recorded"),
    ("passes as many as before", guest.Outcome(passed=2, told=True), None),
)


# Available packages, and the ones that are chosen for a kernel with modules, at least 6.12 and below 7.4.
OLD, STUB = "linux-image-6.18.5+deb13-cloud-amd64", "linux-image-7.3.4+deb13-cloud-amd64"
BINARY, MODULES = STUB.replace("image", "binary"), STUB.replace("image", "modules")
CANDIDATE = "linux-binary-7.3-cloud-amd64"
CHOICES = (
    ("is the newest", {OLD: "6.18.5-1~bpo13+1", STUB: "7.3.4-1", BINARY: "7.3.4-1", MODULES: "7.3.4-1"}, [BINARY, MODULES]),
    ("has lost its modules", {OLD: "6.18.5-1~bpo13+1", STUB: "7.3.4-1", BINARY: "7.3.4-1"}, [OLD]),
    ("is a release candidate", {CANDIDATE: "7.3~rc7-1~exp1", CANDIDATE.replace("binary", "modules"): "7.3~rc7-1~exp1"}, []),
    ("is out of bounds", {"linux-image-6.1.0-56-cloud-amd64": "6.1.192-2"}, []),
)


def noticed(name: str, seen: list[str], problem: str | None) -> bool:
    good = any(problem in text for text in seen) if problem else not seen
    print(f"a guest that {name}: {'; '.join(seen) or 'nothing'}{'' if good else '  <- NOT NOTICED'}", flush=True)
    return good


def self_test() -> int:
    kernel = next(kernel for kernel in KERNELS if kernel.name == "um-debug")
    guest.prepare(kernel)
    made = guest.image(kernel)
    leak = made.kernel.parent / "kmemleak-test.ko"
    results = []
    for name, command, problem in GUESTS:
        this = replace(kernel, name="self-test", patience=60)
        if problem == "it hangs":
            this = replace(this, patience=15)
        if problem == "it is Linux":
            this = replace(this, versions=("8", "9"))
        outcome = guest.boot(this, made, command, {"kmemleak-test.ko": leak})
        results.append(noticed(name, outcome.problems, problem))
    for name, outcome, problem in OUTCOMES:
        results.append(noticed(name, guest.unlike(kernel, outcome, 2), problem))
    for name, known, expected in CHOICES:
        found = packages.kernel_packages(known, "6.12", "7.4", modules=True)
        results.append(found == expected)
        print(f"a kernel that {name}: {' '.join(found) or 'none'}{'' if found == expected else '  <- WRONG'}")
    print(f"\n{results.count(True)} passed, {results.count(False)} failed")
    return 0 if all(results) else 1
