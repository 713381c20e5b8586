//! Requests that the kernel does not need to send, and what it must not keep in spite of that.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::backing::Backing;
use crate::client::{self, Role};
use crate::sandbox::Sandbox;
use crate::server::{Mirror, Way};

pub const ROLES: &[(&str, Role)] = &[("reopen", reopen), ("append", append), ("sizes", sizes)];

const OPENS: u64 = 200;

/// Opens a file, reads it and closes it, over and over.
fn reopen(args: &[String]) -> Result<String, Box<dyn Error>> {
    for _ in 0..OPENS {
        let read = File::open(&args[0])?.read(&mut [0; 16])?;
        assert_eq!(read, 7);
    }
    Ok("done".into())
}

#[apply(test_case)]
fn few_for_an_open(name: &str) -> Result<(), Failed> {
    // An open takes three LOOKUP, OPEN and RELEASE, and more if the tick for which attributes are kept ends in between.
    // The control, without passthrough, also has a GETATTR after each LOOKUP and before the read, the READ, and the
    // server's own read(2).
    for (way, args, least, most) in [
        (Way::Passthrough, &[][..], 5.0, 8.0),
        (Way::Plain, &[][..], 11.0, 13.0),
        (Way::Passthrough, &["--ttl", "60"][..], 2.0, 2.5),
    ] {
        if way == Way::Passthrough && !way.is_passthrough()? {
            continue;
        }
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::create_dir_all(source.join("d1/d2"))?;
        fs::write(source.join("d1/d2/f"), "content")?;
        let mirror = Mirror::start_with(&sandbox, &source, way, args)?;
        let before = mirror.reads()?;
        client::run("reopen", &[mirror.path().join("d1/d2/f").as_os_str()])?;
        mirror.wait_for_releases()?;
        let each = (mirror.reads()? - before) as f64 / OPENS as f64;
        assert!((least..most).contains(&each), "{way:?} {args:?}: {each}");
        mirror.stop(&backing)?;
    }
    Ok(())
}

/// Appends to a file by the first path while it is open by the second, and returns how often the new data is not read.
fn append(args: &[String]) -> Result<String, Box<dyn Error>> {
    let mut missed = 0;
    for _ in 0..100 {
        let mut appended = File::options().append(true).open(&args[0])?;
        let file = File::open(&args[1])?;
        let end = appended.metadata()?.len();
        appended.write_all(b"x")?;
        missed += u32::from(file.read_at(&mut [0; 1], end)? == 0);
    }
    Ok(missed.to_string())
}

#[apply(test_case)]
fn appended_data_shows_at_once(name: &str) -> Result<(), Failed> {
    for way in [Way::Passthrough, Way::Plain] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::write(source.join("file"), "")?;
        let mirror = Mirror::start(&sandbox, &source, way)?;
        let files = [source.join("file"), mirror.path().join("file")];
        let missed = client::run("append", &files.each_ref().map(|file| file.as_os_str()))?;
        assert_eq!(missed, "0", "{way:?}");
        mirror.wait_for_releases()?;
        mirror.stop(&backing)?;
    }
    Ok(())
}

/// Extends a file by the first path. Returns its size by the second path: before that, at once, and more than a second
/// later.
fn sizes(args: &[String]) -> Result<String, Box<dyn Error>> {
    let size = || fs::metadata(&args[1]).map(|metadata| metadata.len());
    let before = size()?;
    fs::write(&args[0], "longer")?;
    let at_once = size()?;
    sleep(Duration::from_millis(1_200));
    Ok(format!("{before} {at_once} {}", size()?))
}

#[apply(test_case)]
fn attributes_are_kept_for_the_ttl(name: &str) -> Result<(), Failed> {
    for (args, expected) in [(&[][..], "1 6 6"), (&["--ttl", "1"][..], "1 1 6")] {
        let sandbox = Sandbox::new(name)?;
        let backing = Backing::in_memory(&sandbox, "tmpfs")?;
        let source = backing.folder("source")?;
        fs::write(source.join("file"), "1")?;
        let mirror = Mirror::start_with(&sandbox, &source, Way::Passthrough, args)?;
        let files = [source.join("file"), mirror.path().join("file")];
        let seen = client::run("sizes", &files.each_ref().map(|file| file.as_os_str()))?;
        assert_eq!(seen, expected, "{args:?}");
        mirror.stop(&backing)?;
    }
    Ok(())
}
