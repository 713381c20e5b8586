//! The report, as text for a terminal and as JSON.

use std::path::PathBuf;

use crate::advice::Failure;

/// The version of the JSON object. Increases when a member changes its meaning or is removed.
const SCHEMA_VERSION: u32 = 1;

pub(crate) struct Report {
    pub(crate) steps: Vec<Step>,
    pub(crate) path_fds: Feature,
    pub(crate) sync_init: Feature,
    pub(crate) paths: Vec<PathReport>,
}

pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
}

pub(crate) enum Outcome {
    Ok(String),
    Failed(Failure),
    Skipped(String),
}

/// An optional feature of the kernel.
pub(crate) struct Feature {
    present: Option<bool>,
    found: String,
}

impl Feature {
    pub(crate) fn present(found: impl ToString) -> Self {
        Self::new(Some(true), found)
    }

    pub(crate) fn absent(found: impl ToString) -> Self {
        Self::new(Some(false), found)
    }

    pub(crate) fn unknown(found: impl ToString) -> Self {
        Self::new(None, found)
    }

    fn new(present: Option<bool>, found: impl ToString) -> Self {
        Self {
            present,
            found: found.to_string(),
        }
    }
}

pub(crate) struct PathReport {
    pub(crate) path: PathBuf,
    pub(crate) filesystem: Option<String>,
    /// The lowest `max_stack_depth` that permits backing files there.
    pub(crate) max_stack_depth: Result<u32, Failure>,
}

impl PathReport {
    /// The path with control characters escaped, which a terminal would interpret.
    fn printable(&self) -> String {
        let escape = |c: char| {
            if c.is_control() {
                c.escape_default().to_string()
            } else {
                c.to_string()
            }
        };
        self.path.to_string_lossy().chars().map(escape).collect()
    }
}

impl Report {
    pub(crate) fn works(&self) -> bool {
        self.first_failure().is_none()
    }

    /// The step or path that failed first, and why.
    fn first_failure(&self) -> Option<(String, &Failure)> {
        let steps = self.steps.iter().filter_map(|step| match &step.outcome {
            Outcome::Failed(failure) => Some((step.name.to_owned(), failure)),
            Outcome::Ok(_) | Outcome::Skipped(_) => None,
        });
        let paths = self.paths.iter().filter_map(|path| {
            let failure = path.max_stack_depth.as_ref().err()?;
            Some((path.printable(), failure))
        });
        steps.chain(paths).next()
    }

    fn steps_work(&self) -> bool {
        let failed = |step: &Step| matches!(step.outcome, Outcome::Failed(_));
        !self.steps.iter().any(failed)
    }

