//! A client that makes calls one after the other, and prints the outcome of each and how long it took.

use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::fs::OFlags;

use crate::client::{Client, Role};
use crate::place::{Place, describe};
use crate::sandbox::patience_times;
use crate::server::within;

pub const ROLES: &[(&str, Role)] = &[("ask", ask)];

/// Arguments: a call, its path, the next call, and so on.
fn ask(args: &[String]) -> Result<String, Box<dyn Error>> {
    const SLOT: usize = 0;
    let mut place = Place::new(Path::new("/"))?;
    println!("asking");
    for pair in args.chunks(2) {
        let [call, path] = pair else {
            return Err("a call without a path".into());
        };
        let since = Instant::now();
        let outcome = match call.as_str() {
            "list" => place.list(path),
            "stat" => place.stat(path),
            "read" => place.content(path),
            "write" => place
                .open(SLOT, path, OFlags::WRONLY)
                .and_then(|_| place.write(SLOT, b"written"))
                .and_then(|_| place.close(SLOT)),
            "replace" => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
                place
                    .open(SLOT, path, flags)
                    .and_then(|_| place.close(SLOT))
            }
            // truncate(1) opens with O_NONBLOCK, truncate(2) waits.
            "truncate" => place.truncate(path, 3),
            "open nonblocking" => place.open(SLOT, path, OFlags::WRONLY | OFlags::NONBLOCK),
            _ => return Err(format!("no call '{call}'").into()),
        };
        println!("{}\t{}", describe(&outcome), since.elapsed().as_millis());
    }
    Ok("done".into())
}

/// A client that was asked to make calls.
pub struct Asked(Client);

impl Asked {
    /// Paths are below `root`.
    pub fn start(root: &Path, calls: &[(&str, &str)]) -> Result<Self, Failed> {
        let paths: Vec<_> = calls.iter().map(|(_, path)| root.join(path)).collect();
        let pairs = calls.iter().zip(&paths);
        let args: Vec<&OsStr> = pairs
            .flat_map(|((call, _), path)| [OsStr::new(*call), path.as_os_str()])
            .collect();
        let mut client = Client::start("ask", &args)?;
        assert_eq!(client.line()?, "asking");
        Ok(Self(client))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Waits until the client has been in the same system call for a while.
    pub fn wait_until_blocked(&self) -> Result<(), Failed> {
        let path = format!("/proc/{}/syscall", self.id());
        let (mut before, mut seen) = (String::new(), 0);
        within(Duration::from_secs(10), "the client is blocked", || {
            let call = fs::read_to_string(&path).map_err(|_| "the client has ended")?;
            let is_same = call == before && !call.starts_with("running");
            seen = if is_same { seen + 1 } else { 0 };
            before = call;
            Ok(seen == 20)
        })
    }

    /// The outcome of the next call, and how long it took.
    pub fn answer(&mut self) -> Result<(String, Duration), Failed> {
        let line = self.0.line()?;
        let (outcome, took) = line.rsplit_once('\t').ok_or("the client has ended")?;
        Ok((outcome.to_owned(), Duration::from_millis(took.parse()?)))
    }
}

/// The outcomes of all calls. Fails if a call took longer than `at_most`, or a multiple of it on a slow machine.
pub fn ask_all(
    root: &Path,
    calls: &[(&str, &str)],
    at_most: Duration,
) -> Result<Vec<String>, Failed> {
    let mut asked = Asked::start(root, calls)?;
    let mut outcomes = Vec::new();
    for (call, path) in calls {
        let (outcome, took) = asked.answer()?;
        if took > at_most * patience_times() {
            return Err(format!("'{call} {path}' took {took:?}: {outcome}").into());
        }
        outcomes.push(outcome);
    }
    Ok(outcomes)
}
