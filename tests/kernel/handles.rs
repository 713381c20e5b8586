//! `Handles` on real connections: attached after the mount, with an insufficient negotiation, and with a successor that
//! adopts them. tests/handles.rs has the tests that need no kernel.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backing::error::{BackingError, NotPermitted, ServerReason};
use fuse_backing::{
    BackingId, BackingTable, FopenFlags, FuseDevice, Handle, Handles, ServerFile, error::Errno,
};
use libtest_mimic::Failed;
use macro_rules_attribute::apply;

use crate::client::{self, Client};
use crate::fuse::{Connection, Init, Node};
use crate::sandbox::Sandbox;

const CONTENT: &str = "content";

type Files = Handles<FuseDevice<Arc<std::os::fd::OwnedFd>>>;

/// A mount of one file. Its handles can be replaced, as if the server was restarted.
struct Server {
    handles: Arc<Mutex<Arc<Files>>>,
    /// Every file handle, in the order of the opens.
    opened: Arc<Mutex<Vec<u64>>>,
    connection: Connection,
    path: PathBuf,
}

impl Server {
    fn start(sandbox: &Sandbox, backing: &Path, init: Init) -> Result<Self, Failed> {
        let handles: Arc<Mutex<Arc<Files>>> = Arc::default();
        let opened: Arc<Mutex<Vec<u64>>> = Arc::default();
        let node = Node {
            name: "file".into(),
            backing: File::open(backing)?,
        };
        let on_open = {
            let (handles, backing) = (Arc::clone(&handles), backing.to_owned());
            let all = Arc::clone(&opened);
            move |nodeid, flags: i32| {
                let file = File::open(&backing).map_err(|_| Errno::IO)?;
                let handles = handles.lock().unwrap_or_else(PoisonError::into_inner);
                let opened = handles.open(&nodeid, flags, file, FopenFlags::empty())?;
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                all.push(opened.fh);
                Ok(opened.to_fuse_open_out())
            }
        };
        let connection = Connection::serve(sandbox, init, vec![node], Arc::new(on_open))?;
        let path = connection.path("file");
        Ok(Self {
            handles,
            opened,
            connection,
            path,
        })
    }

    fn handles(&self) -> Arc<Files> {
        let handles = self.handles.lock();
        Arc::clone(&handles.unwrap_or_else(PoisonError::into_inner))
    }

    /// Releases the open at this index.
    fn release(&self, at: usize) -> bool {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let fh = opened.get(at).copied().unwrap_or(0);
        self.handles().release(fh).is_some()
    }

    fn replace(&self, handles: Files) {
        let mut current = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        // A predecessor that was killed drops nothing.
        std::mem::forget(std::mem::replace(&mut *current, Arc::new(handles)));
    }

    fn attach(&self) -> Result<(), Failed> {
        let device = self.connection.device();
        let attached = self.handles().table().attach(device);
        attached.map_err(|_| "attached already".into())
    }

    fn read(&self) -> Result<String, Failed> {
        client::run("read", &[self.path.as_os_str(), OsStr::new("")])
    }

    fn reads(&self) -> u64 {
        self.connection.seen.reads.load(Ordering::SeqCst)
    }
}

#[apply(needs_passthrough)]
fn attached_after_the_first_open(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    tmpfs.file("backing", CONTENT)?;
    let server = Server::start(sandbox, &tmpfs.path().join("backing"), Init::passthrough(1))?;
    assert_eq!(server.read()?, CONTENT);
    let served = server.reads();
    assert_ne!(served, 0);
    assert!(server.release(0));

    server.attach()?;
    assert_eq!(server.read()?, CONTENT);
    assert_eq!(server.reads(), served);
    let counted = server.handles().table().stats().served;
    assert_eq!(counted, [(ServerReason::NoRegistrar, 1)]);
    Ok(())
}

/// The table reports a missing stack depth, which the kernel silently accepts. With fuser: `add_capabilities` without
/// `set_max_stack_depth`.
#[apply(needs_passthrough)]
fn a_forgotten_stack_depth_is_reported(sandbox: &Sandbox) -> Result<(), Failed> {
    let tmpfs = sandbox.tmpfs()?;
    tmpfs.file("backing", CONTENT)?;
    let init = Init {
        max_stack_depth: 0,
        ..Init::passthrough(1)
    };
    let server = Server::start(sandbox, &tmpfs.path().join("backing"), init)?;
    server.attach()?;
    let reported: Arc<Mutex<Vec<ServerReason>>> = Arc::default();
    server.handles().table().on_server_mode({
        let reported = Arc::clone(&reported);
        move |why| {
            reported
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(why)
        }
    });
    for _ in 0..3 {
        assert_eq!(server.read()?, CONTENT);
    }
    assert_ne!(server.reads(), 0);
    let error = BackingError::NotPermitted(NotPermitted::NotNegotiatedOrDenied);
    let reason = ServerReason::Refused(error);
    let reported = reported
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    assert_eq!(reported, [reason]);
    assert!(reason.to_string().contains("max_stack_depth 1 or 2"));
    let counted = server.handles().table().stats().served;
    assert_eq!(counted, [(reason, 3)]);
    Ok(())
}

/// A server is restarted on its device fd, while a client has the file open. Opens work on if the successor adopts that
/// open.
#[apply(needs_passthrough)]
fn adopted_opens_go_on(sandbox: &Sandbox) -> Result<(), Failed> {
    for adopts in [true, false] {
        let tmpfs = sandbox.tmpfs()?;
        let file = tmpfs.file("backing", CONTENT)?;
        let server = Server::start(sandbox, &tmpfs.path().join("backing"), Init::passthrough(1))?;
        server.attach()?;
        let mut holder = Client::start("hold", &[server.path.as_os_str()])?;
        assert_eq!(holder.line()?, "open");
        let fh = server.opened.lock().unwrap_or_else(PoisonError::into_inner)[0];
        let handle = server.handles().get(fh).ok_or("no handle of the holder")?;
        let (nodeid, id) = (
            *handle.open.inode(),
            handle.open.id().map(BackingId::as_raw),
        );
        // The handle is never dropped, as in a server that was killed.
        std::mem::forget(handle);

        let successor = Handles::new(BackingTable::new(server.connection.device()));
        if adopts {
            let id = id.and_then(BackingId::from_raw).ok_or("no passthrough")?;
            let open = successor
                .table()
                .adopt(&nodeid, &id, ServerFile::new(&file))?;
            assert!(successor.adopt(fh, Handle { open, file }).is_ok());
        }
        server.replace(successor);
        // Without adoption, the kernel gets a second id for an open inode.
        let errno = client::errno(Errno::IO);
        let expected = if adopts { CONTENT } else { &errno };
        assert_eq!(server.read()?, expected);
        holder.proceed()?;
        assert_eq!(holder.finish()?, CONTENT);
        assert_eq!(server.reads(), 0);

        if adopts {
            // The holder's open, and the reader's.
            assert!(server.release(0) && server.release(1));
            let id = id.and_then(BackingId::from_raw).ok_or("no passthrough")?;
            let closed = server.connection.device().backing_close(id);
            assert_eq!(closed.unwrap_err().cause(), BackingError::UnknownId);
        }
    }
    Ok(())
}
