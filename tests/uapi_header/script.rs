//! Runs the build script alone, for other targets. The compiler is the machine's own, with the other target's
//! predefined macros. No standard library for the target is needed.

use std::collections::HashMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Failed;
use tempfile::TempDir;

use crate::Workshop;

pub const TESTS: &[(&str, Test)] = &[
    ("compilers_variable", compilers_variable),
    ("no_compiler_for_the_target", no_compiler_for_the_target),
    ("compiler_for_another_target", compiler_for_another_target),
    ("values", values),
    ("headers_that_do_not_do", headers_that_do_not_do),
    ("modes", modes),
    ("what_cargo_is_to_watch", what_cargo_is_to_watch),
];

pub type Test = fn(&Workshop) -> Result<(), Failed>;

/// `-ffreestanding` selects the compiler's own `<stdint.h>`: the C library's depends on the architecture.
const FREESTANDING: &str = "cc -ffreestanding -U__x86_64__ -U__i386__ -U__aarch64__ -U__riscv";
const BIG: &str = "-U__BYTE_ORDER__ -D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__";
const MIPS64: &str = "mips64-unknown-linux-gnuabi64";

fn big_endian_mips() -> String {
    format!("{FREESTANDING} {BIG} -D__mips__")
}

fn little_endian_mips() -> String {
    format!("{FREESTANDING} -D__mips__")
}

/// build.rs as a program.
struct Script {
    folder: TempDir,
    include: TempDir,
}

struct Ran {
    passed: bool,
    output: String,
    /// The file of assertions that the script wrote for rustc.
    assertions: Option<String>,
}

impl Ran {
    #[track_caller]
    fn assert_compared(&self) {
        assert!(self.passed, "{}", self.output);
        self.assert_says("cargo::rustc-cfg=fuse_backing_uapi_header\n");
        assert!(self.assertions.is_some());
    }

    #[track_caller]
    fn assert_unchecked(&self, why: &str) {
        assert!(!self.passed, "{}", self.output);
        self.assert_says("cargo::error=ABI not compared: ");
        self.assert_says(why);
        assert!(!self.output.contains("rustc-cfg="), "{}", self.output);
        assert_eq!(self.assertions, None);
    }

    #[track_caller]
    fn assert_says(&self, what: &str) {
        assert!(
            self.output.contains(what),
            "no {what:?} in:\n{}",
            self.output
        );
    }
}

