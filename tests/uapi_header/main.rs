//! Tests the build script's comparison with `<linux/fuse.h>`: builds the crate against the true header and against
//! changed ones.
//!
//! The true header is the one that `FUSE_BACKING_UAPI_INCLUDE` selects, else the compiler's own. If it is older than
//! Linux 6.9, the tests add what 6.9 added.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]
#![allow(unreachable_pub)]

#[path = "../support/mode.rs"]
mod mode;
mod script;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tempfile::TempDir;

use mode::Mode;

fn main() -> ExitCode {
    let mode = Mode::from_env();
    let (ready, workshop) = match Workshop::new() {
        Ok(workshop) => (Ok(()), Some(Arc::new(workshop))),
        Err(why) => (Err(why), None),
    };
    let mut trials = vec![Trial::ignorable_test("abi_compared", abi_compared)];
    let mut add = |name: &str, test: fn(&Workshop) -> Result<(), Failed>| {
        let workshop = workshop.clone();
        trials.push(mode.trial(name, &ready, move || test(&workshop.expect("ready"))));
    };
    add("true_header", true_header);
    add("renamed_fields", renamed_fields);
    add("the_machines_header", the_machines_header);
    add(
        "looks_again_at_a_changed_header",
        looks_again_at_a_changed_header,
    );
    add("too_old", too_old);
    add("absent", absent);
    add("unusable_compiler", unusable_compiler);
    add("unknown_mode", unknown_mode);
    add("off_needs_no_compiler", off_needs_no_compiler);
    for (name, test) in script::TESTS {
        add(&format!("script::{name}"), *test);
    }
    for mutation in MUTATIONS {
        let workshop = workshop.clone();
        let name = format!("mutation::{}", mutation.name);
        trials.push(mode.trial(&name, &ready, move || {
            bites(&workshop.expect("ready"), mutation)
        }));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Reports whether this build compared the ABI. In mode `require` a build that did not fails before the tests run.
fn abi_compared() -> Result<Completion, Failed> {
    if cfg!(fuse_backing_uapi_header) {
        return Ok(Completion::Completed);
    }
    let reason = option_env!("FUSE_BACKING_UAPI_UNCHECKED");
    let reason = reason.unwrap_or("FUSE_BACKING_UAPI_CHECK is off");
    let report = format!("ABI not compared: {reason}. See CONTRIBUTING.md, ABI verification");
    match option_env!("FUSE_BACKING_UAPI_CHECK") {
        Some("require") => Err(report.into()),
        _ => Ok(Completion::ignored_with(report)),
    }
}

/// A change of the header that fails the build.
struct Mutation {
    name: &'static str,
    /// The header has the first text of each pair exactly once. The second replaces it.
    changes: &'static [(&'static str, &'static str)],
    /// The build's output contains these.
    says: &'static [&'static str],
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "order_of_fields",
        changes: &[
            ("int32_t\t\tfd;", "MARK"),
            (
                "MARK\n\tuint32_t\tflags;",
                "uint32_t\tflags;\n\tint32_t\t\tfd;",
            ),
        ],
        says: &[
            "offset_of!(fuse_backing_map, fd): 0x4 in the header",
            "offset_of!(fuse_backing_map, flags): 0x0 in the header",
        ],
    },
    Mutation {
        name: "type_of_a_field",
        changes: &[("int32_t\t\tfd;", "int64_t\t\tfd;")],
        says: &[
            "size(|s: &fuse_backing_map| &s.fd): 0x8 in the header",
            "size_of::<fuse_backing_map>(): 0x18 in the header",
            // The ioctl number encodes the size.
            "FUSE_DEV_IOC_BACKING_OPEN",
        ],
    },
    Mutation {
        name: "type_of_the_last_field",
        changes: &[(
            "uint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "uint32_t\tpadding;\n};\n\n/* Device ioctls: */",
        )],
        says: &[
            "size(|s: &fuse_backing_map| &s.padding): 0x4 in the header",
            "align_of::<fuse_backing_map>(): 0x4 in the header",
        ],
    },
    Mutation {
        name: "signedness_of_fd",
        changes: &[("int32_t\t\tfd;", "uint32_t\t\tfd;")],
        says: &["signed(|s: &fuse_backing_map| &s.fd): 0x0 in the header"],
    },
    Mutation {
        name: "signedness_of_backing_id",
        changes: &[("int32_t\t\tbacking_id;", "uint32_t\t\tbacking_id;")],
        says: &["signed(|s: &fuse_open_out| &s.backing_id): 0x0 in the header"],
    },
    Mutation {
        name: "name_of_a_field_that_moved",
        changes: &[(
            "uint32_t\tflags;\n\tuint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "uint64_t\tops_mask;\n\tuint32_t\tflags;\n};\n\n/* Device ioctls: */",
        )],
        says: &[
            // `padding` is looked up at the third position, where the changed header has `flags`.
            "offset_of!(fuse_backing_map, padding): 0x10 in the header",
            "offset_of!(fuse_backing_map, flags): 0x10 in the header",
            "size_of::<fuse_backing_map>(): 0x18 in the header",
        ],
    },
    Mutation {
        name: "name_and_size_of_a_field",
        changes: &[(
            "uint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "uint32_t\tops_mask;\n\tuint32_t\tmore;\n};\n\n/* Device ioctls: */",
        )],
        says: &["size(|s: &fuse_backing_map| &s.padding): 0x4 in the header"],
    },
    Mutation {
        name: "name_and_sign_of_a_field",
        changes: &[("int32_t\t\tbacking_id;", "uint32_t\tbacking;")],
        says: &["signed(|s: &fuse_open_out| &s.backing_id): 0x0 in the header"],
    },
    Mutation {
        name: "name_and_place_of_a_field_of_the_same_size",
        changes: &[(
            "uint32_t\topen_flags;\n\tint32_t\t\tbacking_id;",
            "int32_t\t\tbacking;\n\tuint32_t\topen_flags;",
        )],
        says: &[
            "signed(|s: &fuse_open_out| &s.backing_id): 0x0 in the header",
            "offset_of!(fuse_open_out, open_flags): 0xc in the header",
        ],
    },
    Mutation {
        name: "field_gone",
        changes: &[(
            "uint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "};\n\n/* Device ioctls: */",
        )],
        says: &["lacks what the crate binds", "padding"],
    },
    Mutation {
        name: "place_in_init_out",
        changes: &[(
            "uint32_t\tmax_stack_depth;",
            "uint32_t\tother;\n\tuint32_t\tmax_stack_depth;",
        )],
        says: &["offset_of!(fuse_init_out, max_stack_depth): 0x28 in the header"],
    },
    Mutation {
        name: "number_of_an_ioctl",
        changes: &[("_IOW(FUSE_DEV_IOC_MAGIC, 1,", "_IOW(FUSE_DEV_IOC_MAGIC, 4,")],
        says: &["the crate on FUSE_DEV_IOC_BACKING_OPEN: 0x"],
    },
    Mutation {
        name: "direction_of_an_ioctl",
        changes: &[("_IOW(FUSE_DEV_IOC_MAGIC, 2,", "_IOR(FUSE_DEV_IOC_MAGIC, 2,")],
        says: &["the crate on FUSE_DEV_IOC_BACKING_CLOSE: 0x"],
    },
    Mutation {
        name: "magic",
        changes: &[("FUSE_DEV_IOC_MAGIC\t\t229", "FUSE_DEV_IOC_MAGIC\t\t228")],
        says: &[
            "FUSE_DEV_IOC_MAGIC: 0xe4 in the header",
            "FUSE_DEV_IOC_CLONE",
        ],
    },
    Mutation {
        name: "init_bit",
        changes: &[("(1ULL << 37)", "(1ULL << 38)")],
        says: &["FUSE_PASSTHROUGH: 0x4000000000 in the header"],
    },
    Mutation {
        name: "fopen_bit",
        changes: &[("FOPEN_PASSTHROUGH\t(1 << 7)", "FOPEN_PASSTHROUGH\t(1 << 8)")],
        says: &["FOPEN_PASSTHROUGH: 0x100 in the header"],
    },
    // Linux 7.3 added both. An older header has neither.
    Mutation {
        name: "newer_bits",
        changes: &[(
            "/* Device ioctls: */\n",
            "#undef FOPEN_IO_URING_ZERO_COPY\n#define FOPEN_IO_URING_ZERO_COPY (1 << 9)\n\
             #undef FUSE_HAS_IO_URING_BUFPOOL\n#define FUSE_HAS_IO_URING_BUFPOOL (1ULL << 44)\n\
             /* Device ioctls: */\n",
        )],
        says: &[
            "FOPEN_IO_URING_ZERO_COPY: 0x200 in the header",
            "FUSE_HAS_IO_URING_BUFPOOL: 0x100000000000 in the header",
        ],
    },
    Mutation {
        name: "constant_gone",
        changes: &[("#define FOPEN_NOFLUSH", "#define FOPEN_OTHER")],
        says: &["lacks what the crate binds", "FOPEN_NOFLUSH"],
    },
];

