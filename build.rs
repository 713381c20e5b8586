//! Compares the crate's idea of the ABI with `<linux/fuse.h>`.
//!
//! `FUSE_BACKING_UAPI_CHECK` says whether:
//!
//! - unset, empty or `off`: not at all. Dependents build without a C compiler.
//! - `auto`: if there is a C compiler for the target and a header of Linux 6.9 or newer; otherwise a
//!   cargo warning says why not.
//! - `require`: an unchecked build fails.
//!
//! `FUSE_BACKING_UAPI_INCLUDE=DIR` takes `DIR/linux/fuse.h` for the header (a relative one is looked
//! for from the package's own folder), which otherwise is the compiler's own `<linux/fuse.h>`. The compiler is `CC_<target>`, `CC`, or `cc` when host and
//! target are the same.
//!
//! The compiler only ever translates, for the target, and nothing it makes is run: it leaves the
//! header's values as text in the assembly, and they become assertions that rustc evaluates when it
//! compiles the crate for the same target. So a mismatch is a compile error that names the field or
//! the number.

use std::env;
use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

/// What is compared: of each struct size and alignment, of its first fields offset, size and signedness.
/// A field whose name the header does not have is renamed: it is found by its position.
const STRUCTS: &[(&str, &str)] = &[
    ("fuse_backing_map", "fd flags padding"),
    ("fuse_open_out", "fh open_flags backing_id"),
    (
        "fuse_init_out",
        "major minor max_readahead flags max_background congestion_threshold max_write \
         time_gran max_pages map_alignment flags2 max_stack_depth",
    ),
];
const CONSTANTS: &[&str] = &[
    "FUSE_DEV_IOC_MAGIC",
    "FUSE_DEV_IOC_CLONE",
    "FUSE_DEV_IOC_BACKING_OPEN",
    "FUSE_DEV_IOC_BACKING_CLOSE",
    "FUSE_WRITEBACK_CACHE",
    "FUSE_HANDLE_KILLPRIV",
    "FUSE_HANDLE_KILLPRIV_V2",
    "FUSE_OPEN_KILL_SUIDGID",
    "FUSE_WRITE_KILL_SUIDGID",
    "FATTR_KILL_SUIDGID",
    "FUSE_INIT_EXT",
    "FUSE_DIRECT_IO_ALLOW_MMAP",
    "FUSE_PASSTHROUGH",
    "FOPEN_DIRECT_IO",
    "FOPEN_KEEP_CACHE",
    "FOPEN_NONSEEKABLE",
    "FOPEN_CACHE_DIR",
    "FOPEN_STREAM",
    "FOPEN_NOFLUSH",
    "FOPEN_PARALLEL_DIRECT_WRITES",
    "FOPEN_PASSTHROUGH",
];
/// The same, which a header of 6.9 need not have.
const YOUNGER_THAN_6_9: &[&str] = &[
    "FUSE_DEV_IOC_SYNC_INIT",
    "FUSE_OVER_IO_URING",
    "FUSE_HAS_IO_URING_BUFPOOL",
    "FOPEN_IO_URING_ZERO_COPY",
];

/// Predefined macro, family, and the `target_arch`s of that family.
const FAMILIES: &[(&str, &str, &[&str])] = &[
    ("__x86_64__", "x86", &["x86", "x86_64"]),
    ("__i386__", "x86", &["x86", "x86_64"]),
    ("__aarch64__", "aarch64", &["aarch64"]),
    ("__arm__", "arm", &["arm"]),
    ("__riscv", "riscv", &["riscv32", "riscv64"]),
    ("__s390__", "s390", &["s390x"]),
    (
        "__loongarch__",
        "loongarch",
        &["loongarch32", "loongarch64"],
    ),
    ("__powerpc__", "powerpc", &["powerpc", "powerpc64"]),
    (
        "__mips__",
        "mips",
        &["mips", "mips32r6", "mips64", "mips64r6"],
    ),
    ("__sparc__", "sparc", &["sparc", "sparc64"]),
];

