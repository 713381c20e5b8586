//! Every system call of a child, in order, by ptrace(2).

#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::mem::{MaybeUninit, size_of};

use libtest_mimic::Failed;
use rustix::process::getppid;

use crate::client::{Client, wait_for_parent};

/// A call's number, and its first two arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub number: libc::c_long,
    pub args: [u64; 2],
}

/// In the child: waits for its tracer, and runs `f` between two marks.
pub fn traced<T>(f: impl FnOnce() -> T) -> io::Result<T> {
    println!("ready");
    wait_for_parent()?;
    let _ = getppid();
    let result = f();
    let _ = getppid();
    Ok(result)
}

/// In the parent: the system calls that a child of this role makes between its marks.
pub fn calls_of(role: &str, args: &[&OsStr]) -> Result<Vec<Call>, Failed> {
    let mut child = Client::start(role, args)?;
    assert_eq!(child.line()?, "ready");
    let calls = calls(&mut child)?;
    assert_eq!(child.finish()?, "done");
    let marks: Vec<_> = (0..calls.len())
        .filter(|&i| calls[i].number == libc::SYS_getppid)
        .collect();
    match marks[..] {
        [start, end] => Ok(calls[start + 1..end].to_vec()),
        _ => Err(format!("{} marks", marks.len()).into()),
    }
}

/// Lets the waiting child proceed, and records its system calls until it ends.
fn calls(child: &mut Client) -> Result<Vec<Call>, Failed> {
    let pid = child.id() as libc::pid_t;
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEEXIT;
    ptrace(libc::PTRACE_SEIZE, pid, 0, options as usize)?;
    ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0)?;
    let mut calls = Vec::new();
    let mut status = wait(pid)?;
    child.proceed()?;
    while libc::WIFSTOPPED(status) {
        let signal = libc::WSTOPSIG(status);
        let event = status >> 16;
        let mut deliver = 0;
        if signal == libc::SIGTRAP | 0x80 {
            calls.extend(entry(pid)?);
        } else if event == libc::PTRACE_EVENT_EXIT {
            // `Client::finish` waits for its end.
            ptrace(libc::PTRACE_DETACH, pid, 0, 0)?;
            break;
        } else if event == 0 {
            deliver = signal as usize;
        }
        ptrace(libc::PTRACE_SYSCALL, pid, 0, deliver)?;
        status = wait(pid)?;
    }
    Ok(calls)
}

/// The call that the child stopped at, if it stopped at an entry.
fn entry(pid: libc::pid_t) -> Result<Option<Call>, Failed> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    let result = ptrace(
        libc::PTRACE_GET_SYSCALL_INFO,
        pid,
        size_of::<libc::ptrace_syscall_info>(),
        info.as_mut_ptr() as usize,
    );
    // User-mode Linux does not know PTRACE_GET_SYSCALL_INFO.
    #[cfg(target_arch = "x86_64")]
    if result.as_ref().err().and_then(io::Error::raw_os_error) == Some(libc::EIO) {
        return entry_by_registers(pid);
    }
    result?;
    // SAFETY: zeroed, and every bit pattern is one of these integers.
    let info = unsafe { info.assume_init() };
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return Ok(None);
    }
    // SAFETY: `op` says that the kernel filled in this member.
    let entry = unsafe { info.u.entry };
    Ok(Some(Call {
        number: entry.nr as libc::c_long,
        args: [entry.args[0], entry.args[1]],
    }))
}

#[cfg(target_arch = "x86_64")]
fn entry_by_registers(pid: libc::pid_t) -> Result<Option<Call>, Failed> {
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    let data = registers.as_mut_ptr() as usize;
    ptrace(libc::PTRACE_GETREGS, pid, 0, data)?;
    // SAFETY: zeroed, and every bit pattern is one of these integers.
    let registers = unsafe { registers.assume_init() };
    // The register holds this from the call's entry until the call was made.
    let is_entry = registers.rax as i64 == -i64::from(libc::ENOSYS);
    Ok(is_entry.then_some(Call {
        number: registers.orig_rax as i64,
        args: [registers.rdi, registers.rsi],
    }))
}

fn ptrace(request: libc::c_uint, pid: libc::pid_t, addr: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests above write nothing here but PTRACE_GET_SYSCALL_INFO, which writes at
    // most the `addr` bytes that `data` points to, and PTRACE_GETREGS, which writes a
    // `user_regs_struct` there.
    match unsafe { libc::ptrace(request, pid, addr, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn wait(pid: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    // SAFETY: `status` is a live c_int.
    match unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(status),
    }
}