/// `target_arch`, pointer width and endianness, as cargo gives them to build scripts.
type Architecture = (&'static str, &'static str, &'static str);

impl Script {
    fn new(workshop: &Workshop) -> Result<Self, Failed> {
        let folder = TempDir::new()?;
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let output = Command::new(rustc)
            .args(["--edition=2024", "-Copt-level=0", "-Cdebuginfo=0", "-o"])
            .arg(folder.path().join("script"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/build.rs"))
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
        let include = Workshop::include(&workshop.header)?;
        Ok(Self { folder, include })
    }

    /// Runs the script in mode `require` for a cross build, with these compilers and the true header.
    fn run(
        &self,
        target: &str,
        architecture: Architecture,
        compilers: &[(&str, &str)],
    ) -> Result<Ran, Failed> {
        self.run_with(self.include.path(), target, architecture, compilers)
    }

    /// As `run`, with this include folder. `variables` override all others.
    fn run_with(
        &self,
        include: &Path,
        target: &str,
        (arch, bits, endian): Architecture,
        variables: &[(&str, &str)],
    ) -> Result<Ran, Failed> {
        let out = TempDir::new_in(self.folder.path())?;
        let output = Command::new(self.folder.path().join("script"))
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("OUT_DIR", out.path())
            .env("HOST", "host")
            .env("TARGET", target)
            .env("CARGO_CFG_TARGET_ARCH", arch)
            .env("CARGO_CFG_TARGET_POINTER_WIDTH", bits)
            .env("CARGO_CFG_TARGET_ENDIAN", endian)
            .env("FUSE_BACKING_UAPI_CHECK", "require")
            .env("FUSE_BACKING_UAPI_INCLUDE", include)
            .envs(variables.iter().copied().collect::<HashMap<_, _>>())
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Ran {
            passed: output.status.success(),
            output: said + &String::from_utf8_lossy(&output.stderr),
            assertions: std::fs::read_to_string(out.path().join("uapi_header.rs")).ok(),
        })
    }
}

/// The variable with the target's name, in either spelling, takes precedence over `CC`.
fn compilers_variable(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let (right, wrong) = (&*big_endian_mips(), "no-such-compiler");
    let dashes = &*format!("CC_{MIPS64}");
    let underscores = "CC_mips64_unknown_linux_gnuabi64";
    for compilers in [
        &[(dashes, right)][..],
        &[(underscores, right)],
        &[("CC", right)],
        &[(dashes, right), ("CC", wrong)],
        &[(underscores, right), ("CC", wrong)],
        &[(dashes, right), (underscores, wrong)],
        // An empty variable counts as unset.
        &[(dashes, " "), (underscores, right), ("CC", wrong)],
    ] {
        let ran = script.run(MIPS64, ("mips64", "64", "big"), compilers)?;
        ran.assert_compared();
    }
    let compilers = [(underscores, wrong), ("CC", right)];
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &compilers)?;
    ran.assert_unchecked("no C compiler: no-such-compiler: ");
    Ok(())
}

/// A cross build does not use the host's `cc`.
fn no_compiler_for_the_target(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[])?;
    ran.assert_unchecked(
        "no C compiler for mips64-unknown-linux-gnuabi64: set CC_mips64_unknown_linux_gnuabi64",
    );
    // The script ignores the variable of another target.
    let other = format!("CC_mips64el_unknown_linux_gnuabi64={}", big_endian_mips());
    let (name, value) = other.split_once('=').ok_or("no =")?;
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[(name, value)])?;
    ran.assert_unchecked(
        "no C compiler for mips64-unknown-linux-gnuabi64: set CC_mips64_unknown_linux_gnuabi64",
    );
    // The control: if host and target are the same, the script uses `cc`.
    if cfg!(target_pointer_width = "64") && cfg!(target_endian = "little") {
        script
            .run("host", (env::consts::ARCH, "64", "little"), &[])?
            .assert_compared();
    }
    Ok(())
}

/// The compiler's predefined macros contradict cargo.
fn compiler_for_another_target(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let (big, little) = (big_endian_mips(), little_endian_mips());
    let half = format!("{big} -U__SIZEOF_POINTER__ -D__SIZEOF_POINTER__=4");
    let nobody = format!("{FREESTANDING} {BIG}");
    let compared: [(Architecture, &str); 6] = [
        (("mips64", "64", "big"), &big),
        (("mips64", "64", "little"), &little),
        (("mips64r6", "64", "big"), &big),
        (("mips", "32", "big"), &half),
        // An architecture that the script does not know: it checks the pointer size and byte order alone.
        (("new64", "64", "big"), &nobody),
        (("new64", "64", "big"), &big),
    ];
    for (architecture, compiler) in compared {
        let ran = script.run("target", architecture, &[("CC_target", compiler)])?;
        ran.assert_compared();
    }
    let refused: [(Architecture, &str); 8] = [
        (("mips64", "64", "big"), &little),
        (("mips64", "64", "little"), &big),
        (("mips64", "64", "big"), &half),
        (("mips", "32", "big"), &big),
        (("powerpc64", "64", "big"), &big),
        (("mips64", "64", "big"), &nobody),
        (("new64", "64", "big"), &half),
        (("new64", "64", "little"), &big),
    ];
    for ((arch, bits, endian), compiler) in refused {
        let ran = script.run("target", (arch, bits, endian), &[("CC_target", compiler)])?;
        ran.assert_unchecked(&format!(
            "the C compiler is for another target: '{compiler}' is not for {arch}, {bits} bits, {endian} endian"
        ));
    }
    Ok(())
}