/// Turns an older header into one of Linux 6.9.
const ADDED_BY_6_9: &[(&str, &str)] = &[
    (
        "struct fuse_open_out {\n\tuint64_t\tfh;\n\tuint32_t\topen_flags;\n\tuint32_t\tpadding;\n};",
        "struct fuse_open_out {\n\tuint64_t\tfh;\n\tuint32_t\topen_flags;\n\tint32_t\t\tbacking_id;\n};",
    ),
    (
        "uint32_t\tflags2;\n\tuint32_t\tunused[7];",
        "uint32_t\tflags2;\n\tuint32_t\tmax_stack_depth;\n\tuint32_t\tunused[6];",
    ),
    (
        "/* Device ioctls: */\n",
        "struct fuse_backing_map {\n\tint32_t\t\tfd;\n\tuint32_t\tflags;\n\tuint64_t\tpadding;\n};\n\n\
         /* Device ioctls: */\n\
         #define FUSE_DIRECT_IO_ALLOW_MMAP\t(1ULL << 36)\n\
         #define FUSE_PASSTHROUGH\t(1ULL << 37)\n\
         #define FOPEN_PASSTHROUGH\t(1 << 7)\n\
         #define FUSE_DEV_IOC_BACKING_OPEN\t_IOW(FUSE_DEV_IOC_MAGIC, 1, struct fuse_backing_map)\n\
         #define FUSE_DEV_IOC_BACKING_CLOSE\t_IOW(FUSE_DEV_IOC_MAGIC, 2, uint32_t)\n",
    ),
];