/// Where shuttle, by which src/model.rs explores the table, runs: elsewhere its coroutines, which are in
/// assembly, are missing. As in Cargo.toml.
const MODELLED: &[&str] = &[
    "x86",
    "x86_64",
    "arm",
    "aarch64",
    "riscv64",
    "loongarch64",
    "s390x",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(fuse_backing_uapi_header)");
    println!("cargo::rustc-check-cfg=cfg(fuse_backing_modelled)");
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| MODELLED.contains(&&*arch)) {
        println!("cargo::rustc-cfg=fuse_backing_modelled");
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(why)) => {
            for line in why.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

/// The build fails.
struct Failure(String);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self(format!("fuse-backing: build script: {error}"))
    }
}

/// Nothing was compared.
enum Unchecked {
    NoCompiler(String),
    OtherTarget(String),
    Untranslatable(String),
    HeaderAbsent(String),
    HeaderTooOld(String),
}

impl fmt::Display for Unchecked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCompiler(why) => write!(f, "no C compiler: {why}"),
            Self::OtherTarget(why) => write!(f, "the C compiler is for another target: {why}"),
            Self::Untranslatable(why) => {
                write!(f, "the C compiler cannot translate the probe: {why}")
            }
            Self::HeaderAbsent(header) => write!(f, "there is no {header}"),
            Self::HeaderTooOld(header) => write!(
                f,
                "{header} is older than Linux 6.9: it has no FUSE_DEV_IOC_BACKING_OPEN"
            ),
        }
    }
}

fn run() -> Result<(), Failure> {
    let require = match variable("FUSE_BACKING_UAPI_CHECK")?.as_deref() {
        None | Some("" | "off") => return Ok(()),
        Some("auto") => false,
        Some("require") => true,
        Some(other) => {
            return Err(Failure(format!(
                "FUSE_BACKING_UAPI_CHECK is '{other}': use off, auto or require"
            )));
        }
    };
    let probe = Probe::new()?;
    match probe.check()? {
        Ok(assertions) => {
            fs::write(probe.out_dir.join("uapi_header.rs"), assertions)?;
            println!("cargo::rustc-cfg=fuse_backing_uapi_header");
        }
        Err(unchecked) => {
            let why = format!("the ABI was not compared with a uapi header: {unchecked}");
            if require {
                return Err(Failure(why));
            }
            for line in why.lines() {
                println!("cargo::warning={line}");
            }
        }
    }
    Ok(())
}

struct Probe {
    out_dir: PathBuf,
    header: Header,
}

