//! One process makes the same calls on a mirror and in a plain directory of the same filesystem. They have
//! the same results and errors, and leave the same files.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::backing::Backing;
use crate::calls::{self, Section};
use crate::client::{Client, Role};
use crate::differences::{DIFFERENCES, Difference, On};
use crate::place::{Place, describe};
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};
use crate::tree::{self, Detail};

pub const ROLES: &[(&str, Role)] = &[("calls", make_calls), ("trees", compare_trees)];

/// Tables of calls, by the name that is passed to a child.
const TABLES: &[(&str, &[Section])] = &[
    ("all", calls::CALLS),
    ("running", calls::RUNNING),
    ("without direct", calls::WITHOUT_DIRECT),
    ("read-only", calls::READ_ONLY),
    ("writable elsewhere", calls::WRITABLE_ELSEWHERE),
    ("single file", calls::SINGLE_FILE),
    ("noexec", calls::NOEXEC),
    ("nosuid", calls::NOSUID),
    ("two mounts", calls::TWO_MOUNTS),
    ("look", calls::LOOK),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tmpfs,
    /// The filesystem of this machine's temporary files.
    Scratch,
}

#[apply(test_case)]
fn tmpfs_passthrough(name: &str) -> Result<(), Failed> {
    all(name, Kind::Tmpfs, Way::Passthrough)
}

#[apply(test_case)]
fn tmpfs_plain(name: &str) -> Result<(), Failed> {
    all(name, Kind::Tmpfs, Way::Plain)
}

#[apply(test_case)]
fn scratch_passthrough(name: &str) -> Result<(), Failed> {
    all(name, Kind::Scratch, Way::Passthrough)
}

#[apply(test_case)]
fn scratch_plain(name: &str) -> Result<(), Failed> {
    all(name, Kind::Scratch, Way::Plain)
}

fn all(name: &str, kind: Kind, way: Way) -> Result<(), Failed> {
    let sandbox = Sandbox::new(name)?;
    let backing = match kind {
        Kind::Tmpfs => Backing::in_memory(&sandbox, "tmpfs")?,
        Kind::Scratch => Backing::scratch(&sandbox)?,
    };
    let (source, plain) = (backing.folder("source")?, backing.folder("plain")?);
    let mirror = Mirror::start(&sandbox, &source, way)?;
    let made = run("all", mirror.path(), &plain)?;
    compare(&made, way.is_passthrough()?, kind == Kind::Tmpfs)?;
    same_trees(mirror.path(), &plain, Detail::Calls)?;
    same_trees(mirror.path(), &source, Detail::Exact)?;
    mirror.wait_for_releases()?;
    mirror.stop(&backing)
}

/// A call that was made at both places, and its outcomes.
pub struct Made {
    pub section: &'static str,
    pub call: String,
    pub mirror: String,
    pub plain: String,
}

/// Has a child make the calls of a table.
pub fn run(table: &str, mirror: &Path, plain: &Path) -> Result<Vec<Made>, Failed> {
    let args = [OsStr::new(table), mirror.as_os_str(), plain.as_os_str()];
    let mut child = Client::start("calls", &args)?;
    let mut made = Vec::new();
    for section in named(table).ok_or("no such table")? {
        for call in section.calls {
            let line = child.line()?;
            let Some((mirror, plain)) = line.split_once('\t') else {
                let last = format!("after {} calls: '{line}'", made.len());
                return Err(format!("the child does not go on {last}").into());
            };
            made.push(Made {
                section: section.name,
                // `stringify!` breaks long calls into lines.
                call: call.text.split_whitespace().collect::<Vec<_>>().join(" "),
                mirror: mirror.to_owned(),
                plain: plain.to_owned(),
            });
        }
    }
    assert_eq!(child.finish()?, "done");
    Ok(made)
}

