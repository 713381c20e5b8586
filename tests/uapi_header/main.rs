//! The build script's comparison with `<linux/fuse.h>`, by building the crate against headers that
//! are true, and against headers that are not.
//!
//! The true one is that of `FUSE_BACKING_UAPI_INCLUDE`, else the compiler's own. Where that is older
//! than Linux 6.9 the outcome "too old" is asserted of it, and what 6.9 added is put in, so that
//! there is something to change.

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

use libtest_mimic::{Arguments, Failed, Trial};
use tempfile::TempDir;

use mode::Mode;

fn main() -> ExitCode {
    let mode = Mode::from_env();
    let (ready, workshop) = match Workshop::new() {
        Ok(workshop) => (Ok(()), Some(Arc::new(workshop))),
        Err(why) => (Err(why), None),
    };
    let mut trials: Vec<Trial> = Vec::new();
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

/// A change of the header, and how the build that sees it fails.
struct Mutation {
    name: &'static str,
    /// Each once in the header.
    changes: &'static [(&'static str, &'static str)],
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
            "the offset of fuse_backing_map.fd: 4 in the header",
            "the offset of fuse_backing_map.flags: 0 in the header",
        ],
    },
    Mutation {
        name: "type_of_a_field",
        changes: &[("int32_t\t\tfd;", "int64_t\t\tfd;")],
        says: &[
            "the size of fuse_backing_map.fd: 8 bytes in the header",
            "the size of fuse_backing_map: 24 in the header",
            // The number encodes the size.
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
            "the size of fuse_backing_map.padding: 4 bytes in the header",
            "the alignment of fuse_backing_map: 4 in the header",
        ],
    },
    Mutation {
        name: "signedness_of_fd",
        changes: &[("int32_t\t\tfd;", "uint32_t\t\tfd;")],
        says: &["the signedness of fuse_backing_map.fd: unsigned in the header"],
    },
    Mutation {
        name: "signedness_of_backing_id",
        changes: &[("int32_t\t\tbacking_id;", "uint32_t\t\tbacking_id;")],
        says: &["the signedness of fuse_open_out.backing_id: unsigned in the header"],
    },
    Mutation {
        name: "name_of_a_field_that_moved",
        changes: &[(
            "uint32_t\tflags;\n\tuint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "uint64_t\tops_mask;\n\tuint32_t\tflags;\n};\n\n/* Device ioctls: */",
        )],
        says: &[
            // `padding` is looked for behind `flags`, and that is where `flags` itself is now.
            "the offset of fuse_backing_map.padding: 16 in the header",
            "the offset of fuse_backing_map.flags: 16 in the header",
            "the size of fuse_backing_map: 24 in the header",
        ],
    },
    Mutation {
        name: "name_and_size_of_a_field",
        changes: &[(
            "uint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "uint32_t\tops_mask;\n\tuint32_t\tmore;\n};\n\n/* Device ioctls: */",
        )],
        says: &["the size of fuse_backing_map.padding: 4 bytes in the header"],
    },
    Mutation {
        name: "name_and_sign_of_a_field",
        changes: &[("int32_t\t\tbacking_id;", "uint32_t\tbacking;")],
        says: &["the signedness of fuse_open_out.backing_id: unsigned in the header"],
    },
    Mutation {
        name: "name_and_place_of_a_field_of_the_same_size",
        changes: &[(
            "uint32_t\topen_flags;\n\tint32_t\t\tbacking_id;",
            "int32_t\t\tbacking;\n\tuint32_t\topen_flags;",
        )],
        says: &[
            "the signedness of fuse_open_out.backing_id: unsigned in the header",
            "the offset of fuse_open_out.open_flags: 12 in the header",
        ],
    },
    Mutation {
        name: "field_gone",
        changes: &[(
            "uint64_t\tpadding;\n};\n\n/* Device ioctls: */",
            "};\n\n/* Device ioctls: */",
        )],
        says: &["does not declare what the crate binds", "padding"],
    },
    Mutation {
        name: "place_in_init_out",
        changes: &[(
            "uint32_t\tmax_stack_depth;",
            "uint32_t\tother;\n\tuint32_t\tmax_stack_depth;",
        )],
        says: &["the offset of fuse_init_out.max_stack_depth: 40 in the header"],
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
    // Of Linux 7.3. An older header has neither.
    Mutation {
        name: "younger_bits",
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
        says: &["does not define FOPEN_NOFLUSH"],
    },
];

