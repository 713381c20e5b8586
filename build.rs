//! Compares the ABI that the crate declares with `<linux/fuse.h>`.
//!
//! `FUSE_BACKING_UAPI_CHECK` selects the mode:
//!
//! - unset, empty or `off`: no comparison. Dependents build without a C compiler.
//! - `auto`: compares if there is a C compiler for the target and a header of Linux 6.9 or newer. Otherwise the build
//!   says nothing, and `cargo test --test uapi_header` reports why the ABI was not compared.
//! - `require`: a build that cannot compare fails.
//!
//! The header is `DIR/linux/fuse.h` with `FUSE_BACKING_UAPI_INCLUDE=DIR`, else the compiler's own `<linux/fuse.h>`. A
//! relative `DIR` starts at the package's folder. The compiler is `CC_<target>`, `CC`, or `cc` if host and target are
//! the same. It translates for the target, and nothing it produces is run: it writes the header's values into assembly
//! as text. They become assertions, which rustc evaluates when it compiles the crate for the same target. A mismatch is
//! a compile error that names the field or the constant.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::process::{self, Command, Output};

/// The structs, and their first fields in the header's order. The header may rename a field: a field whose name the
/// header lacks is looked up by its position.
const STRUCTS: [(&str, &str); 3] = [
    ("fuse_backing_map", "fd flags padding"),
    ("fuse_open_out", "fh open_flags backing_id"),
    (
        "fuse_init_out",
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran
         max_pages map_alignment flags2 max_stack_depth",
    ),
];
/// What is compared of each struct and of each field: the crate's value in Rust (src/uapi.rs has `size` and `signed`),
/// and the header's in C.
const OF_A_STRUCT: &str = r#"
VALUE("size_of::<STRUCT>()", sizeof(struct STRUCT));
VALUE("align_of::<STRUCT>()", _Alignof(struct STRUCT));
"#;
const OF_A_FIELD: &str = r#"
VALUE("std::mem::offset_of!(STRUCT, FIELD)", __builtin_offsetof(struct STRUCT, C_FIELD));
VALUE("size(|s: &STRUCT| &s.FIELD)", sizeof(((struct STRUCT *)0)->C_FIELD));
VALUE("signed(|s: &STRUCT| &s.FIELD)", (__typeof__(((struct STRUCT *)0)->C_FIELD))-1 < 0);
"#;
const CONSTANTS: &str = "
    FUSE_DEV_IOC_MAGIC FUSE_DEV_IOC_CLONE FUSE_DEV_IOC_BACKING_OPEN FUSE_DEV_IOC_BACKING_CLOSE
    FUSE_WRITEBACK_CACHE FUSE_HANDLE_KILLPRIV FUSE_HANDLE_KILLPRIV_V2 FUSE_INIT_EXT
    FUSE_DIRECT_IO_ALLOW_MMAP FUSE_PASSTHROUGH
    FUSE_OPEN_KILL_SUIDGID FUSE_WRITE_KILL_SUIDGID FATTR_KILL_SUIDGID
    FOPEN_DIRECT_IO FOPEN_KEEP_CACHE FOPEN_NONSEEKABLE FOPEN_CACHE_DIR FOPEN_STREAM FOPEN_NOFLUSH
    FOPEN_PARALLEL_DIRECT_WRITES FOPEN_PASSTHROUGH";
/// The constants that are newer than Linux 6.9. A header may lack them.
const OPTIONAL_CONSTANTS: &str = "
    FUSE_DEV_IOC_SYNC_INIT FUSE_OVER_IO_URING FUSE_HAS_IO_URING_BUFPOOL FOPEN_IO_URING_ZERO_COPY";