/// Fails if a call has another outcome at the mirror than in the plain directory, unless the difference is
/// known, and if a known difference does not show.
pub fn compare(made: &[Made], passthrough: bool, on_tmpfs: bool) -> Result<(), Failed> {
    let mut wrong = Vec::new();
    for call in made {
        let known = known(call, passthrough);
        let expected = match known {
            Some(known) if known.plain == call.plain => known.mirror,
            Some(known) if on_tmpfs && known.on == On::Tmpfs => {
                let (call, plain) = (&call.call, known.plain);
                wrong.push(format!("{call}: expected {plain} in the plain directory"));
                known.mirror
            }
            _ => &call.plain,
        };
        if call.mirror != expected {
            let why = known.map_or("", |known| known.why);
            wrong.push(format!(
                "{}: {}: mirror {}, plain {}, expected of the mirror {expected} {why}",
                call.section, call.call, call.mirror, call.plain,
            ));
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "{} of {} calls:\n{}",
            wrong.len(),
            made.len(),
            wrong.join("\n")
        )
        .into())
    }
}

fn known(made: &Made, passthrough: bool) -> Option<&'static Difference> {
    DIFFERENCES.iter().find(|known| {
        known.section == made.section
            && known.call == made.call
            && known
                .way
                .is_none_or(|way| (way == Way::Passthrough) == passthrough)
    })
}

/// Has a child compare two trees, since only children touch a mirror.
pub fn same_trees(left: &Path, right: &Path, detail: Detail) -> Result<(), Failed> {
    let detail = OsStr::new(match detail {
        Detail::Calls => "calls",
        Detail::Exact => "exact",
    });
    let mut child = Client::start("trees", &[left.as_os_str(), right.as_os_str(), detail])?;
    let mut lines = Vec::new();
    loop {
        let line = child.line()?;
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let last = lines.pop().ok_or("the child said nothing")?;
    if let Some(count) = last.strip_prefix("same ") {
        // More than the root was compared.
        assert!(count.parse::<usize>()? > 1, "{last}");
        Ok(())
    } else {
        let (left, right) = (left.display(), right.display());
        Err(format!("{left} and {right}:\n{}\n{last}", lines.join("\n")).into())
    }
}

fn named(table: &str) -> Option<&'static [Section]> {
    let (_, sections) = TABLES.iter().find(|(name, _)| *name == table)?;
    Some(sections)
}

/// Arguments: a table's name and two places. Prints a line for each call: its outcomes at both.
fn make_calls(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let [table, mirror, plain] = args else {
        return Err("a table and two places".into());
    };
    let mut places = [
        Place::new(Path::new(mirror))?,
        Place::new(Path::new(plain))?,
    ];
    for section in named(table).ok_or("no such table")? {
        if table == "all" {
            for place in &mut places {
                place.make_folder(&section.name.replace('/', "-"))?;
            }
        }
        for call in section.calls {
            let [mirror, plain] = places.each_mut().map(|place| {
                let outcome = place.make(call.make);
                describe(&outcome)
            });
            println!("{mirror}\t{plain}");
        }
    }
    Ok("done".into())
}

/// Arguments: two trees and the detail. Prints where the trees differ.
fn compare_trees(args: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let [left, right, detail] = args else {
        return Err("two trees and a detail".into());
    };
    let detail = match detail.as_str() {
        "calls" => Detail::Calls,
        "exact" => Detail::Exact,
        _ => return Err("no such detail".into()),
    };
    let of = |root: &String| {
        let root = fs::canonicalize(root).map_err(|error| error.to_string())?;
        tree::of(&root, detail).map_err(|failed| failed.message().unwrap_or_default().to_owned())
    };
    let (left, right) = (of(left)?, of(right)?);
    let differences = tree::differences(&left, &right);
    for difference in &differences {
        println!("{difference}");
    }
    Ok(match differences.len() {
        0 => format!("same {}", left.len()),
        n => format!("{n} differ"),
    })
}
