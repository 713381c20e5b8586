//! What belongs to a thread: capabilities.

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

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