/// What 6.9 added to a header, for machines whose own is older.
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

/// The true header, and where the crate is built: one target folder, so that dependencies are
/// compiled once.
struct Workshop {
    header: String,
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
                "older than Linux 6.9, brought up to it"
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

    /// A folder with this `linux/fuse.h` and no other.
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
        // Cargo would wait for its own lock, and say so in the output.
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
            // Away from the checkout's .cargo/config.toml, as a dependent is.
            .current_dir(self.target.path());
        configure(&mut cargo);
        let output = cargo.output()?;
        Ok(Build {
            passed: output.status.success(),
            output: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

/// What `cc` includes, from the first line that preprocessing leaves of it.
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

/// The control: without a change the build passes, and says nothing.
fn true_header(workshop: &Workshop) -> Result<(), Failed> {
    let include = Workshop::include(&workshop.header)?;
    for mode in ["auto", "require"] {
        let build = workshop.check(mode, include.path())?;
        build.assert_passed();
        assert!(!build.output.contains("warning"), "{}", build.output);
    }
    Ok(())
}

/// A field at the same place, of the same type, may have another name. `ops_mask` is proposed on the kernel's lists.
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

/// In a target folder that no other test builds in.
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

/// Without `FUSE_BACKING_UAPI_INCLUDE`: what the compiler has.
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

/// Another outcome than a mismatch.
fn too_old(workshop: &Workshop) -> Result<(), Failed> {
    let old = workshop
        .header
        .replace("FUSE_DEV_IOC_BACKING_OPEN", "FUSE_DEV_IOC_NONE");
    let include = Workshop::include(&old)?;
    let says = [
        "was not compared with a uapi header",
        "is older than Linux 6.9",
    ];
    workshop
        .check("require", include.path())?
        .assert_failed(&says);
    let auto = workshop.check("auto", include.path())?;
    auto.assert_passed();
    auto.assert_says(&says);
    auto.assert_says(&["warning: fuse-backing"]);
    Ok(())
}

fn absent(workshop: &Workshop) -> Result<(), Failed> {
    let empty = TempDir::new()?;
    let says = [
        "was not compared with a uapi header: there is no ",
        "linux/fuse.h",
    ];
    workshop
        .check("require", empty.path())?
        .assert_failed(&says);
    let auto = workshop.check("auto", empty.path())?;
    auto.assert_passed();
    auto.assert_says(&says);
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
        for (mode, passes) in [("require", false), ("auto", true)] {
            let build = workshop.cargo(|cargo| {
                cargo
                    .env("FUSE_BACKING_UAPI_CHECK", mode)
                    .env("FUSE_BACKING_UAPI_INCLUDE", include.path())
                    .env("CC", cc);
            })?;
            assert_eq!(build.passed, passes, "{cc}: {}", build.output);
            build.assert_says(&["was not compared with a uapi header", says]);
        }
    }
    Ok(())
}

fn unknown_mode(workshop: &Workshop) -> Result<(), Failed> {
    let include = Workshop::include(&workshop.header)?;
    let build = workshop.check("always", include.path())?;
    build.assert_failed(&["FUSE_BACKING_UAPI_CHECK is 'always': use off, auto or require"]);
    Ok(())
}

/// A dependent's build: a crate of its own, outside of the checkout, with no C compiler to be found.
///
/// rustc links build scripts with `cc`, so that one is named by its path, and what PATH leads to is
/// an empty folder.
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
    // The versions that this checkout has in the local registry.
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
            // Where the linker driver finds `ld`.
            .env("COMPILER_PATH", "/usr/bin")
            .env("PATH", empty.path())
            .env_remove("CC")
            .env_remove("FUSE_BACKING_UAPI_CHECK")
            .current_dir(dependent.path());
    })?;
    build.assert_passed();
    assert!(!build.output.contains("warning"), "{}", build.output);
    // The control: here a compiler that is asked for is not found.
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

/// `CARGO_TARGET_<TRIPLE>_LINKER` of the host, which is what build scripts are for.
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
