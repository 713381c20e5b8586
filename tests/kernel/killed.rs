//! A server is killed, a connection aborted, or a mount detached, either between a registration and its reply or while
//! files are open. Clients get an error or what they asked for, they never hang, and the registrations end.
//!
//! tests/mirror/killed.rs does the same to the mirror, also without passthrough.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fuse_backing::{error::Errno, uapi};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;
use rustix::mount::{UnmountFlags, unmount};

use crate::client::{Client, Role, errno, errno_of, wait_for_parent};
use crate::fuse::{self, Init, Node, unchecked, watched};
use crate::sandbox::{Sandbox, Tmpfs};

#[apply(needs_passthrough)]
fn before_the_reply(sandbox: &Sandbox) -> Result<(), Failed> {
    ends_before_the_reply(sandbox, End::Kill)
}

#[apply(needs_passthrough)]
fn while_open(sandbox: &Sandbox) -> Result<(), Failed> {
    ends_while_open(sandbox, End::Kill)
}

#[apply(needs_passthrough)]
fn aborted_before_the_reply(sandbox: &Sandbox) -> Result<(), Failed> {
    ends_before_the_reply(sandbox, End::Abort)
}

#[apply(needs_passthrough)]
fn aborted_while_open(sandbox: &Sandbox) -> Result<(), Failed> {
    ends_while_open(sandbox, End::Abort)
}

#[apply(needs_passthrough)]
fn unmounted_before_the_reply(sandbox: &Sandbox) -> Result<(), Failed> {
    ends_before_the_reply(sandbox, End::Unmount)
}

#[apply(needs_passthrough)]
fn unmounted_while_open(sandbox: &Sandbox) -> Result<(), Failed> {
    ends_while_open(sandbox, End::Unmount)
}

pub const ROLES: &[(&str, Role)] = &[("serve", serve), ("use", use_file)];

const CONTENT: &str = "what the backing file says";
/// Clients must get their answer within this time. The watchdog frees a client that hangs, but only after a minute.
const AT_ONCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// SIGKILL of the server.
    Kill,
    /// fusectl's `abort`.
    Abort,
    /// `umount -l`, after which the connection exists until the last file is closed.
    Unmount,
}

/// Serves one file, and registers it at each OPEN. Waits for its parent between the registration and the reply.
fn serve(args: &[String]) -> Result<String, Box<dyn Error>> {
    let (mountpoint, backing) = (Path::new(&args[0]), PathBuf::from(&args[1]));
    let node = Node {
        name: "file".into(),
        backing: File::open(&backing)?,
    };
    fuse::serve_here(mountpoint, Init::passthrough(1), vec![node], |device| {
        Arc::new(move |_, _| {
            let file = File::open(&backing).map_err(|_| Errno::IO)?;
            let id = device.backing_open(file)?;
            println!("registered");
            wait_for_parent().map_err(|_| Errno::IO)?;
            Ok(unchecked(1, uapi::FOPEN_PASSTHROUGH, id.into_raw()))
        })
    })
    .map_err(|failed| failed.message().unwrap_or("failed").to_owned())?;
    Ok("ended".into())
}

/// Opens the file. After the parent's `proceed`, reads it and opens it again.
fn use_file(args: &[String]) -> Result<String, Box<dyn Error>> {
    let file = match File::open(&args[0]) {
        Ok(file) => file,
        Err(error) => return Ok(errno_of(&error)),
    };
    println!("open");
    wait_for_parent()?;
    // Reads no more than the file has: otherwise the kernel would ask the server for the size.
    let mut content = [0; CONTENT.len()];
    let read = file.read_exact_at(&mut content, 0);
    println!(
        "{}",
        read.map_or_else(
            |error| errno_of(&error),
            |()| content.escape_ascii().to_string()
        )
    );
    println!(
        "{}",
        File::open(&args[0]).map_or_else(|error| errno_of(&error), |_| "open".into())
    );
    drop(file);
    Ok("closed".into())
}

struct Place {
    tmpfs: Tmpfs,
    mountpoint: PathBuf,
    server: Option<Client>,
    client: Client,
    abort: Arc<File>,
}