/// What C compilers define, by `target_arch`.
const FAMILIES: [(&str, &str); 9] = [
    ("x86 x86_64", "defined __x86_64__ || defined __i386__"),
    ("aarch64", "defined __aarch64__"),
    ("arm", "defined __arm__"),
    ("riscv32 riscv64", "defined __riscv"),
    ("s390x", "defined __s390__"),
    ("loongarch32 loongarch64", "defined __loongarch__"),
    ("powerpc powerpc64", "defined __powerpc__"),
    ("mips mips32r6 mips64 mips64r6", "defined __mips__"),
    ("sparc sparc64", "defined __sparc__"),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(fuse_backing_uapi_header, fuse_backing_modelled)");
    // shuttle, the model checker of src/model.rs, supports these. Cargo.toml has the same list.
    let modelled = "x86 x86_64 arm aarch64 riscv64 loongarch64 s390x";
    if has_word(modelled, &cargo_variable("CARGO_CFG_TARGET_ARCH")) {
        println!("cargo::rustc-cfg=fuse_backing_modelled");
    }
    let name = "FUSE_BACKING_UAPI_CHECK";
    let mode = variable(name);
    match &*mode {
        "" | "off" => return,
        "auto" | "require" => {}
        _ => fail(format!("{name} is '{mode}': use off, auto or require")),
    }
    match compare() {
        Ok(()) => println!("cargo::rustc-cfg=fuse_backing_uapi_header"),
        Err(reason) if mode == "require" => fail(format!("ABI not compared: {reason}")),
        Err(reason) => {
            // The test `abi_compared` reports it. The value must be one line.
            let reason = reason.replace('\n', "; ");
            println!("cargo::rustc-env=FUSE_BACKING_UAPI_UNCHECKED={reason}");
        }
    }
}

/// Writes the assertions for rustc, or returns why it cannot compare. A header that lacks a value fails the build.
fn compare() -> Result<(), String> {
    let probe = Probe::new()?;
    let header = probe.header();
    let code = values_to_compare(&probe.preprocess()?);
    let values = parse(&probe.translate(&code)?);
    let mut assertions = String::new();
    for rust in code.lines().filter_map(|line| line.split('"').nth(1)) {
        if let Some(value) = values.get(rust) {
            let holds = format!("{rust} as u64 == {value:#x}");
            let says =
                format!("{header} disagrees with the crate on {rust}: {value:#x} in the header");
            assertions += &format!("const _: () = assert!({holds}, \"{{}}\", {says:?});\n");
        } else if !has_word(OPTIONAL_CONSTANTS, rust) {
            fail(format!("{header}: the assembly lacks the value of {rust}"));
        }
    }
    write(&format!("{}/uapi_header.rs", probe.out_dir), &assertions);
    Ok(())
}

struct Probe {
    out_dir: String,
    compiler: String,
    /// The operand of `#include`. A selected header is included by its path: with its folder on the search path, the
    /// compiler would also take that folder's linux/ioctl.h.
    operand: String,
}

impl Probe {
    fn new() -> Result<Self, String> {
        let dir = variable("FUSE_BACKING_UAPI_INCLUDE");
        let mut operand = "<linux/fuse.h>".to_owned();
        if !dir.is_empty() {
            let path = std::path::absolute(format!("{dir}/linux/fuse.h"));
            let path = path.unwrap_or_else(|error| fail(format!("{dir}: {error}")));
            println!("cargo::rerun-if-changed={}", path.display());
            // A header name has no escapes.
            operand = format!("\"{}\"", path.display());
        }
        Ok(Self {
            out_dir: cargo_variable("OUT_DIR"),
            compiler: find_compiler()?,
            operand,
        })
    }

    /// The header's name in messages.
    fn header(&self) -> &str {
        self.operand.trim_matches('"')
    }

