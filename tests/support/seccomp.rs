//! Forges the results of the calling thread's system calls, with a seccomp filter: for results that the kernel does not
//! give on request.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, POLLIN,
    SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO,
    SECCOMP_RET_KILL_THREAD, SECCOMP_RET_USER_NOTIF, SECCOMP_SET_MODE_FILTER, c_long, c_ulong,
    sock_filter, sock_fprog,
};
use rustix::io::Errno;
use rustix::ioctl::opcode;

// Some targets' libc has the structs, but not these constants.
const SECCOMP_IOCTL_NOTIF_RECV: libc::Ioctl =
    opcode::read_write::<libc::seccomp_notif>(b'!', 0) as _;
const SECCOMP_IOCTL_NOTIF_SEND: libc::Ioctl =
    opcode::read_write::<libc::seccomp_notif_resp>(b'!', 1) as _;
/// Makes the kernel make the call after all. Some targets' libc does not have it either.
const SECCOMP_USER_NOTIF_FLAG_CONTINUE: u32 = 1;

/// The offset of the call's number in `struct seccomp_data`.
const OFFSET_OF_NUMBER: u32 = 0;

/// The offset of the low half of argument `n`, counted from 0, in `struct seccomp_data`.
const fn offset_of_argument(n: u32) -> u32 {
    16 + 8 * n + if cfg!(target_endian = "big") { 4 } else { 0 }
}

/// What an ioctl returns instead of being made.
#[derive(Clone, Copy, Debug)]
pub enum Forged {
    Error(Errno),
    /// Success, with this value.
    Value(i32),
}

/// Makes every later ioctl of these numbers by this thread return the forged result. It lasts as long as the thread:
/// run it in a thread of its own.
pub fn forge(ioctls: &[(u32, Forged)]) -> io::Result<()> {
    let count = u8::try_from(ioctls.len()).map_err(io::Error::other)?;
    let mut program = vec![
        load(OFFSET_OF_NUMBER),
        skip_unless(libc::SYS_ioctl as u32, 2 * count + 1),
        load(offset_of_argument(1)),
    ];
    let mut values = Vec::new();
    for &(request, forged) in ioctls {
        program.push(skip_unless(request, 1));
        program.push(answer(match forged {
            Forged::Error(errno) => error(errno),
            // A filter can return nothing but an errno: a supervisor returns the value.
            Forged::Value(value) => {
                values.push((request, value));
                SECCOMP_RET_USER_NOTIF
            }
        }));
    }
    program.push(answer(SECCOMP_RET_ALLOW));

    if values.is_empty() {
        return install(&mut program, false).map(drop);
    }
    install_supervised(&mut program, move |call| {
        let request = call.args[1] as u32;
        let value = values.iter().find(|(forged, _)| *forged == request);
        Answer::Value(value.map_or(0, |(_, value)| i64::from(*value)))
    })
}

/// Makes every later call of this number by this thread fail with this errno. Like [`forge`], it lasts as long as the
/// thread. Earlier filters stay in force.
pub fn refuse(number: c_long, errno: Errno) -> io::Result<()> {
    install(&mut answering(number, error(errno)), false).map(drop)
}

/// Makes the next call of this number by this thread fail with this errno. Later ones are made.
pub fn refuse_next(number: c_long, errno: Errno) -> io::Result<()> {
    let mut refusal = Some(errno);
    let mut program = answering(number, SECCOMP_RET_USER_NOTIF);
    install_supervised(&mut program, move |_| {
        refusal.take().map_or(Answer::Made, Answer::Error)
    })
}

/// Makes the next call of this number by this thread kill the thread. Nothing that it owns is dropped.
pub fn kill_at(number: c_long) -> io::Result<()> {
    install(&mut answering(number, SECCOMP_RET_KILL_THREAD), false).map(drop)
}

/// A supervisor's answer to a call.
enum Answer {
    Value(i64),
    Error(Errno),
    Made,
}

fn install_supervised(
    program: &mut [sock_filter],
    decide: impl FnMut(&libc::seccomp_data) -> Answer + Send + 'static,
) -> io::Result<()> {
    // The supervisor is started before the filter is installed, since it would inherit the filter.
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || receiver.recv().map(|listener| supervise(&listener, decide)));
    if let Some(listener) = install(program, true)? {
        sender.send(listener).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Makes every later call of this number, by this thread and by the program that it executes, return 0 without being
/// made. Like [`forge`], it lasts as long as the thread.
pub fn pretend(number: c_long) -> io::Result<()> {
    install(&mut answering(number, SECCOMP_RET_ERRNO), false).map(drop)
}

/// Installs a filter. With `listen`, returns the fd from which a supervisor reads the calls that the filter leaves to
/// it.
fn install(program: &mut [sock_filter], listen: bool) -> io::Result<Option<OwnedFd>> {
    let program = sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let flags = if listen {
        SECCOMP_FILTER_FLAG_NEW_LISTENER
    } else {
        0
    };
    let zero: c_ulong = 0;
    // SAFETY: PR_SET_NO_NEW_PRIVS takes four longs.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as c_ulong, zero, zero, zero) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `program` points to `len` live instructions, which the kernel copies and checks.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: with that flag the call returns a new fd, which is nobody else's.
    Ok(listen.then(|| unsafe { OwnedFd::from_raw_fd(result as i32) }))
}

/// Answers calls in place of the kernel, until the thread with the filter ends.
fn supervise(
    listener: &OwnedFd,
    mut decide: impl FnMut(&libc::seccomp_data) -> Answer,
) -> io::Result<()> {
    loop {
        let mut poll = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: POLLIN,
            revents: 0,
        };
        // SAFETY: one live pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if poll.revents & POLLIN == 0 {
            return Ok(());
        }
        // The kernel refuses a struct that is not zeroed.
        let mut call = MaybeUninit::<libc::seccomp_notif>::zeroed();
        // SAFETY: the kernel writes a `seccomp_notif`.
        let result = unsafe {
            libc::ioctl(
                listener.as_raw_fd(),
                SECCOMP_IOCTL_NOTIF_RECV,
                call.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: zeroed, and then filled in by the kernel; all fields are integers.
        let call = unsafe { call.assume_init() };
        let (val, error, flags) = match decide(&call.data) {
            Answer::Value(value) => (value, 0, 0),
            Answer::Error(errno) => (0, -errno.raw_os_error(), 0),
            Answer::Made => (0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE),
        };
        let id = call.id;
        let answer = libc::seccomp_notif_resp {
            id,
            val,
            error,
            flags,
        };
        // SAFETY: the kernel reads a live `seccomp_notif_resp`.
        let result = unsafe {
            libc::ioctl(
                listener.as_raw_fd(),
                SECCOMP_IOCTL_NOTIF_SEND,
                &raw const answer,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
}

/// A filter that answers the calls of one number.
fn answering(number: c_long, with: u32) -> Vec<sock_filter> {
    vec![
        load(OFFSET_OF_NUMBER),
        skip_unless(number as u32, 1),
        answer(with),
        answer(SECCOMP_RET_ALLOW),
    ]
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset)
}

/// Skips `count` statements unless what was loaded is `value`.
fn skip_unless(value: u32, count: u8) -> sock_filter {
    statement(BPF_JMP | BPF_JEQ | BPF_K, 0, count, value)
}

fn answer(value: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, 0, 0, value)
}

fn error(errno: Errno) -> u32 {
    SECCOMP_RET_ERRNO | errno.raw_os_error() as u32
}

fn statement(code: u32, if_true: u8, if_false: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: if_true,
        jf: if_false,
        k,
    }
}