/// A client has sent OPEN, and the server has registered the file, but not replied.
fn registered(sandbox: &Sandbox) -> Result<Place, Failed> {
    let tmpfs = sandbox.tmpfs()?;
    let mountpoint = sandbox.folder("mnt")?;
    let backing = tmpfs.path().join("file");
    fs::write(&backing, CONTENT)?;
    let mut server = Client::start("serve", &[mountpoint.as_os_str(), backing.as_os_str()])?;
    assert_eq!(server.line()?, "mounted");
    let abort = watched(sandbox, &mountpoint)?;
    let client = Client::start("use", &[mountpoint.join("file").as_os_str()])?;
    assert_eq!(server.line()?, "registered");
    Ok(Place {
        tmpfs,
        mountpoint,
        server: Some(server),
        client,
        abort,
    })
}

impl Place {
    fn server(&mut self) -> Result<&mut Client, Failed> {
        Ok(self.server.as_mut().ok_or("the server was killed")?)
    }

    fn end(&mut self, end: End) -> Result<(), Failed> {
        match end {
            // Dropping kills it.
            End::Kill => drop(self.server.take()),
            End::Abort => self.abort.as_ref().write_all(b"1")?,
            End::Unmount => unmount(&self.mountpoint, UnmountFlags::DETACH)?,
        }
        Ok(())
    }

    /// Nothing pins the backing filesystem once server and clients are gone.
    fn nothing_is_left(mut self, end: End, since: Instant) -> Result<(), Failed> {
        assert!(since.elapsed() < AT_ONCE, "the client hung");
        if end != End::Unmount {
            unmount(&self.mountpoint, UnmountFlags::DETACH)?;
        }
        if let Some(server) = self.server.take() {
            // Its ids exist as long as it runs. It ends with the connection.
            assert_eq!(server.finish()?, "ended");
        }
        self.tmpfs.unmount_when_idle()
    }
}

fn ends_before_the_reply(sandbox: &Sandbox, end: End) -> Result<(), Failed> {
    let mut place = registered(sandbox)?;
    assert_eq!(place.tmpfs.unmount(), Err(Errno::BUSY), "registered");
    let since = Instant::now();
    place.end(end)?;
    let answer = if end == End::Unmount {
        // The client has already looked up the path, and gets its file.
        place.server()?.proceed()?;
        place.client.line()?
    } else {
        let answer = place.client.line()?;
        if end == End::Abort {
            // The server sends a reply that no client waits for.
            place.server()?.proceed()?;
        }
        answer
    };
    if end == End::Unmount {
        assert_eq!(answer, "open");
        expect_content_then_errors(&mut place, end)?;
    } else {
        let expected = [Errno::NOTCONN, Errno::CONNABORTED].map(errno);
        assert!(expected.contains(&answer), "{answer}");
    }
    place.nothing_is_left(end, since)
}

fn ends_while_open(sandbox: &Sandbox, end: End) -> Result<(), Failed> {
    let mut place = registered(sandbox)?;
    place.server()?.proceed()?;
    assert_eq!(place.client.line()?, "open");
    let since = Instant::now();
    place.end(end)?;
    if end != End::Unmount {
        // The client's open file holds the backing file.
        thread::sleep(Duration::from_millis(50));
        assert_eq!(place.tmpfs.unmount(), Err(Errno::BUSY), "still open");
    }
    expect_content_then_errors(&mut place, end)?;
    place.nothing_is_left(end, since)
}

/// An open file can be read without a server, unless the kernel checks on the way that the connection still exists. A
/// new open fails.
fn expect_content_then_errors(place: &mut Place, end: End) -> Result<(), Failed> {
    place.client.proceed()?;
    let read = place.client.line()?;
    if end == End::Unmount {
        assert_eq!(read, CONTENT);
    } else {
        assert!(
            [CONTENT, &errno(Errno::NOTCONN)].contains(&&*read),
            "{read}"
        );
    }
    let opened = place.client.line()?;
    let expected = match end {
        // The path is now in the empty folder below the mount.
        End::Unmount => Errno::NOENT,
        End::Kill | End::Abort => Errno::NOTCONN,
    };
    assert_eq!(opened, errno(expected));
    assert_eq!(place.client.line()?, "closed");
    Ok(())
}