struct Workshop {
    /// The text of the true header.
    header: String,
    /// All builds share it, so that dependencies are compiled once.
    target: TempDir,
    lock: Mutex<()>,
}

impl Workshop {
    fn new() -> Result<Self, String> {
        let path = match env::var("FUSE_BACKING_UAPI_INCLUDE") {
            Ok(dir) if !dir.is_empty() => Path::new(&dir).join("linux/fuse.h"),
            _ => compilers_header()?,
        };
        let header = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let young = header.contains("FUSE_DEV_IOC_BACKING_OPEN");
        eprintln!(
            "header: {}, {}",
            path.display(),
            if young {
                "of Linux 6.9 or newer"
            } else {
                "older than Linux 6.9: the tests add what 6.9 added"
            }
        );
        let header = if young {
            header
        } else {
            change(&header, ADDED_BY_6_9)?
        };
        Ok(Self {
            header,
            target: TempDir::new().map_err(|e| e.to_string())?,
            lock: Mutex::default(),
        })
    }

    /// Creates an include folder that has this `linux/fuse.h` alone.
    fn include(header: &str) -> Result<TempDir, Failed> {
        let dir = TempDir::with_prefix("with {space} ")?;
        fs::create_dir(dir.path().join("linux"))?;
        fs::write(dir.path().join("linux/fuse.h"), header)?;
        Ok(dir)
    }

    fn check(&self, mode: &str, include: &Path) -> Result<Build, Failed> {
        self.cargo(|cargo| {
            cargo
                .env("FUSE_BACKING_UAPI_CHECK", mode)
                .env("FUSE_BACKING_UAPI_INCLUDE", include);
        })
    }