    fn features(&self) -> [(&'static str, &Feature); 2] {
        [("O_PATH", &self.path_fds), ("SYNC_INIT", &self.sync_init)]
    }

    pub(crate) fn text(&self) -> String {
        let mut lines = vec![format!("FUSE passthrough on {}", kernel()), String::new()];
        for step in &self.steps {
            let (state, found) = match &step.outcome {
                Outcome::Ok(found) => ("ok", found),
                Outcome::Failed(failure) => ("FAILED", &failure.cause),
                Outcome::Skipped(why) => ("skipped", why),
            };
            lines.push(line(step.name, state, found));
            if let Outcome::Failed(failure) = &step.outcome {
                lines.push(line("", "", &format!("-> {}", failure.advice)));
            }
        }
        for (name, feature) in self.features() {
            let state = match feature.present {
                Some(true) => "yes",
                Some(false) => "no",
                None => "-",
            };
            lines.push(line(name, state, &feature.found));
        }
        lines.push(String::new());
        if !self.paths.is_empty() {
            lines.extend(self.path_lines());
            lines.push(String::new());
        }
        lines.push(self.summary());
        lines.join("\n") + "\n"
    }

    fn path_lines(&self) -> impl Iterator<Item = String> {
        let path = |path: &PathReport| path.printable();
        let filesystem = |path: &PathReport| path.filesystem.clone().unwrap_or("-".to_owned());
        let width = |column: fn(&PathReport) -> String| {
            let widths = self.paths.iter().map(|path| column(path).chars().count());
            widths.max().unwrap_or(0).min(40)
        };
        let (path_width, filesystem_width) = (width(path), width(filesystem));
        self.paths.iter().map(move |report| {
            let answer = match &report.max_stack_depth {
                Ok(depth) => format!("yes, with max_stack_depth {depth}"),
                Err(failure) => format!("no: {}", failure.cause),
            };
            let (path, filesystem) = (path(report), filesystem(report));
            format!("  {path:<path_width$}  {filesystem:<filesystem_width$}  {answer}")
        })
    }

    fn summary(&self) -> String {
        let Some((what, Failure { cause, advice })) = self.first_failure() else {
            return "passthrough works here".to_owned();
        };
        let verdict = if self.steps_work() {
            "passthrough works here, but not for"
        } else {
            "passthrough does not work here:"
        };
        format!("{verdict} {what}: {cause}; {advice}")
    }

    /// One JSON object. `ok` and `present` are null if unknown or not tried.
    pub(crate) fn json(&self) -> String {
        let failure = self.first_failure();
        let steps = self.steps.iter().map(|step| {
            let (ok, found, advice) = match &step.outcome {
                Outcome::Ok(found) => (Some(true), found, None),
                Outcome::Failed(failure) => (Some(false), &failure.cause, Some(&failure.advice)),
                Outcome::Skipped(why) => (None, why, None),
            };
            object(&[
                ("name", string(step.name)),
                ("ok", boolean(ok)),
                ("found", string(found)),
                ("advice", or_null(advice)),
            ])
        });
        let features = self.features().map(|(name, feature)| {
            object(&[
                ("name", string(name)),
                ("present", boolean(feature.present)),
                ("found", string(&feature.found)),
            ])
        });
        let paths = self.paths.iter().map(|path| {
            let depth = path.max_stack_depth.as_ref();
            object(&[
                ("path", string(&path.path.to_string_lossy())),
                ("filesystem", or_null(path.filesystem.as_ref())),
                (
                    "max_stack_depth",
                    depth.map_or("null".to_owned(), u32::to_string),
                ),
                ("error", or_null(depth.err().map(|failure| &failure.cause))),
            ])
        });
        let cause = failure
            .as_ref()
            .map(|(what, failure)| format!("{what}: {}", failure.cause));
        let members = [
            ("schema_version", SCHEMA_VERSION.to_string()),
            ("kernel", string(&kernel())),
            ("works", boolean(Some(self.works()))),
            ("first_cause", or_null(cause.as_ref())),
            (
                "advice",
                or_null(failure.map(|(_, failure)| &failure.advice)),
            ),
            ("steps", array(steps)),
            ("features", array(features)),
            ("paths", array(paths)),
        ];
        object(&members) + "\n"
    }
}

fn line(name: &str, state: &str, found: &str) -> String {
    format!("  {name:<16}  {state:<7}  {found}")
}

fn kernel() -> String {
    let uname = rustix::system::uname();
    let [system, release] = [uname.sysname(), uname.release()].map(|s| s.to_string_lossy());
    format!("{system} {release}")
}

fn object(members: &[(&str, String)]) -> String {
    let members = members
        .iter()
        .map(|(key, value)| format!("{}: {value}", string(key)));
    format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
}

fn array(values: impl IntoIterator<Item = String>) -> String {
    let values: Vec<_> = values.into_iter().collect();
    format!("[{}]", values.join(", "))
}

fn boolean(value: Option<bool>) -> String {
    value.map_or("null".to_owned(), |value| value.to_string())
}

fn or_null(value: Option<&String>) -> String {
    value.map_or("null".to_owned(), |value| string(value))
}

fn string(value: &str) -> String {
    let mut quoted = "\"".to_owned();
    for c in value.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            // JSON requires that these are escaped.
            '\0'..='\x1f' => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => quoted.push(c),
        }
    }
    quoted + "\""
}
