//! In place of fusermount3, for libraries that get their device from it. Of the options `-o A,B,..` it knows `fd=N`:
//! it sends the fd N of its parent process to the library. Without, it mounts, and sends the device.

use std::env;
use std::error::Error;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::mount::{UnmountFlags, unmount};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getppid, pidfd_getfd, pidfd_open};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let mountpoint = args.last().ok_or("no mountpoint")?;
    if args[0] == "-u" {
        // It may be unmounted already.
        let _ = unmount(mountpoint, UnmountFlags::DETACH);
        return Ok(());
    }
    let options = args.iter().skip_while(|arg| *arg != "-o").nth(1);
    let options = options
        .and_then(|options| options.to_str())
        .unwrap_or_default();
    let fd = options
        .split(',')
        .find_map(|option| option.strip_prefix("fd="));
    let fd = match fd {
        Some(fd) => {
            let parent = pidfd_open(getppid().ok_or("no parent")?, PidfdFlags::empty())?;
            pidfd_getfd(parent, fd.parse()?, PidfdGetfdFlags::empty())?
        }
        None => libraries::files::mount(Path::new(mountpoint))?,
    };

    let socket = env::var("_FUSE_COMMFD")?.parse()?;
    // SAFETY: The library has opened it for this process.
    #[allow(unsafe_code)]
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    message.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        socket,
        &[IoSlice::new(&[0])],
        &mut message,
        SendFlags::empty(),
    )?;
    Ok(())
}
