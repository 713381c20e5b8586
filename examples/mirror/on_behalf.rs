//! Calls that the mirror, which is root, makes for a client: with the client's identity where blocks of the
//! filesystem are taken, and without `CAP_FSETID` where the client has not got it.
//!
//! The server is without root's supplementary groups and `CAP_SYS_RESOURCE`, see `prepare_process`. So it is the fsuid
//! alone that opens root's reserved blocks.

use std::fs::read_to_string;

use fuse_backing::rights::{CapabilityGuard, CapabilitySet};
use fuser::Request;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::capabilities;

type Result<T> = std::result::Result<T, Errno>;

/// Who has made a request.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    uid: u32,
    gid: u32,
    pid: u32,
}

impl From<&Request> for Client {
    fn from(req: &Request) -> Self {
        Self {
            uid: req.uid(),
            gid: req.gid(),
            pid: req.pid(),
        }
    }
}

/// An id that no user or group has. Not 65534: a filesystem may reserve its blocks for that.
pub(crate) const NOBODY: u32 = u32::MAX - 1;

/// Makes a file, or a name for one: it is the client's, and so are the blocks that it takes.
pub(crate) fn make<T>(client: Client, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let held = capabilities(None)?.effective;
    let _client = Identity::assume(client.uid, client.gid)?;
    // The kernel has checked the client's permissions.
    let _raised = CapabilityGuard::with(held)?;
    call()
}

/// Writes back pages of a shared mapping. The writer is unknown, so they take no reserved blocks. Set-id bits stay, as
/// natively.
pub(crate) fn write_pages<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    let held = capabilities(None)?.effective;
    // In a user namespace there is no such id, and no block is reserved for its root.
    let _nobody = Identity::assume(NOBODY, NOBODY).ok();
    let _raised = CapabilityGuard::with(held)?;
    call()
}

/// Changes the data of an open file. Set-user-ID and set-group-ID bits go if they are to be killed.
pub(crate) fn write<T>(client: Client, kill: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
    // Other fsuids than 0 are without CAP_FSETID.
    let _client = Identity::assume(client.uid, client.gid)?;
    without_fsetid(kill, call)
}

/// Changes who may do what with a file of this group: the set-group-ID bit goes, unless the client is in the group.
pub(crate) fn change_rights<T>(
    client: Client,
    group: u32,
    call: impl FnOnce() -> Result<T>,
) -> Result<T> {
    without_fsetid(kills_setid(client) && !is_in_group(client, group), call)
}

// A call that was made is not undone because the thread could not be restored: the next guard sees to that first.
fn without_fsetid<T>(kill: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let without = || CapabilityGuard::without(CapabilitySet::FSETID);
    let _lowered = kill.then(without).transpose()?;
    call()
}

/// Whether the bits go when this client changes a file's data. fuser 0.18 does not pass on what the kernel says of it
/// at truncation, and of other calls the kernel says nothing. They stay for root, unless it is without `CAP_FSETID` or
/// is in another PID or user namespace.
pub(crate) fn kills_setid(client: Client) -> bool {
    let has_fsetid = |pid| {
        let sets = capabilities(Some(pid));
        sets.is_ok_and(|sets| sets.effective.contains(CapabilitySet::FSETID))
    };
    let process = i32::try_from(client.pid).ok().and_then(Pid::from_raw);
    let process = process.filter(|&pid| client.uid == 0 && is_in_this_user_namespace(pid));
    !process.is_some_and(has_fsetid)
}

/// capget(2) tells what a process may do in its own user namespace.
fn is_in_this_user_namespace(process: Pid) -> bool {
    let namespace = |process: &str| rustix::fs::stat(format!("/proc/{process}/ns/user"));
    let theirs = namespace(&process.to_string());
    let ours = namespace("self");
    theirs.is_ok_and(|theirs| {
        ours.is_ok_and(|ours| (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino))
    })
}

fn is_in_group(client: Client, group: u32) -> bool {
    let status = read_to_string(format!("/proc/{}/status", client.pid)).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let mut groups = groups.unwrap_or_default().split_whitespace();
    client.gid == group || groups.any(|member| member.parse() == Ok(group))
}

/// Another fsuid and fsgid for the calling thread, until this is dropped.
pub(crate) struct Identity {
    uid: Uid,
    gid: Gid,
}

impl Identity {
    pub(crate) fn assume(uid: u32, gid: u32) -> Result<Self> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let gid_before = setfsgid(gid);
        let before = Self {
            uid: setfsuid(uid),
            gid: gid_before,
        };
        // They report no error. Made again, they return what is set.
        if (setfsuid(uid), setfsgid(gid)) == (uid, gid) {
            Ok(before)
        } else {
            Err(Errno::PERM)
        }
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        setfsuid(self.uid);
        setfsgid(self.gid);
    }
}
