//! For libraries whose INIT reply lacks passthrough: they get one end of a socket pair instead of the device. What
//! they write is changed on the way.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::wire::{add_passthrough, init_offer, put, u32_at, u64_at};

/// At most this much is read or written with one request.
const MAX_WRITE: u32 = 128 << 10;
/// Room for `fuse_in_header` and `fuse_write_in`.
const HEADERS: usize = 4096;

/// Sockets that keep the bounds of messages, as the device does: one for the relay, one for the library.
pub fn sockets() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // A library that does not wait for room in the socket can send this much.
    set_socket_send_buffer_size_force(&pair.1, 16 << 20)?;
    Ok(pair)
}

/// Passes INIT on to the library, and its reply, with passthrough, to the kernel.
pub fn init(device: &OwnedFd, socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = vec![0; HEADERS + MAX_WRITE as usize];
    let length = receive(device, &mut buffer)?;
    let request = &buffer[..length];
    let offered = init_offer(request).ok_or(io::ErrorKind::InvalidData)?;
    let unique = u64_at(request, 8);
    rustix::io::write(socket, request)?;

    let length = receive(socket, &mut buffer)?;
    let mut reply = buffer[..length].to_vec();
    if u64_at(&reply, 8) != unique || u32_at(&reply, 4) != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    add_passthrough(&mut reply, offered);
    // max_write, and max_pages beside map_alignment.
    let max_write = u32_at(&reply, 16 + 20).min(MAX_WRITE);
    put(&mut reply, 16 + 20, max_write);
    reply[16 + 28..16 + 30].copy_from_slice(&((MAX_WRITE / 4096) as u16).to_ne_bytes());
    rustix::io::write(device, &reply)?;
    Ok(())
}

/// Relays in two threads, from INIT until the filesystem is unmounted. Then it calls `unmounted`.
pub fn start(device: OwnedFd, socket: OwnedFd, unmounted: impl FnOnce() + Send + 'static) {
    let (device, socket) = (Arc::new(device), Arc::new(socket));
    thread::spawn(move || {
        if let Err(error) = init(&device, &socket) {
            eprintln!("INIT: {error}");
            return unmounted();
        }
        let replies = (Arc::clone(&socket), Arc::clone(&device));
        thread::spawn(move || forward(&replies.0, &replies.1));
        forward(&device, &socket);
        unmounted();
    });
}

/// Returns when there is nothing more to read.
fn forward(from: &OwnedFd, to: &OwnedFd) {
    let mut buffer = vec![0; HEADERS + MAX_WRITE as usize];
    while let Ok(length @ 1..) = receive(from, &mut buffer) {
        // The device refuses a reply to a request that was answered or interrupted: ENOENT.
        let _ = rustix::io::write(to, &buffer[..length]);
    }
}

fn receive(from: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(from, &mut *buffer) {
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => {}
            done => return Ok(done?),
        }
    }
}

/// The program that hands the fd `fd=N` of its parent process to a library that expects it of fusermount.
/// See `src/bin/fusermount3.rs`.
pub fn fusermount() -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("fusermount3"));
    let found = found.into_iter().find(|program| program.exists());
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}