/// Which `linux/fuse.h`.
enum Header {
    Compilers,
    Named(PathBuf),
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compilers => write!(f, "<linux/fuse.h>"),
            Self::Named(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Header {
    /// As it stands behind `#include`.
    ///
    /// A named one by its path: a folder put on the search path would also offer its
    /// linux/ioctl.h, or hide the compiler's by having none.
    fn operand(&self) -> String {
        match self {
            Self::Compilers => "<linux/fuse.h>".to_owned(),
            // A header name is no string literal: it knows no escapes, and so cannot hold a quote.
            Self::Named(path) => format!("\"{}\"", path.display()),
        }
    }
}

impl Probe {
    fn new() -> Result<Self, Failure> {
        let header = match variable("FUSE_BACKING_UAPI_INCLUDE")?.as_deref() {
            None | Some("") => Header::Compilers,
            Some(dir) => {
                let path = std::path::absolute(Path::new(dir).join("linux/fuse.h"))?;
                println!("cargo::rerun-if-changed={}", path.display());
                Header::Named(path)
            }
        };
        Ok(Self {
            out_dir: PathBuf::from(required("OUT_DIR")?),
            header,
        })
    }

    /// The assertions for rustc, or why there are none.
    fn check(&self) -> Result<Result<String, Unchecked>, Failure> {
        let compiler = match Compiler::find()? {
            Ok(compiler) => compiler,
            Err(unchecked) => return Ok(Err(unchecked)),
        };
        let preprocessed = match self.preprocess(&compiler)? {
            Ok(text) => text,
            Err(unchecked) => return Ok(Err(unchecked)),
        };
        let source = self.out_dir.join("uapi_values.c");
        let assembly = self.out_dir.join("uapi_values.s");
        // Of an earlier run.
        let _ = fs::remove_file(&assembly);
        fs::write(&source, self.values_source(&preprocessed))?;
        let output = compiler
            .command(&source)
            // Whole-program modes would leave bytecode instead of text.
            .args(["-S", "-O0", "-fno-lto", "-o"])
            .arg(&assembly)
            .output()?;
        if !output.status.success() {
            let syntax = compiler.command(&source).arg("-fsyntax-only").output()?;
            if syntax.status.success() {
                return Ok(Err(Unchecked::Untranslatable(first_errors(&output))));
            }
            return Err(Failure(format!(
                "{} does not declare what the crate binds:\n{}",
                self.header,
                first_errors(&syntax)
            )));
        }
        let Ok(text) = fs::read_to_string(&assembly) else {
            let why = format!("'{compiler}' wrote no assembly");
            return Ok(Err(Unchecked::Untranslatable(why)));
        };
        let values = parse(&text);
        self.assertions(&values).map(Ok)
    }

    /// The preprocessed header, or why nothing can be compared with it.
    fn preprocess(&self, compiler: &Compiler) -> Result<Result<String, Unchecked>, Failure> {
        let mut source = String::new();
        for (r#macro, family, _) in FAMILIES {
            let _ = writeln!(
                source,
                "#ifdef {macro}\n\"fuse_backing_family {family}\"\n#endif"
            );
        }
        let operand = self.header.operand();
        let _ = write!(
            source,
            "\"fuse_backing_pointer\" __SIZEOF_POINTER__\n\
             #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__\n\"fuse_backing_endian big\"\n\
             #else\n\"fuse_backing_endian little\"\n#endif\n\
             #if !__has_include({operand})\n\"fuse_backing_header absent\"\n\
             #else\n#include <linux/ioctl.h>\n#include {operand}\n\
             #ifdef FUSE_DEV_IOC_BACKING_OPEN\n\"fuse_backing_header present\"\n\
             #else\n\"fuse_backing_header old\"\n#endif\n#endif\n"
        );
        let path = self.out_dir.join("uapi_header.c");
        fs::write(&path, source)?;
        let dependencies = self.out_dir.join("uapi_header.d");
        let output = match compiler
            .command(&path)
            .args(["-E", "-MD", "-MF"])
            .arg(&dependencies)
            .output()
        {
            Ok(output) => output,
            Err(error) => {
                return Ok(Err(Unchecked::NoCompiler(format!("{compiler}: {error}"))));
            }
        };
        rerun_if_headers_change(&dependencies);
        let text = String::from_utf8_lossy(&output.stdout);
        let has = |word: &str| text.contains(&format!("\"fuse_backing_{word}\""));

        let arch = required("CARGO_CFG_TARGET_ARCH")?;
        let bits: u32 = required("CARGO_CFG_TARGET_POINTER_WIDTH")?
            .parse()
            .map_err(|e| Failure(format!("CARGO_CFG_TARGET_POINTER_WIDTH: {e}")))?;
        let endian = required("CARGO_CFG_TARGET_ENDIAN")?;
        let family_known = FAMILIES.iter().any(|(_, _, archs)| archs.contains(&&*arch));
        let family_agrees = FAMILIES
            .iter()
            .any(|(_, family, archs)| archs.contains(&&*arch) && has(&format!("family {family}")));
        let pointer = format!("\"fuse_backing_pointer\" {}", bits / 8);
        // Before the status: a compiler for another target may lack the headers that this one has.
        let translated = text.contains("fuse_backing_pointer");
        let agrees = (family_agrees || !family_known)
            && text.lines().any(|line| line.trim() == pointer)
            && has(&format!("endian {endian}"));
        if translated && !agrees {
            return Ok(Err(Unchecked::OtherTarget(format!(
                "'{compiler}' is not for {arch}, {bits} bits, {endian} endian; \
                 set CC_<target> to one that is"
            ))));
        }
        Ok(if !output.status.success() {
            Err(Unchecked::Untranslatable(first_errors(&output)))
        } else if has("header present") {
            Ok(text.into_owned())
        } else if has("header old") {
            Err(Unchecked::HeaderTooOld(self.header.to_string()))
        } else {
            Err(Unchecked::HeaderAbsent(self.header.to_string()))
        })
    }

    /// A function whose assembly has a line of text for each value.
    ///
    /// The operands are ints, because GCC refuses `%c0` for constants of 2^31 and more.
    fn values_source(&self, preprocessed: &str) -> String {
        let mut c = format!(
            "#include <linux/ioctl.h>\n#include {}\n\
             #define VALUE(name, value) __asm__ volatile(\"\\n.ascii \\\"fuse_backing_value \" name \
             \" %c0 %c1\\\"\" : : \"i\"((int)(unsigned)(unsigned long long)(value)), \
             \"i\"((int)(unsigned)((unsigned long long)(value) >> 32)))\n\
             void fuse_backing_values(void) {{\n",
            self.header.operand()
        );
        for (name, fields) in STRUCTS {
            let _ = write!(
                c,
                "VALUE(\"{name}.size\", sizeof(struct {name}));\n\
                 VALUE(\"{name}.align\", _Alignof(struct {name}));\n"
            );
            let declared = fields_of(preprocessed, name);
            for (position, field) in fields.split(' ').enumerate() {
                let there = match declared.get(position) {
                    Some(renamed) if !declared.contains(&field) => renamed,
                    _ => field,
                };
                let member = format!("((struct {name} *)0)->{there}");
                let _ = write!(
                    c,
                    "VALUE(\"{name}.{field}.offset\", __builtin_offsetof(struct {name}, {there}));\n\
                     VALUE(\"{name}.{field}.size\", sizeof({member}));\n\
                     VALUE(\"{name}.{field}.signed\", ((__typeof__({member}))-1) < 0);\n"
                );
            }
        }
        for name in CONSTANTS.iter().chain(YOUNGER_THAN_6_9) {
            let _ = write!(c, "#ifdef {name}\nVALUE(\"{name}\", {name});\n#endif\n");
        }
        c.push_str("}\n");
        c
    }

    fn assertions(&self, values: &[(String, u64)]) -> Result<String, Failure> {
        let mut rust = String::new();
        let value = |key: &str| {
            values
                .iter()
                .find(|(name, _)| name == key)
                .map(|&(_, value)| value)
        };
        let missing = |key: &str| {
            Failure(format!(
                "{} compiled, but its value of {key} is not in the assembly",
                self.header
            ))
        };
        let mut assert = |what: &str, condition: String| {
            let message = format!("{} disagrees with the crate on {what}", self.header)
                .replace('{', "{{")
                .replace('}', "}}");
            let _ = writeln!(rust, "const _: () = assert!({condition}, {message:?});");
        };
        for (name, fields) in STRUCTS {
            let get = |key: &str| value(&format!("{name}.{key}")).ok_or_else(|| missing(key));
            let (size, align) = (get("size")?, get("align")?);
            for field in fields.split(' ') {
                let offset = get(&format!("{field}.offset"))?;
                let field_size = get(&format!("{field}.size"))?;
                let signed = get(&format!("{field}.signed"))? != 0;
                let of = |what| format!("the {what} of {name}.{field}");
                assert(
                    &format!("{}: {offset} in the header", of("offset")),
                    format!("std::mem::offset_of!({name}, {field}) == {offset}"),
                );
                assert(
                    &format!("{}: {field_size} bytes in the header", of("size")),
                    format!("size(|s: &{name}| &s.{field}) == {field_size}"),
                );
                assert(
                    &format!(
                        "{}: {} in the header",
                        of("signedness"),
                        if signed { "signed" } else { "unsigned" }
                    ),
                    format!("signed(|s: &{name}| &s.{field}) == {signed}"),
                );
            }
            assert(
                &format!("the size of {name}: {size} in the header"),
                format!("size_of::<{name}>() == {size}"),
            );
            assert(
                &format!("the alignment of {name}: {align} in the header"),
                format!("align_of::<{name}>() == {align}"),
            );
        }
        for name in CONSTANTS.iter().chain(YOUNGER_THAN_6_9) {
            match value(name) {
                Some(value) => assert(
                    &format!("{name}: {value:#x} in the header"),
                    format!("{name} as u64 == {value:#x}"),
                ),
                None if YOUNGER_THAN_6_9.contains(name) => {}
                None => {
                    return Err(Failure(format!("{} does not define {name}", self.header)));
                }
            }
        }
        Ok(rust)
    }
}

/// The C compiler for the target: a program and its first arguments.
struct Compiler(Vec<String>);

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}

impl Compiler {
    fn find() -> Result<Result<Self, Unchecked>, Failure> {
        let target = required("TARGET")?;
        for name in [
            format!("CC_{target}"),
            format!("CC_{}", target.replace('-', "_")),
            "CC".to_owned(),
        ] {
            let words: Vec<_> = variable(&name)?
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect();
            if !words.is_empty() {
                return Ok(Ok(Self(words)));
            }
        }
        Ok(if target == required("HOST")? {
            Ok(Self(vec!["cc".to_owned()]))
        } else {
            Err(Unchecked::NoCompiler(format!(
                "set CC_{} for this cross build",
                target.replace('-', "_")
            )))
        })
    }

