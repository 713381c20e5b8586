//! Tests whether FUSE passthrough works on this machine, step by step, on a scratch mount.
//!
//! ```text
//! doctor [--json] [PATH...]
//! ```
//!
//! The report has a line for each step: `ok`, `FAILED` or `skipped`, what was found, and what to do
//! about a failure. For each PATH, a directory or a file, it says whether files there can be backing
//! files, and with which `max_stack_depth`. The last line is a summary. The exit status is 0 if
//! everything works, 1 if something does not, 2 if the arguments are invalid.
//!
//! Registering needs root. Without root, the doctor says so and reports what it can.
//!
//! The doctor leaves nothing behind, however it ends: its mounts are attached only to fds, in a
//! separate mount namespace, and the only file that it ever creates at a PATH has no name. Anything
//! that could hang runs in a client process with a time limit.
//!
//! | file | content |
//! |---|---|
//! | `doctor/examine.rs` | the steps |
//! | `doctor/server.rs` | a FUSE server of two files |
//! | `doctor/scratch.rs` | the scratch mounts |
//! | `doctor/probe.rs` | the check of a PATH |
//! | `doctor/client.rs` | client processes |
//! | `doctor/advice.rs` | causes of failures, and advice |
//! | `doctor/report.rs` | the output |

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[path = "doctor/advice.rs"]
mod advice;
#[path = "doctor/client.rs"]
mod client;
#[path = "doctor/examine.rs"]
mod examine;
#[path = "doctor/probe.rs"]
mod probe;
#[path = "doctor/report.rs"]
mod report;
#[path = "doctor/scratch.rs"]
mod scratch;
#[path = "doctor/server.rs"]
mod server;

const USAGE: &str = "\
usage: doctor [--json] [PATH...]

Tests whether FUSE passthrough works on this machine, on a scratch mount, and whether files at each
PATH can be backing files.

  --json   print one JSON object instead of text
  --help   print this text

Exit status: 0 if everything works, 1 if something does not, 2 if the arguments are invalid.
";

enum Command {
    Help,
    Examine {
        json: bool,
        paths: Vec<PathBuf>,
    },
    /// `Read` and `Probe` are the client processes.
    Read(OsString),
    Probe(PathBuf),
}

fn main() -> ExitCode {
    let (text, success) = match parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => (USAGE.to_owned(), true),
        Ok(Command::Examine { json, paths }) => {
            let report = examine::examine(&paths);
            let text = if json { report.json() } else { report.text() };
            (text, report.works())
        }
        Ok(Command::Read(name)) => match client::read(&name) {
            Ok(printed) => (printed, true),
            Err(error) => (error.to_string(), false),
        },
        Ok(Command::Probe(path)) => match probe::probe(&path) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (error.to_string(), false),
        },
        Err(error) => {
            eprintln!("doctor: {error}");
            return ExitCode::from(2);
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) if success => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn parse(args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let mut json = false;
    let mut paths = Vec::new();
    let mut args = args;
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--help" | "-h") => return Ok(Command::Help),
            Some("--json") => json = true,
            Some("--") => {
                paths.extend(args.by_ref().map(PathBuf::from));
            }
            Some(part @ (client::READ | client::PROBE)) => {
                let operand = args.next().ok_or(format!("{part} needs an argument"))?;
                return Ok(match part {
                    client::READ => Command::Read(operand),
                    _ => Command::Probe(operand.into()),
                });
            }
            _ if arg.as_encoded_bytes().starts_with(b"-") => {
                return Err(format!("unknown option {arg:?}; see --help"));
            }
            _ => paths.push(PathBuf::from(arg)),
        }
    }
    Ok(Command::Examine { json, paths })
}
