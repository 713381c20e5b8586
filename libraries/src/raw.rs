//! Without a library: the server reads requests from the device and writes the bytes of the replies.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};
use rustix::io::Errno;

use crate::Server;
use crate::files::{Files, mount};
use crate::wire::{attr_out, create_out, entry_out, init_offer, open_out, reply, u32_at, u64_at};

const MAX_WRITE: u32 = 128 << 10;

/// Room for `fuse_in_header` and `fuse_write_in`.
const HEADERS: usize = 4096;

pub fn serve(files: Arc<Files>, mountpoint: &Path) -> io::Result<Server> {
    let device = mount(mountpoint)?;
    files.attach(&device)?;
    Ok(thread::spawn(move || run(&files, &device)))
}

fn run(files: &Files, device: &OwnedFd) -> io::Result<()> {
    let mut buffer = vec![0; HEADERS + MAX_WRITE as usize];
    loop {
        let length = match rustix::io::read(device, &mut buffer[..]) {
            Ok(length) => length,
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let request = &buffer[..length];
        if let Some(answer) = answer(files, request) {
            // It fails with ENOENT if the client was killed. RELEASE follows all the same.
            let _ = reply(device, u64_at(request, 8), answer);
        }
    }
}

/// `None` for requests that have no reply.
fn answer(files: &Files, request: &[u8]) -> Option<io::Result<Vec<u8>>> {
    let (opcode, ino, body) = (u32_at(request, 4), u64_at(request, 16), &request[40..]);
    let name = |offset: usize| {
        OsStr::from_bytes(
            body[offset..]
                .split(|byte| *byte == 0)
                .next()
                .unwrap_or_default(),
        )
    };
    Some(match opcode {
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => return None,
        // INIT
        26 => init(init_offer(request)?, u32_at(body, 8)),
        // LOOKUP
        1 => files.lookup(name(0)).map(|node| entry_out(&node)),
        // GETATTR
        3 => files.look(ino).map(|node| attr_out(&node)),
        // OPEN
        14 => files.open(ino, u32_at(body, 0)).map(open_out),
        // READ
        15 => files.read(u64_at(body, 0), u64_at(body, 8), u32_at(body, 16)),
        // WRITE
        16 => {
            let written = files.write(u64_at(body, 0), u64_at(body, 8), &body[40..]);
            written.map(|length| [length, 0].map(u32::to_ne_bytes).concat())
        }
        // RELEASE
        18 => {
            files.release(u64_at(body, 0));
            Ok(Vec::new())
        }
        // CREATE
        35 => {
            let created = files.create(name(16), u32_at(body, 4), u32_at(body, 0));
            created.map(|(node, opened)| create_out(&node, opened))
        }
        _ => Err(Errno::NOSYS.into()),
    })
}

fn init(offered: InitFlags, max_readahead: u32) -> io::Result<Vec<u8>> {
    let negotiated = negotiate(offered, InitFlags::empty(), MaxStackDepth::One);
    let negotiated = negotiated.inspect_err(|why| eprintln!("no passthrough: {why}"));
    let (flags, flags2, depth) = negotiated.map_or((0, 0, 0), |reply| {
        let (flags, flags2) = reply.flags.to_fields();
        (flags, flags2, reply.max_stack_depth)
    });
    // 7.40; max_readahead, flags; max_background and congestion_threshold; max_write, time_gran; max_pages and
    // map_alignment; flags2, max_stack_depth. The rest is reserved.
    let reply = [
        7,
        40,
        max_readahead,
        flags,
        0,
        MAX_WRITE,
        1,
        0,
        flags2,
        depth,
    ];
    let mut body = reply.map(u32::to_ne_bytes).concat();
    body.resize(64, 0);
    Ok(body)
}