    /// Without `CFLAGS`: they are for code that is run. Warnings are the compiler's opinion of the probe.
    fn command(&self, source: &Path) -> Command {
        let mut words = self.0.iter();
        let mut command = Command::new(words.next().map_or("cc", String::as_str));
        command
            .args(words)
            .args(["-w", "-std=gnu11", "-x", "c"])
            .arg(source);
        command
    }
}

/// The names of a struct's fields, in their order: of `uint32_t unused[6];` the last word before the bracket. Each is
/// declared by itself, and none is a struct.
fn fields_of<'header>(preprocessed: &'header str, name: &str) -> Vec<&'header str> {
    let start = format!("struct {name} {{");
    let (_, body) = preprocessed.split_once(&start).unwrap_or_default();
    let declarations = body.split('}').next().unwrap_or_default().split(';');
    declarations
        .filter_map(|field| field.split('[').next()?.split_whitespace().last())
        .collect()
}

/// The lines that `values_source` left in the assembly.
fn parse(assembly: &str) -> Vec<(String, u64)> {
    let half = |word: &str| -> Option<u64> {
        // Printed as ints, so negative from 2^31 on.
        let value: i64 = word.parse().ok()?;
        Some(u64::from(u32::try_from(value & 0xffff_ffff).ok()?))
    };
    assembly
        .lines()
        .filter_map(|line| {
            let (_, line) = line.split_once("fuse_backing_value ")?;
            let mut words = line.trim_end().trim_end_matches('"').split(' ');
            let name = words.next()?.to_owned();
            let (low, high) = (half(words.next()?)?, half(words.next()?)?);
            Some((name, high << 32 | low))
        })
        .collect()
}