/// The assertions have the header's values. The ioctl numbers are those of the machine's own `asm/ioctl.h`.
fn values(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let compiler = big_endian_mips();
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[("CC", &compiler)])?;
    ran.assert_compared();
    let assertions = ran.assertions.ok_or("none")?;
    for assertion in [
        "assert!(size_of::<fuse_backing_map>() as u64 == 0x10, ",
        "assert!(align_of::<fuse_open_out>() as u64 == 0x8, ",
        "assert!(std::mem::offset_of!(fuse_init_out, max_stack_depth) as u64 == 0x24, ",
        "assert!(size(|s: &fuse_open_out| &s.backing_id) as u64 == 0x4, ",
        "assert!(signed(|s: &fuse_backing_map| &s.fd) as u64 == 0x1, ",
        "assert!(signed(|s: &fuse_backing_map| &s.flags) as u64 == 0x0, ",
        // A value of more than 32 bits, and one that is negative as an int.
        "assert!(FUSE_PASSTHROUGH as u64 == 0x2000000000, ",
        "assert!(FUSE_DEV_IOC_CLONE as u64 == 0x8004e500, ",
    ] {
        let line = format!("const _: () = {assertion}");
        let found = assertions.matches(&line).count();
        assert_eq!(found, 1, "{assertion} in:\n{assertions}");
    }
    // 3 structs' sizes and alignments, 18 fields' offsets, sizes and signedness, and 25 constants. A header of 6.9
    // lacks four constants, one before 7.3 lacks two.
    let count = assertions.lines().count();
    assert!((81..=85).contains(&count), "{count}");
    Ok(())
}

/// An absent header, an old one, and one without a field or a constant: the error names the header and the reason.
fn headers_that_do_not_do(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let architecture = ("mips64", "64", "big");
    let compiler = &*big_endian_mips();
    let missing = &*format!("{compiler} -include no-such-file.h");
    let unchecked = "ABI not compared: ";
    let without = |from: &str, to: &str| workshop.header.replace(from, to);
    for (header, before, after) in [
        (None, "there is no ", ""),
        (
            Some(without("FUSE_DEV_IOC_BACKING_OPEN", "FUSE_DEV_IOC_NONE")),
            "",
            " is older than Linux 6.9: it has no FUSE_DEV_IOC_BACKING_OPEN",
        ),
    ] {
        let include = TempDir::new()?;
        let path = include.path().join("linux/fuse.h");
        if let Some(header) = header {
            std::fs::create_dir(include.path().join("linux"))?;
            std::fs::write(&path, header)?;
        }
        let ran = script.run_with(include.path(), MIPS64, architecture, &[("CC", compiler)])?;
        ran.assert_unchecked(&format!("{unchecked}{before}{}{after}\n", path.display()));
    }
    let ran = script.run(MIPS64, architecture, &[("CC", missing)])?;
    ran.assert_unchecked("the C compiler cannot translate the probe: ");
    ran.assert_says("no-such-file.h");

    for (header, says) in [
        (without("int32_t\t\tbacking_id;", ""), "backing_id"),
        (
            without("#define FOPEN_NOFLUSH", "#define FOPEN_OTHER"),
            "FOPEN_NOFLUSH",
        ),
    ] {
        assert_ne!(header, workshop.header);
        let include = Workshop::include(&header)?;
        let ran = script.run_with(include.path(), MIPS64, architecture, &[("CC", compiler)])?;
        assert!(!ran.passed, "{}", ran.output);
        let path = include.path().join("linux/fuse.h");
        let lacks = format!(
            "cargo::error={} lacks what the crate binds: ",
            path.display()
        );
        ran.assert_says(&lacks);
        ran.assert_says(says);
    }
    // A header may lack the constants that are newer than Linux 6.9.
    const NEWER: [&str; 4] = [
        "FUSE_DEV_IOC_SYNC_INIT",
        "FUSE_OVER_IO_URING",
        "FUSE_HAS_IO_URING_BUFPOOL",
        "FOPEN_IO_URING_ZERO_COPY",
    ];
    let define = |name| format!("#define {name}");
    let header = NEWER.iter().fold(workshop.header.clone(), |header, name| {
        header.replace(&define(*name), "#define FUSE_OTHER")
    });
    let include = Workshop::include(&header)?;
    let ran = script.run_with(include.path(), MIPS64, architecture, &[("CC", compiler)])?;
    ran.assert_compared();
    let assertions = ran.assertions.ok_or("none")?;
    assert!(!NEWER.iter().any(|name| assertions.contains(name)));
    Ok(())
}

