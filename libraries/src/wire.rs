//! The bytes of the FUSE protocol, for what a library does not write itself.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use fuse_backing::Opened;
use fuse_backing::init::{InitFlags, MaxStackDepth, negotiate};

use crate::files::{Node, errno};

/// The opcode of INIT.
const INIT: u32 = 26;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const INIT_OUT: usize = 64;

/// Answers the request `unique`. The whole reply is one write(2).
pub fn reply(device: impl AsFd, unique: u64, answer: io::Result<Vec<u8>>) -> io::Result<()> {
    let error = answer.as_ref().map_or_else(|error| -errno(error), |_| 0);
    let body = answer.unwrap_or_default();
    let length = (OUT_HEADER + body.len()) as u32;
    let head = [
        &length.to_ne_bytes()[..],
        &error.to_ne_bytes(),
        &unique.to_ne_bytes(),
    ];
    let bytes = [head.concat(), body].concat();
    rustix::io::write(device, &bytes)?;
    Ok(())
}

/// `fuse_attr`
fn attr(node: &Node) -> Vec<u8> {
    let meta = &node.meta;
    let long = [node.ino, meta.size(), meta.blocks()].map(u64::to_ne_bytes);
    let seconds = [meta.atime(), meta.mtime(), meta.ctime()].map(i64::to_ne_bytes);
    let nanoseconds = [meta.atime_nsec(), meta.mtime_nsec(), meta.ctime_nsec()];
    let nanoseconds = nanoseconds.map(|ns| (ns as u32).to_ne_bytes());
    // mode, nlink, uid, gid, rdev, blksize, flags
    let short = [meta.mode(), 1, meta.uid(), meta.gid(), 0, 4096, 0].map(u32::to_ne_bytes);
    [
        long.concat(),
        seconds.concat(),
        nanoseconds.concat(),
        short.concat(),
    ]
    .concat()
}

/// `fuse_attr_out`. The kernel caches nothing.
pub fn attr_out(node: &Node) -> Vec<u8> {
    [vec![0; 16], attr(node)].concat()
}

/// `fuse_entry_out`. The kernel caches nothing.
pub fn entry_out(node: &Node) -> Vec<u8> {
    let head = [node.ino, 0, 0, 0, 0].map(u64::to_ne_bytes);
    [head.concat(), attr(node)].concat()
}

/// `fuse_open_out`: the OPEN reply.
pub fn open_out(opened: Opened) -> Vec<u8> {
    opened.to_fuse_open_out().to_bytes().to_vec()
}

/// `fuse_entry_out` and `fuse_open_out`: the CREATE reply.
pub fn create_out(node: &Node, opened: Opened) -> Vec<u8> {
    [entry_out(node), open_out(opened)].concat()
}

/// What the kernel offers, if the request is INIT.
pub fn init_offer(request: &[u8]) -> Option<InitFlags> {
    let flags = u32_at(request, IN_HEADER + 12);
    let flags2 = u32_at(request, IN_HEADER + 16);
    (u32_at(request, 4) == INIT).then(|| InitFlags::from_fields(flags, flags2))
}

/// Adds passthrough to the INIT reply of a library that does not know it: `FUSE_PASSTHROUGH`, `FUSE_INIT_EXT` and
/// `max_stack_depth`. The flags of the library stay. Where passthrough is unavailable the reply stays as it is.
pub fn add_passthrough(init_reply: &mut Vec<u8>, offered: InitFlags) {
    let flags = u32_at(init_reply, OUT_HEADER + 12);
    let flags2 = u32_at(init_reply, OUT_HEADER + 32);
    let wanted = InitFlags::from_fields(flags, flags2);
    let negotiated = match negotiate(offered, wanted, MaxStackDepth::One) {
        Ok(negotiated) => negotiated,
        Err(why) => return eprintln!("no passthrough: {why}"),
    };
    let (flags, flags2) = negotiated.flags.to_fields();

    init_reply.resize(OUT_HEADER + INIT_OUT, 0);
    put(init_reply, 0, (OUT_HEADER + INIT_OUT) as u32);
    put(init_reply, OUT_HEADER + 12, flags);
    put(init_reply, OUT_HEADER + 32, flags2);
    put(init_reply, OUT_HEADER + 36, negotiated.max_stack_depth);
}

/// Zero beyond the end: older kernels and libraries write less.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes
        .get(offset..offset + 4)
        .and_then(|field| field.try_into().ok());
    u32::from_ne_bytes(field.unwrap_or_default())
}

/// Zero beyond the end.
pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes
        .get(offset..offset + 8)
        .and_then(|field| field.try_into().ok());
    u64::from_ne_bytes(field.unwrap_or_default())
}

pub fn put(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
}