/// The dependency file is a make rule: `target: header header \<newline> header`. A compiler that
/// writes none leaves cargo without something to watch.
fn rerun_if_headers_change(dependencies: &Path) {
    const SPACE_IN_NAME: &str = "\u{0}";
    let Ok(rule) = fs::read_to_string(dependencies) else {
        return;
    };
    let rule = rule.replace("\\\n", " ").replace("\\ ", SPACE_IN_NAME);
    // The first word is the rule's target, the second the probe itself.
    for header in rule.split_whitespace().skip(2) {
        let header = header.replace(SPACE_IN_NAME, " ");
        println!("cargo::rerun-if-changed={header}");
    }
}

fn first_errors(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<_> = stderr
        .lines()
        .filter(|line| line.contains("error"))
        .take(5)
        .collect();
    if errors.is_empty() {
        format!("{} {}", output.status, stderr.trim())
    } else {
        errors.join("\n")
    }
}

fn variable(name: &str) -> Result<Option<String>, Failure> {
    println!("cargo::rerun-if-env-changed={name}");
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(Failure(format!("{name} is not UTF-8"))),
    }
}

/// A variable that cargo sets.
fn required(name: &str) -> Result<String, Failure> {
    env::var(name).map_err(|e| Failure(format!("{name}: {e}")))
}
