//! fsx, the file system exerciser: random reads, writes, mappings, truncations and more, with all data
//! checked by fsx itself.
//!
//! It is the program in `FUSE_BACKING_FSX`, or `fsx` in `PATH`, or one that cargo builds into the
//! target folder.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::backing::Backing;
use crate::differential::same_trees;
use crate::program;
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};
use crate::tree::Detail;

pub const NAME: &str = "fsx::hundred_thousand_operations";

const VERSION: &str = "=0.3.2";
const OPERATIONS: u32 = 100_000;
const SEED: &str = "20";

/// All that fsx can do on Linux. Lengths are at least 1: an allocation of no bytes fails, and fsx takes that for an
/// error.
const CONFIG: &str = "\
flen = 262144
[opsize]
min = 1
max = 65536
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 1
punch_hole = 2
sendfile = 2
posix_fadvise = 1
copy_file_range = 2
";

/// The path of fsx. It takes a minute if fsx must be built.
pub fn find() -> Result<PathBuf, String> {
    if let Some(program) = env::var_os("FUSE_BACKING_FSX") {
        let program = PathBuf::from(program);
        return match program.is_file() {
            true => Ok(program),
            false => Err(format!("FUSE_BACKING_FSX: no file {}", program.display())),
        };
    }
    if let Some(program) = program::in_path("fsx") {
        return Ok(program);
    }
    let root = program::target()
        .map_err(|failed| failed.message().unwrap_or_default().to_owned())?
        .join("fsx");
    let program = root.join("bin/fsx");
    if !program.is_file() {
        let built = Command::new(env!("CARGO"))
            .args([
                "install",
                "--quiet",
                "--locked",
                "fsx",
                "--version",
                VERSION,
            ])
            .arg("--root")
            .arg(&root)
            .arg("--target-dir")
            .arg(root.join("build"))
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("{}: {error}", env!("CARGO")))?;
        if !built.status.success() {
            let said = String::from_utf8_lossy(&built.stderr);
            return Err(format!("no fsx, and cargo cannot build it: {said}"));
        }
    }
    Ok(program)
}

/// A mirror that fsx runs on.
struct Exercise {
    sandbox: Sandbox,
    backing: Backing,
    source: PathBuf,
    mirror: Mirror,
}

impl Exercise {
    fn new(way: Way) -> Result<Self, Failed> {
        let sandbox = Sandbox::new(NAME)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        Ok(Self {
            mirror: Mirror::start(&sandbox, &source, way)?,
            sandbox,
            backing,
            source,
        })
    }

    /// Returns the bytes that the server has moved meanwhile.
    fn run(&mut self, program: &Path, operations: u32) -> Result<u64, Failed> {
        let folder = self.sandbox.folder("fsx")?;
        let (config, said) = (folder.join("fsx.toml"), folder.join("said"));
        fs::write(&config, CONFIG)?;
        let output = File::create(&said)?;
        let before = self.mirror.moved()?;
        let child = Command::new(program)
            .args(["-S", SEED, "-N", &operations.to_string()])
            .arg("-f")
            .arg(&config)
            // The folder for what fsx leaves behind after an error.
            .arg("-P")
            .arg(&folder)
            .arg(self.mirror.path().join("file"))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        let status = self.wait(child)?;
        let moved = self.mirror.moved()? - before;
        let said = fs::read_to_string(said)?;
        assert!(status.success(), "{status}: {said}");
        assert!(said.contains("All operations completed A-OK!"), "{said}");

        let file = self.source.join("file");
        assert_ne!(file.metadata()?.len(), 0, "an empty file proves nothing");
        let root = self.mirror.path();
        same_trees(root, &self.source, Detail::Exact)?;
        Ok(moved)
    }

    /// Waits for fsx. The watchdog starts again as long as there is progress.
    fn wait(&mut self, mut child: Child) -> Result<ExitStatus, Failed> {
        let mut moved = 0;
        let mut since = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            sleep(Duration::from_millis(20));
            if since.elapsed() > Duration::from_secs(5) {
                since = Instant::now();
                let before = moved;
                moved = self.mirror.moved()?;
                if moved > before {
                    self.sandbox = Sandbox::new(NAME)?;
                    self.mirror.watched_by(&self.sandbox);
                }
            }
        }
    }

    fn stop(self) -> Result<(), Failed> {
        self.mirror.wait_for_releases()?;
        self.mirror.stop(&self.backing)
    }
}

pub fn run(program: &Path) -> Result<(), Failed> {
    let mut exercise = Exercise::new(Way::Passthrough)?;
    let moved = exercise.run(program, OPERATIONS)?;
    exercise.stop()?;

    // The control, with fewer operations: plain FUSE is right too, and its data is seen to go through the server.
    const FEW: u32 = OPERATIONS / 20;
    let mut control = Exercise::new(Way::Plain)?;
    let moved_by_server = control.run(program, FEW)?;
    control.stop()?;

    let each = moved / u64::from(OPERATIONS);
    let each_by_server = moved_by_server / u64::from(FEW);
    if Way::Passthrough.is_passthrough()? {
        // Only requests and replies are left: about 2 KiB for each operation, and 100 KiB with the data.
        assert!(each * 10 < each_by_server, "{each}, {each_by_server}");
    }
    Ok(())
}
