//! The build script by itself, told that it builds for other targets: no standard library for them
//! is needed, and the compilers for them are the machine's own, whose predefined macros lie.

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

/// Of its own `<stdint.h>`, since the C library's looks at the architecture.
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
    /// What it wrote for rustc to evaluate.
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
        self.assert_says("cargo::error=the ABI was not compared with a uapi header: ");
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

/// `target_arch`, bits and endianness, as cargo says them to build scripts.
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

    /// In `require` mode, for a target on a host that is another, with these compilers and the true
    /// header.
    fn run(
        &self,
        target: &str,
        architecture: Architecture,
        compilers: &[(&str, &str)],
    ) -> Result<Ran, Failed> {
        self.run_with(self.include.path(), target, architecture, compilers)
    }

    /// What `variables` has goes before everything else.
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

/// By the target's name in either spelling, which goes before `CC`.
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
        // Empty is as good as unset.
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

/// Not the host's `cc`, which is there.
fn no_compiler_for_the_target(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[])?;
    ran.assert_unchecked("set CC_mips64_unknown_linux_gnuabi64 for this cross build");
    // Of another target's it takes no notice.
    let other = format!("CC_mips64el_unknown_linux_gnuabi64={}", big_endian_mips());
    let (name, value) = other.split_once('=').ok_or("no =")?;
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[(name, value)])?;
    ran.assert_unchecked("set CC_mips64_unknown_linux_gnuabi64 for this cross build");
    // The control: when host and target are the same, `cc` it is.
    if cfg!(target_pointer_width = "64") && cfg!(target_endian = "little") {
        script
            .run("host", (env::consts::ARCH, "64", "little"), &[])?
            .assert_compared();
    }
    Ok(())
}

/// Its predefined macros say otherwise than cargo.
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
        // A family that the script has not heard of: by size and byte order alone.
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

/// Those of the header are what rustc is to compare: of the ioctls, here those of the compiler's own
/// `asm/ioctl.h`.
fn values(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let compiler = big_endian_mips();
    let ran = script.run(MIPS64, ("mips64", "64", "big"), &[("CC", &compiler)])?;
    ran.assert_compared();
    let assertions = ran.assertions.ok_or("none")?;
    for assertion in [
        "assert!(size_of::<fuse_backing_map>() == 16, ",
        "assert!(align_of::<fuse_open_out>() == 8, ",
        "assert!(std::mem::offset_of!(fuse_init_out, max_stack_depth) == 36, ",
        "assert!(size(|s: &fuse_open_out| &s.backing_id) == 4, ",
        "assert!(signed(|s: &fuse_backing_map| &s.fd) == true, ",
        "assert!(signed(|s: &fuse_backing_map| &s.flags) == false, ",
        // Of more than 32 bits, and one whose sign bit is set as an int.
        "assert!(FUSE_PASSTHROUGH as u64 == 0x2000000000, ",
        "assert!(FUSE_DEV_IOC_CLONE as u64 == 0x8004e500, ",
    ] {
        let line = format!("const _: () = {assertion}");
        let found = assertions.matches(&line).count();
        assert_eq!(found, 1, "{assertion} in:\n{assertions}");
    }
    // Three structs' sizes and alignments, three things of each of 18 fields, and 25 constants: a header of
    // 6.9 has four of them less, one before 7.3 two.
    let count = assertions.lines().count();
    assert!((81..=85).contains(&count), "{count}");
    Ok(())
}

/// None, an old one, one without a field or a constant: each is said, of the header that it is.
fn headers_that_do_not_do(workshop: &Workshop) -> Result<(), Failed> {
    let script = Script::new(workshop)?;
    let architecture = ("mips64", "64", "big");
    let compiler = &*big_endian_mips();
    let missing = &*format!("{compiler} -include no-such-file.h");
    let unchecked = "the ABI was not compared with a uapi header: ";
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
        (
            without("int32_t\t\tbacking_id;", ""),
            " does not declare what the crate binds:",
        ),
        (
            without("#define FOPEN_NOFLUSH", "#define FOPEN_OTHER"),
            " does not define FOPEN_NOFLUSH",
        ),
    ] {
        assert_ne!(header, workshop.header);
        let include = Workshop::include(&header)?;
        let ran = script.run_with(include.path(), MIPS64, architecture, &[("CC", compiler)])?;
        assert!(!ran.passed, "{}", ran.output);
        let path = include.path().join("linux/fuse.h");
        ran.assert_says(&format!("cargo::error={}{says}", path.display()));
        if says.contains("declare") {
            ran.assert_says("backing_id");
        }
    }
    // The younger ones a header need not have.
    const YOUNGER: [&str; 4] = [
        "FUSE_DEV_IOC_SYNC_INIT",
        "FUSE_OVER_IO_URING",
        "FUSE_HAS_IO_URING_BUFPOOL",
        "FOPEN_IO_URING_ZERO_COPY",
    ];
    let define = |name| format!("#define {name}");
    let header = YOUNGER
        .iter()
        .fold(workshop.header.clone(), |header, name| {
            header.replace(&define(*name), "#define FUSE_OTHER")
        });
    let include = Workshop::include(&header)?;
    let ran = script.run_with(include.path(), MIPS64, architecture, &[("CC", compiler)])?;
    ran.assert_compared();
    let assertions = ran.assertions.ok_or("none")?;
    assert!(!YOUNGER.iter().any(|name| assertions.contains(name)));
    Ok(())
}

/// What nobody asked for is not done, and what cannot be done is a warning or an error.
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
    unchecked.assert_says("cargo::warning=the ABI was not compared with a uapi header: ");
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

/// Each variable that it reads, and each header that the compiler read, also behind a folder's name
/// with a space.
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
    // Cargo runs a script again whose files are not there.
    for path in watched.iter().filter(|path| path.is_absolute()) {
        assert!(path.is_file(), "{path:?}");
    }
    // What the script wrote itself would make cargo run it each time.
    let own = watched
        .iter()
        .filter(|path| path.starts_with(script.folder.path()));
    assert_eq!(own.count(), 0, "{watched:?}");
    Ok(())
}
