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

/// No user's and no group's. 65534 will not do: some filesystems reserve their blocks for that.
pub(crate) const NOBODY: u32 = u32::MAX - 1;

/// Makes a file, or a name for one: it is the client's, and so are the blocks that it takes.
pub(crate) fn make<T>(req: &Request, call: impl FnOnce() -> Result<T>) -> Result<T> {
    with_blocks_of(req.uid(), req.gid(), call)
}

/// Writes pages that were written through a mapping. Nobody knows whose they are, so nobody's blocks are taken. The
/// bits stay, as they do elsewhere.
pub(crate) fn write_pages<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    with_blocks_of(NOBODY, NOBODY, call)
}

/// With all of the server's rights but these ids: the kernel has checked the client's permissions.
fn with_blocks_of<T>(uid: u32, gid: u32, call: impl FnOnce() -> Result<T>) -> Result<T> {
    if (uid, gid) == (0, 0) {
        return call();
    }
    let held = capabilities(None)?.effective;
    let _client = Identity::assume(uid, gid);
    let raised = CapabilityGuard::with(held)?;
    let result = call();
    raised.restore()?;
    result
}

/// Changes the data of an open file. Set-user-ID and set-group-ID bits go if they are to be killed.
pub(crate) fn write<T>(req: &Request, kill: bool, call: impl FnOnce() -> Result<T>) -> Result<T> {
    // Other fsuids than 0 are without CAP_FSETID.
    let _client = Identity::assume(req.uid(), req.gid());
    if !kill {
        return call();
    }
    let lowered = CapabilityGuard::without(CapabilitySet::FSETID)?;
    let result = call();
    lowered.restore()?;
    result
}

/// Whether the bits go when this client changes a file's data. fuser 0.18 does not pass on what the kernel says of it at
/// truncation, and of other calls the kernel says nothing. They stay for root, unless it is without `CAP_FSETID`
/// or hides in another PID namespace.
pub(crate) fn kills_setid(req: &Request) -> bool {
    let has_fsetid = |pid| {
        let sets = capabilities(Some(pid));
        sets.is_ok_and(|sets| sets.effective.contains(CapabilitySet::FSETID))
    };
    let client = i32::try_from(req.pid()).ok().and_then(Pid::from_raw);
    req.uid() != 0 || !client.is_some_and(has_fsetid)
}

/// Sets an ACL of a file of this group: the set-group-ID bit goes, unless the client is in the group.
pub(crate) fn set_acl(req: &Request, group: u32, call: impl FnOnce() -> Result<()>) -> Result<()> {
    if !kills_setid(req) || is_in_group(req, group) {
        return call();
    }
    let lowered = CapabilityGuard::without(CapabilitySet::FSETID)?;
    let result = call();
    lowered.restore()?;
    result
}

fn is_in_group(req: &Request, group: u32) -> bool {
    let status = read_to_string(format!("/proc/{}/status", req.pid())).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let mut groups = groups.unwrap_or_default().split_whitespace();
    req.gid() == group || groups.any(|member| member.parse() == Ok(group))
}

/// The client's fsuid and fsgid, until it is dropped: then root's.
struct Identity;

impl Identity {
    fn assume(uid: u32, gid: u32) -> Self {
        setfsgid(Gid::from_raw(gid));
        setfsuid(Uid::from_raw(uid));
        Self
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
    }
}
