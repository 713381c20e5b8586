//! Calls that the mirror, running as root, makes for a client. Calls that allocate blocks run with the client's
//! identity; calls for a client without `CAP_FSETID` run without it too.
//!
//! The server has neither root's supplementary groups nor `CAP_SYS_RESOURCE`, see `prepare_process`. So only the fsuid
//! decides about root's reserved blocks.

use std::fs::read_to_string;

use fuse_backing::rights::{CapabilityGuard, CapabilitySet};
use fuser::Request;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::capabilities;

type Result<T> = std::result::Result<T, Errno>;

/// The process that made a request.
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

/// An id that no user or group has. Not 65534, because a filesystem may reserve blocks for that id.
pub(crate) const NOBODY: u32 = u32::MAX - 1;

/// Creates a file or a name. The file and the blocks belong to the client.
pub(crate) fn make<T>(client: Client, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let held = capabilities(None)?.effective;
    let _client = Identity::assume(client.uid, client.gid)?;
    // Keeps root's capabilities: the kernel has checked the client's permissions.
    let _raised = CapabilityGuard::with(held)?;
    call()
}

/// Writes back pages of a shared mapping. The writer is unknown, so the call must not use reserved blocks. Set-user-ID
/// and set-group-ID bits stay, as on a native filesystem.
pub(crate) fn write_pages<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    let held = capabilities(None)?.effective;
    // In a user namespace this id does not exist, but no blocks are reserved for its root either.
    let _nobody = Identity::assume(NOBODY, NOBODY).ok();
    let _raised = CapabilityGuard::with(held)?;
    call()
}

/// Changes the data of an open file. If `kill`, this clears set-user-ID and set-group-ID bits.
pub(crate) fn write<T>(client: Client, kill: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
    // An fsuid other than 0 has no CAP_FSETID.
    let _client = Identity::assume(client.uid, client.gid)?;
    without_fsetid(kill, call)
}

/// Changes the permissions of a file of this group. This clears the set-group-ID bit, unless the client is in the
/// group or [`kills_setid`] is false.
pub(crate) fn change_rights<T>(
    client: Client,
    group: u32,
    call: impl FnOnce() -> Result<T>,
) -> Result<T> {
    without_fsetid(kills_setid(client) && !is_in_group(client, group), call)
}

// If restoring the capabilities fails, the call is not undone: the next guard restores them first.
fn without_fsetid<T>(kill: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let without = || CapabilityGuard::without(CapabilitySet::FSETID);
    let _lowered = kill.then(without).transpose()?;
    call()
}

/// Whether a change of data by this client clears the set-user-ID and set-group-ID bits. The kernel says so only for
/// truncation, and fuser 0.18 does not pass it on. The bits stay for root, unless it has no `CAP_FSETID` or is in
/// another PID or user namespace.
pub(crate) fn kills_setid(client: Client) -> bool {
    let has_fsetid = |pid| {
        let sets = capabilities(Some(pid));
        sets.is_ok_and(|sets| sets.effective.contains(CapabilitySet::FSETID))
    };
    let process = i32::try_from(client.pid).ok().and_then(Pid::from_raw);
    let process = process.filter(|&pid| client.uid == 0 && is_in_this_user_namespace(pid));
    !process.is_some_and(has_fsetid)
}

/// Needed because capget(2) returns the capabilities of a process in its own user namespace.
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

/// Sets the fsuid and fsgid of the calling thread until dropped.
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
        // These calls report no error; a second call returns the ids that are set.
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