/// `auto` passes without a comparison, and tells the tests why. `off` compares nothing. Other modes fail.
fn modes(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let architecture = ("mips64", "64", "big");
    let compiler = &*big_endian_mips();
    let run = |mode, cc| {
        let variables = [("FUSE_BACKING_UAPI_CHECK", mode), ("CC", cc)];
        script.run_with(script.include.path(), MIPS64, architecture, &variables)
    };
    run("auto", compiler)?.assert_compared();
    let unchecked = run("auto", "no-such-compiler")?;
    assert!(unchecked.passed, "{}", unchecked.output);
    unchecked.assert_says(
        "cargo::rustc-env=FUSE_BACKING_UAPI_UNCHECKED=no C compiler: no-such-compiler: ",
    );
    assert!(
        !unchecked.output.contains("cargo::warning"),
        "{}",
        unchecked.output
    );
    assert!(
        !unchecked.output.contains("rustc-cfg="),
        "{}",
        unchecked.output
    );
    assert_eq!(unchecked.assertions, None);
    for mode in ["", "off"] {
        let off = run(mode, compiler)?;
        assert!(off.passed && off.assertions.is_none(), "{}", off.output);
        assert!(!off.output.contains("rustc-cfg="), "{}", off.output);
    }
    let other = run("always", compiler)?;
    assert!(!other.passed, "{}", other.output);
    other.assert_says("cargo::error=FUSE_BACKING_UAPI_CHECK is 'always': use off, auto or require");
    Ok(())
}

/// Cargo watches each variable that the script reads and each header that the compiler reads, also in a folder whose
/// name has a space.
fn what_cargo_is_to_watch(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let compiler = big_endian_mips();
    let dashes = &*format!("CC_{MIPS64}");
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[("CC", &compiler)])?;
    ran.assert_compared();
    for variable in [
        "FUSE_BACKING_UAPI_CHECK",
        "FUSE_BACKING_UAPI_INCLUDE",
        "CC",
        dashes,
        "CC_mips64_unknown_linux_gnuabi64",
    ] {
        ran.assert_says(&format!("cargo::rerun-if-env-changed={variable}\n"));
    }
    let watched: Vec<&Path> = ran
        .output
        .lines()
        .filter_map(|line| line.strip_prefix("cargo::rerun-if-changed="))
        .map(Path::new)
        .collect();
    let header: PathBuf = script.include.path().join("linux/fuse.h");
    assert!(watched.contains(&&*header), "{watched:?}");
    assert!(watched.contains(&Path::new("build.rs")), "{watched:?}");
    assert!(
        watched.iter().any(|path| path.ends_with("asm/ioctl.h")),
        "{watched:?}"
    );
    // Cargo runs a script again if a watched file does not exist.
    for path in watched.iter().filter(|path| path.is_absolute()) {
        assert!(path.is_file(), "{path:?}");
    }
    // Cargo would run the script each time if it watched a file that the script writes.
    let own = watched
        .iter()
        .filter(|path| path.starts_with(script.folder.path()));
    assert_eq!(own.count(), 0, "{watched:?}");
    Ok(())
}
