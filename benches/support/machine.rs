//! The machine and tools that the figures come from.

use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

#[derive(Clone, Debug)]
pub struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    rustc: String,
    date: String,
}

impl Machine {
    pub fn this() -> Self {
        let uname = rustix::system::uname();
        let text = |name: &std::ffi::CStr| name.to_string_lossy().into_owned();
        Self {
            kernel: format!("{} {}", text(uname.sysname()), text(uname.release())),
            cpu: format!("{}, {}", cpu(), text(uname.machine())),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            rustc: rustc(),
            date: today(),
        }
    }

    pub fn json(&self) -> Value {
        json!({
            "kernel": self.kernel,
            "cpu": self.cpu,
            "cpus": self.cpus,
            "rustc": self.rustc,
            "date": self.date,
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            kernel,
            cpu,
            cpus,
            rustc,
            date,
        } = self;
        write!(f, "{kernel}, {cpus} CPUs ({cpu}), {rustc}, {date}")
    }
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines()
            .find_map(|line| Some(line.strip_prefix(name)?.split_once(':')?.1.trim()))
    };
    let model = field("model name").unwrap_or("unknown model");
    let hypervisor =
        field("flags").is_some_and(|flags| flags.split(' ').any(|f| f == "hypervisor"));
    let guest = if hypervisor {
        ", a virtual machine"
    } else {
        ""
    };
    format!("{model}{guest}")
}

/// The rustc of the cargo that runs this bench.
fn rustc() -> String {
    let version = Command::new("rustc").arg("--version").output();
    let version = version
        .ok()
        .and_then(|out| String::from_utf8(out.stdout).ok());
    version.map_or("rustc unknown".into(), |version| {
        let words: Vec<_> = version.split_whitespace().take(2).collect();
        words.join(" ")
    })
}

/// The date in UTC.
fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let (year, month, day) = civil(since.map_or(0, |since| since.as_secs() / 86_400));
    format!("{year}-{month:02}-{day:02}")
}

/// Converts days since 1970 to a date. Internally years start in March, so that the leap day is their last day.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}
