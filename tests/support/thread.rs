//! Capabilities and ids of a thread.

use rustix::fs::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, capabilities, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

/// Runs `f` on a thread that has dropped `CAP_SYS_ADMIN` from its effective set.
pub fn without_cap_sys_admin<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    apart(|| {
        let mut sets = capabilities(None).expect("capget");
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        set_capabilities(None, sets).expect("capset");
        f()
    })
}

/// Runs `f` on a thread of its own.
pub fn apart<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(f)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives this thread the user id and group id `id`, and these supplementary groups.
pub fn become_user(id: u32, groups: &[u32]) -> rustix::io::Result<()> {
    let groups: Vec<_> = groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_groups(&groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}
