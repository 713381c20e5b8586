//! Forges the results of ioctls for the calling thread, with a seccomp filter: what the kernel will
//! not do on request.

#![allow(unsafe_code)]

use std::io;

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_MODE_FILTER,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, c_ulong, sock_filter, sock_fprog,
};
use rustix::io::Errno;

/// `struct seccomp_data`: the number of the call, and the low half of its second argument.
const OFFSET_OF_NUMBER: u32 = 0;
const OFFSET_OF_REQUEST: u32 = 16 + 8 + if cfg!(target_endian = "big") { 4 } else { 0 };

/// What an ioctl returns instead of being made.
#[derive(Clone, Copy, Debug)]
pub enum Forged {
    Error(Errno),
    /// Success, with the value 0.
    Zero,
}

/// Makes every later ioctl of these numbers by this thread return what it says. For the rest of the
/// thread's life: run it in a thread of its own.
pub fn forge(ioctls: &[(u32, Forged)]) -> io::Result<()> {
    let load = |offset| statement(BPF_LD | BPF_W | BPF_ABS, 0, 0, offset);
    let skip_unless = |value, count| statement(BPF_JMP | BPF_JEQ | BPF_K, 0, count, value);
    let answer = |value| statement(BPF_RET | BPF_K, 0, 0, value);

    let count = u8::try_from(ioctls.len()).map_err(io::Error::other)?;
    let mut program = vec![
        load(OFFSET_OF_NUMBER),
        skip_unless(libc::SYS_ioctl as u32, 2 * count + 1),
        load(OFFSET_OF_REQUEST),
    ];
    for &(request, forged) in ioctls {
        let data = match forged {
            Forged::Error(errno) => errno.raw_os_error() as u32,
            Forged::Zero => 0,
        };
        program.push(skip_unless(request, 1));
        program.push(answer(SECCOMP_RET_ERRNO | data));
    }
    program.push(answer(SECCOMP_RET_ALLOW));

    let program = sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let zero: c_ulong = 0;
    // SAFETY: PR_SET_NO_NEW_PRIVS takes four longs.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as c_ulong, zero, zero, zero) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `program` points to `len` live instructions, which the kernel copies and checks.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn statement(code: u32, if_true: u8, if_false: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: if_true,
        jf: if_false,
        k,
    }
}
