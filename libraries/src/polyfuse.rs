//! polyfuse.

use std::io::{self, Read};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use polyfuse::op::Operation;
use polyfuse::reply::{AttrOut, EntryOut, FileAttr, WriteOut};
use polyfuse::{KernelConfig, Request, Session};

use crate::Server;
use crate::files::{self, Files, Node, errno};
use crate::relay;

/// polyfuse reads and answers INIT in `Session::mount`, without passthrough. So it first gets a socket, and what it
/// answers there is completed on its way to the kernel. Then the device takes the socket's place.
pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let device = files::mount(mountpoint)?;
    files.attach(&device)?;
    let (ours, its) = relay::sockets()?;
    let mut config = KernelConfig::default();
    // polyfuse promises it by default. With passthrough no server can keep that promise.
    config.handle_killpriv(false);
    config.auto_unmount(false);
    config.fusermount_path(relay::fusermount()?);
    config.mount_option(&format!("fd={}", its.as_raw_fd()));

    let session = thread::scope(|scope| {
        let init = scope.spawn(|| relay::init(&device, &ours));
        let session = Session::mount(mountpoint.to_owned(), config);
        drop(its);
        init.join().map_err(|_| io::ErrorKind::Other)??;
        session
    })?;
    replace(&session, &device)?;
    Ok(thread::spawn(move || {
        while let Some(request) = session.next_request()? {
            // It fails with ENOENT if the client was killed.
            let _ = answer(&files, &request);
        }
        Ok(())
    }))
}

fn replace(session: &Session, device: &OwnedFd) -> io::Result<()> {
    // SAFETY: The session owns it, and is not dropped in here.
    #[allow(unsafe_code)]
    let fd = unsafe { OwnedFd::from_raw_fd(session.as_raw_fd()) };
    let mut fd = ManuallyDrop::new(fd);
    Ok(rustix::io::dup2(device, &mut fd)?)
}

fn answer(files: &Files, request: &Request) -> io::Result<()> {
    let operation = request.operation().map_err(io::Error::other)?;
    let answered = match operation {
        // `Request::reply` takes any bytes.
        Operation::Open(op) => files
            .open(op.ino(), op.flags())
            .map(|opened| request.reply(&opened.to_fuse_open_out().to_bytes()[..])),
        Operation::Create(op) => files
            .create(op.name(), op.mode() & !op.umask(), op.open_flags())
            .map(|(node, opened)| {
                let opened = opened.to_fuse_open_out().to_bytes();
                request.reply((entry(&node), &opened[..]))
            }),
        Operation::Release(op) => {
            files.release(op.fh());
            Ok(request.reply(()))
        }
        Operation::Lookup(op) => files
            .lookup(op.name())
            .map(|node| request.reply(entry(&node))),
        Operation::Getattr(op) => files.look(op.ino()).map(|node| {
            let mut out = AttrOut::default();
            fill(out.attr(), &node);
            request.reply(out)
        }),
        Operation::Read(op) => files
            .read(op.fh(), op.offset(), op.size())
            .map(|data| request.reply(&data[..])),
        Operation::Write(op, mut data) => {
            let mut bytes = Vec::new();
            data.read_to_end(&mut bytes)?;
            files.write(op.fh(), op.offset(), &bytes).map(|length| {
                let mut out = WriteOut::default();
                out.size(length);
                request.reply(out)
            })
        }
        Operation::Forget(_) | Operation::Interrupt(_) => return Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
    };
    answered.unwrap_or_else(|error| request.reply_error(errno(&error)))
}

fn entry(node: &Node) -> EntryOut {
    let mut out = EntryOut::default();
    out.ino(node.ino);
    fill(out.attr(), node);
    out
}

fn fill(attr: &mut FileAttr, node: &Node) {
    let meta = &node.meta;
    attr.ino(node.ino);
    attr.size(meta.size());
    attr.blocks(meta.blocks());
    attr.mode(meta.mode());
    attr.nlink(1);
    attr.uid(meta.uid());
    attr.gid(meta.gid());
    attr.blksize(4096);
    attr.mtime(Duration::new(meta.mtime() as u64, meta.mtime_nsec() as u32));
}