    /// Returns the preprocessed header. Includes nothing if the compiler is for another target: it may lack headers.
    fn preprocess(&self) -> Result<String, String> {
        let (header, operand, compiler) = (self.header(), &self.operand, &self.compiler);
        let arch = cargo_variable("CARGO_CFG_TARGET_ARCH");
        let bits = cargo_variable("CARGO_CFG_TARGET_POINTER_WIDTH");
        let endian = cargo_variable("CARGO_CFG_TARGET_ENDIAN");
        let family = FAMILIES.iter().find(|(archs, _)| has_word(archs, &arch));
        let family = family.map_or("1", |(_, condition)| condition);
        let order = format!("__ORDER_{}_ENDIAN__", endian.to_uppercase());
        let source = format!(
            r#"
#if !({family}) || __SIZEOF_POINTER__ * 8 != {bits} || __BYTE_ORDER__ != {order}
"fuse_backing: other target"
#elif !__has_include({operand})
"fuse_backing: no header"
#else
#include <linux/ioctl.h>
#include {operand}
#ifndef FUSE_DEV_IOC_BACKING_OPEN
"fuse_backing: old header"
#endif
#endif
"#
        );
        let dependencies = format!("{}/uapi_header.d", self.out_dir);
        let output = self.compile(&source, &["-E", "-MD", "-MF", &dependencies])?;
        rerun_if_headers_change(&dependencies);
        let text = String::from_utf8_lossy(&output.stdout);
        let finds = |what| text.contains(&format!("\"fuse_backing: {what}\""));
        if finds("other target") {
            Err(format!(
                "the C compiler is for another target: '{compiler}' is not for {arch}, {bits} bits, \
                 {endian} endian; set CC_<target> to one that is"
            ))
        } else if !output.status.success() {
            Err(errors("the C compiler cannot translate the probe", &output))
        } else if finds("no header") {
            Err(format!("there is no {header}"))
        } else if finds("old header") {
            let missing = "FUSE_DEV_IOC_BACKING_OPEN";
            Err(format!(
                "{header} is older than Linux 6.9: it has no {missing}"
            ))
        } else {
            Ok(text.into_owned())
        }
    }

    /// Returns assembly that has a line of text for each value.
    fn translate(&self, code: &str) -> Result<String, String> {
        let (header, operand, compiler) = (self.header(), &self.operand, &self.compiler);
        // The operands of the assembly are ints: GCC rejects `%c0` for constants of 2^31 and more.
        let source = format!(
            r##"
#include <linux/ioctl.h>
#include {operand}
#define INT(value) "i"((int)(unsigned)(value))
#define VALUE(rust, value) __asm__ volatile("\n.ascii \"fuse_backing_value " rust " %c0 %c1\"" \
    : : INT((unsigned long long)(value)), INT((unsigned long long)(value) >> 32))
void fuse_backing_values(void) {{ {code} }}
"##
        );
        let assembly = format!("{}/uapi_values.s", self.out_dir);
        // The assembly of an earlier run would hide that the compiler wrote none.
        let _ = fs::remove_file(&assembly);
        // With -flto the compiler would write bytecode instead of text.
        let output = self.compile(&source, &["-S", "-O0", "-fno-lto", "-o", &assembly])?;
        if output.status.success() {
            return fs::read_to_string(&assembly)
                .map_err(|error| format!("'{compiler}' wrote no assembly: {error}"));
        }
        let syntax = self.compile(&source, &["-fsyntax-only"])?;
        if syntax.status.success() {
            return Err(errors("the C compiler cannot translate the probe", &output));
        }
        fail(errors(
            &format!("{header} lacks what the crate binds"),
            &syntax,
        ))
    }

    /// Compiles without `CFLAGS`, which are for code that runs, and without warnings, which concern the probe alone.
    fn compile(&self, source: &str, arguments: &[&str]) -> Result<Output, String> {
        let path = format!("{}/uapi_probe.c", self.out_dir);
        write(&path, source);
        let mut words = self.compiler.split_whitespace();
        Command::new(words.next().unwrap_or_default())
            .args(words)
            .args(["-w", "-std=gnu11", "-x", "c", &path])
            .args(arguments)
            .output()
            .map_err(|error| format!("no C compiler: {}: {error}", self.compiler))
    }
}

/// Returns the C compiler for the target: the program and its first arguments.
fn find_compiler() -> Result<String, String> {
    let target = cargo_variable("TARGET");
    let underscored = format!("CC_{}", target.replace('-', "_"));
    let names = [&*format!("CC_{target}"), &underscored, "CC"];
    let mut values = names.into_iter().map(variable);
    match values.find(|value| !value.trim().is_empty()) {
        Some(compiler) => Ok(compiler),
        None if target == cargo_variable("HOST") => Ok("cc".to_owned()),
        None => Err(format!("no C compiler for {target}: set {underscored}")),
    }
}