    fn cargo(&self, configure: impl FnOnce(&mut Command)) -> Result<Build, Failed> {
        // A second cargo would wait for the lock of the target folder, and print that it waits.
        let _one_at_a_time = self.lock.lock();
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args([
                "check",
                "--lib",
                "--offline",
                "--color=never",
                "--manifest-path",
            ])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .env("CARGO_TARGET_DIR", self.target.path())
            .env_remove("FUSE_BACKING_UAPI_INCLUDE")
            // A dependent's build does not read the checkout's .cargo/config.toml either.
            .current_dir(self.target.path());
        configure(&mut cargo);
        let output = cargo.output()?;
        Ok(Build {
            passed: output.status.success(),
            output: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// Returns the path of the `<linux/fuse.h>` that `cc` includes.
fn compilers_header() -> Result<PathBuf, String> {
    let source = TempDir::new().map_err(|e| e.to_string())?;
    let file = source.path().join("probe.c");
    fs::write(&file, "#include <linux/fuse.h>\n").map_err(|e| e.to_string())?;
    let output = Command::new("cc")
        .arg("-M")
        .arg(file)
        .output()
        .map_err(|e| format!("no C compiler: cc: {e}"))?;
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .find(|word| word.ends_with("linux/fuse.h"))
        .map(PathBuf::from)
        .ok_or_else(|| "the C compiler has no <linux/fuse.h>".to_owned())
}

fn change(header: &str, changes: &[(&str, &str)]) -> Result<String, String> {
    let mut header = header.to_owned();
    for (from, to) in changes {
        if header.matches(from).count() != 1 {
            return Err(format!("the header does not have {from:?} exactly once"));
        }
        header = header.replace(from, to);
    }
    Ok(header)
}

struct Build {
    passed: bool,
    output: String,
}

impl Build {
    #[track_caller]
    fn assert_passed(&self) {
        assert!(self.passed, "{}", self.output);
    }

    #[track_caller]
    fn assert_passed_silently(&self) {
        self.assert_passed();
        assert!(!self.output.contains("warning"), "{}", self.output);
    }

    #[track_caller]
    fn assert_failed(&self, says: &[&str]) {
        assert!(!self.passed, "the build passed");
        self.assert_says(says);
    }

    #[track_caller]
    fn assert_says(&self, says: &[&str]) {
        for what in says {
            assert!(
                self.output.contains(what),
                "no {what:?} in:\n{}",
                self.output
            );
        }
    }
}

fn bites(workshop: &Workshop, mutation: &Mutation) -> Result<(), Failed> {
    let include = Workshop::include(&change(&workshop.header, mutation.changes)?)?;
    for mode in ["require", "auto"] {
        workshop
            .check(mode, include.path())?
            .assert_failed(mutation.says);
    }
    Ok(())
}

/// The control: without a change the build passes without a warning.
fn true_header(workshop: &Workshop) -> Result<(), Failed> {
    let include = Workshop::include(&workshop.header)?;
    for mode in ["auto", "require"] {
        let build = workshop.check(mode, include.path())?;
        build.assert_passed_silently();
    }
    Ok(())
}

/// The header may rename a field that keeps its place and type. `ops_mask` is proposed on the kernel's lists.
fn renamed_fields(workshop: &Workshop) -> Result<(), Failed> {
    let changes = [
        (
            "padding;\n};\n\n/* Device ioctls: */",
            "ops_mask;\n};\n\n/* Device ioctls: */",
        ),
        ("int32_t\t\tbacking_id;", "int32_t\t\tbacking;"),
        ("uint32_t\tmax_stack_depth;", "uint32_t\tdepth;"),
    ];
    let include = Workshop::include(&change(&workshop.header, &changes)?)?;
    workshop.check("require", include.path())?.assert_passed();
    Ok(())
}

/// Builds in a target folder of its own: other tests' builds would hide that cargo builds again.
fn looks_again_at_a_changed_header(workshop: &Workshop) -> Result<(), Failed> {
    let include = Workshop::include(&workshop.header)?;
    let target = TempDir::new()?;
    let check = || {
        workshop.cargo(|cargo| {
            cargo
                .env("CARGO_TARGET_DIR", target.path())
                .env("FUSE_BACKING_UAPI_CHECK", "require")
                .env("FUSE_BACKING_UAPI_INCLUDE", include.path());
        })
    };
    check()?.assert_passed();
    let unchanged = check()?;
    assert!(
        !unchanged.output.contains("fuse-backing v"),
        "{}",
        unchanged.output
    );
    let mutation = MUTATIONS.first().ok_or("no mutation")?;
    let changed = change(&workshop.header, mutation.changes)?;
    fs::write(include.path().join("linux/fuse.h"), changed)?;
    check()?.assert_failed(mutation.says);
    Ok(())
}

/// Without `FUSE_BACKING_UAPI_INCLUDE` the header is the compiler's own.
fn the_machines_header(workshop: &Workshop) -> Result<(), Failed> {
    let require = workshop.cargo(|cargo| {
        cargo.env("FUSE_BACKING_UAPI_CHECK", "require");
    })?;
    match compilers_header() {
        Ok(path) if fs::read_to_string(&path)?.contains("FUSE_DEV_IOC_BACKING_OPEN") => {
            require.assert_passed();
        }
        Ok(_) => require.assert_failed(&["<linux/fuse.h> is older than Linux 6.9"]),
        Err(_) => require.assert_failed(&["there is no <linux/fuse.h>"]),
    }
    Ok(())
}

/// A header that is too old is no mismatch.
fn too_old(workshop: &Workshop) -> Result<(), Failed> {
    let old = workshop
        .header
        .replace("FUSE_DEV_IOC_BACKING_OPEN", "FUSE_DEV_IOC_NONE");
    let include = Workshop::include(&old)?;
    let says = ["ABI not compared: ", "is older than Linux 6.9"];
    workshop
        .check("require", include.path())?
        .assert_failed(&says);
    workshop
        .check("auto", include.path())?
        .assert_passed_silently();
    Ok(())
}

fn absent(workshop: &Workshop) -> Result<(), Failed> {
    let empty = TempDir::new()?;
    let says = ["ABI not compared: there is no ", "linux/fuse.h"];
    workshop
        .check("require", empty.path())?
        .assert_failed(&says);
    workshop
        .check("auto", empty.path())?
        .assert_passed_silently();
    Ok(())
}

fn unusable_compiler(workshop: &Workshop) -> Result<(), Failed> {
    let include = Workshop::include(&workshop.header)?;
    let other_target = if cfg!(target_pointer_width = "64") {
        "cc -U__SIZEOF_POINTER__ -D__SIZEOF_POINTER__=4"
    } else {
        "cc -U__SIZEOF_POINTER__ -D__SIZEOF_POINTER__=8"
    };
    for (cc, says) in [
        (
            "no-such-compiler --flag",
            "no C compiler: no-such-compiler --flag",
        ),
        (other_target, "the C compiler is for another target"),
        (
            "cc -include no-such-file.h",
            "the C compiler cannot translate the probe",
        ),
    ] {
        let build = |mode| {
            workshop.cargo(|cargo| {
                cargo
                    .env("FUSE_BACKING_UAPI_CHECK", mode)
                    .env("FUSE_BACKING_UAPI_INCLUDE", include.path())
                    .env("CC", cc);
            })
        };
        build("require")?.assert_failed(&["ABI not compared: ", says]);
        build("auto")?.assert_passed_silently();
    }
    Ok(())
}

fn unknown_mode(workshop: &Workshop) -> Result<(), Failed> {
    let include = Workshop::include(&workshop.header)?;
    let build = workshop.check("always", include.path())?;
    build.assert_failed(&["FUSE_BACKING_UAPI_CHECK is 'always': use off, auto or require"]);
    Ok(())
}

/// A dependent's build: another crate, outside the checkout, with no C compiler in PATH.
///
/// PATH is an empty folder. rustc links build scripts with `cc`, whose full path the linker variable has.
fn off_needs_no_compiler(workshop: &Workshop) -> Result<(), Failed> {
    let dependent = TempDir::new()?;
    fs::create_dir(dependent.path().join("src"))?;
    fs::write(
        dependent.path().join("src/lib.rs"),
        "pub use fuse_backing::FuseDevice;",
    )?;
    let manifest = format!(
        "[package]\nname = 'dependent'\nedition = '2024'\n[dependencies]\nfuse-backing.path = {:?}\n",
        env!("CARGO_MANIFEST_DIR")
    );
    fs::write(dependent.path().join("Cargo.toml"), manifest)?;
    // The versions that cargo has without a network.
    fs::copy(
        concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock"),
        dependent.path().join("Cargo.lock"),
    )?;
    let linker = which("cc").ok_or("no linker")?;
    let empty = TempDir::new()?;
    let build = workshop.cargo(|cargo| {
        *cargo = Command::new(env!("CARGO"));
        cargo
            .args(["build", "--offline", "--color=never"])
            .env("CARGO_TARGET_DIR", workshop.target.path())
            .env("RUSTC", which("rustc").unwrap_or_else(|| "rustc".into()))
            .env(linker_variable(), linker)
            // The linker driver finds `ld` here.
            .env("COMPILER_PATH", "/usr/bin")
            .env("PATH", empty.path())
            .env_remove("CC")
            .env_remove("FUSE_BACKING_UAPI_CHECK")
            .current_dir(dependent.path());
    })?;
    build.assert_passed_silently();
    // The control: a required comparison finds no compiler.
    let asked = workshop.cargo(|cargo| {
        cargo
            .env("PATH", empty.path())
            .env("RUSTC", which("rustc").unwrap_or_else(|| "rustc".into()))
            .env(linker_variable(), which("cc").unwrap_or_default())
            .env("COMPILER_PATH", "/usr/bin")
            .env_remove("CC")
            .env("FUSE_BACKING_UAPI_CHECK", "require");
    })?;
    asked.assert_failed(&["no C compiler: cc: "]);
    Ok(())
}

fn which(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Returns `CARGO_TARGET_<TRIPLE>_LINKER` of the host: build scripts run there.
fn linker_variable() -> String {
    let output = Command::new("rustc").arg("-vV").output().expect("rustc");
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .expect("rustc -vV names the host");
    format!(
        "CARGO_TARGET_{}_LINKER",
        host.replace('-', "_").to_uppercase()
    )
}