/// Returns the C code of the values to compare, a line for each.
fn values_to_compare(preprocessed: &str) -> String {
    let mut code = String::new();
    for (name, fields) in STRUCTS {
        code += &OF_A_STRUCT.replace("STRUCT", name);
        let declared = declared_fields(preprocessed, name);
        for (position, field) in fields.split_whitespace().enumerate() {
            let c_field = match declared.get(position) {
                Some(renamed) if !declared.contains(&field) => renamed,
                _ => field,
            };
            let of_field = OF_A_FIELD.replace("STRUCT", name);
            code += &of_field.replace("C_FIELD", c_field).replace("FIELD", field);
        }
    }
    for name in CONSTANTS.split_whitespace() {
        code += &format!("VALUE(\"{name}\", {name});\n");
    }
    for name in OPTIONAL_CONSTANTS.split_whitespace() {
        code += &format!("#ifdef {name}\nVALUE(\"{name}\", {name});\n#endif\n");
    }
    code
}

/// Returns the names of a struct's fields in their order: of `uint32_t unused[6];` the last word before the bracket.
/// Each field has a declaration of its own, and none is a struct.
fn declared_fields<'header>(preprocessed: &'header str, name: &str) -> Vec<&'header str> {
    let start = format!("struct {name} {{");
    let (_, body) = preprocessed.split_once(&start).unwrap_or_default();
    let declarations = body.split('}').next().unwrap_or_default().split(';');
    let name = |field: &'header str| field.split('[').next()?.split_whitespace().last();
    declarations.filter_map(name).collect()
}

/// Returns the values in the assembly by their expressions in Rust.
fn parse(assembly: &str) -> HashMap<String, u64> {
    // The halves are printed as ints: negative from 2^31 on.
    let half = |word: &str| u64::try_from(word.parse::<i64>().ok()?.rem_euclid(1 << 32)).ok();
    let value = |line: &str| {
        let (_, line) = line.split_once("fuse_backing_value ")?;
        let mut words = line.trim_end().trim_end_matches('"').rsplitn(3, ' ');
        let (high, low) = (half(words.next()?)?, half(words.next()?)?);
        Some((words.next()?.to_owned(), high << 32 | low))
    };
    assembly.lines().filter_map(value).collect()
}

/// Lets cargo watch the headers in the dependency file, a make rule: `target: header header \<newline> header`.
/// Without the file, which some compilers do not write, cargo watches none.
fn rerun_if_headers_change(dependencies: &str) {
    let rule = fs::read_to_string(dependencies).unwrap_or_default();
    // A space in a name is escaped.
    let rule = rule.replace("\\\n", " ").replace("\\ ", "\0");
    // The first word is the rule's target, the second is the probe.
    for header in rule.split_whitespace().skip(2) {
        println!("cargo::rerun-if-changed={}", header.replace('\0', " "));
    }
}

fn errors(what: &str, output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines = stderr.lines().filter(|line| line.contains("error"));
    let lines: Vec<_> = lines.take(5).collect();
    if lines.is_empty() {
        return format!("{what}: {} {}", output.status, stderr.trim());
    }
    format!("{what}: {}", lines.join("\n"))
}

fn has_word(words: &str, word: &str) -> bool {
    words.split_whitespace().any(|each| each == word)
}

/// Returns a variable that the user may set; "" if it is unset.
fn variable(name: &str) -> String {
    println!("cargo::rerun-if-env-changed={name}");
    match env::var(name) {
        Err(env::VarError::NotUnicode(_)) => fail(format!("{name} is not UTF-8")),
        value => value.unwrap_or_default(),
    }
}

/// Returns a variable that cargo sets.
fn cargo_variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| fail(format!("{name}: {error}")))
}

fn write(path: &str, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| fail(format!("{path}: {error}")));
}

fn fail(why: String) -> ! {
    for line in why.lines() {
        println!("cargo::error={line}");
    }
    process::exit(1)
}
