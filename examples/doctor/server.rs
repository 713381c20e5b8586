//! A FUSE server of two files with the same content. Reads of one are passed through to a backing
//! file; the server answers reads of the other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backing::error::NegotiateError;
use fuse_backing::init::{InitFlags, MaxStackDepth, Negotiated, negotiate};
use fuse_backing::{Access, BackingFile, FopenFlags, OpenReply};
use rustix::io::{Errno, read, write};

use crate::scratch::Device;

/// The files' names.
pub(crate) const PASSED_THROUGH: &str = "passed-through";
pub(crate) const SERVED: &str = "served";

/// Nodeids.
const ROOT: u64 = 1;
const PASSED_THROUGH_NODE: u64 = 2;
const SERVED_NODE: u64 = 3;

// From `<linux/fuse.h>`.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Larger than any request: WRITE carries at most `MAX_WRITE` bytes.
const BUFFER: usize = 64 << 10;
const MAX_WRITE: u32 = 4096;

/// What the kernel offered in its INIT request, and the result of the negotiation.
pub(crate) struct Offer {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) flags: InitFlags,
    pub(crate) negotiated: Result<Negotiated, NegotiateError>,
}

/// State that the server thread and the doctor share.
#[derive(Default)]
pub(crate) struct Shared {
    /// READ requests for each file.
    pub(crate) passed_through_reads: AtomicU64,
    pub(crate) served_reads: AtomicU64,
    /// Opens minus releases of the passed-through file.
    pub(crate) passed_through_opens: AtomicU64,
    /// The backing file.
    pub(crate) backing: Mutex<Option<BackingFile<Device>>>,
}

impl Shared {
    pub(crate) fn swap_backing(
        &self,
        backing: Option<BackingFile<Device>>,
    ) -> Option<BackingFile<Device>> {
        let mut slot = self.backing.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *slot, backing)
    }
}

pub(crate) struct Server {
    pub(crate) device: Device,
    pub(crate) max_stack_depth: MaxStackDepth,
    pub(crate) content: Arc<[u8]>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) offers: Sender<Offer>,
}

impl Server {
    /// Serves until the filesystem has ended.
    pub(crate) fn run(self) {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = match read(&self.device, &mut buffer[..]) {
                Ok(length) => length,
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
                Err(_) => return,
            };
            let request = Request(&buffer[..length]);
            match request.opcode() {
                FORGET | BATCH_FORGET | INTERRUPT => {}
                INIT => {
                    let (offer, body) = self.init(&request);
                    self.reply(&request, Ok(body));
                    // Sent after the reply: files can be registered only then. If the receiver has given up,
                    // nobody needs it.
                    let _ = self.offers.send(offer);
                }
                _ => self.reply(&request, self.answer(&request)),
            }
        }
    }

    fn answer(&self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        let nodeid = request.nodeid();
        match request.opcode() {
            LOOKUP => {
                let nodeid = match request.body().strip_suffix(&[0]) {
                    Some(name) if name == PASSED_THROUGH.as_bytes() => PASSED_THROUGH_NODE,
                    Some(name) if name == SERVED.as_bytes() => SERVED_NODE,
                    _ => return Err(Errno::NOENT),
                };
                // Valid for 0 seconds: the kernel caches nothing.
                let entry = [nodeid, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
                Ok([entry, self.attributes(nodeid)].concat())
            }
            GETATTR => Ok([vec![0; 16], self.attributes(nodeid)].concat()),
            OPEN => self.open(nodeid, request.u32(0)),
            READ => Ok(self.read(nodeid, request.u64(8), request.u32(16))),
            RELEASE => {
                if nodeid == PASSED_THROUGH_NODE {
                    let opens = &self.shared.passed_through_opens;
                    opens.fetch_sub(1, Ordering::SeqCst);
                }
                Ok(Vec::new())
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, request: &Request<'_>) -> (Offer, Vec<u8>) {
        let offered = InitFlags::from_fields(request.u32(12), request.u32(16));
        let negotiated = negotiate(offered, InitFlags::empty(), self.max_stack_depth);
        let [flags, flags2, depth] = match &negotiated {
            Ok(reply) => {
                let (flags, flags2) = reply.flags.to_fields();
                [flags, flags2, reply.max_stack_depth]
            }
            Err(_) => [0; 3],
        };
        let offer = Offer {
            major: request.u32(0),
            minor: request.u32(4),
            flags: offered,
            negotiated,
        };
        // major, minor; max_readahead, flags; max_background and congestion_threshold; max_write,
        // time_gran; max_pages and map_alignment, flags2, max_stack_depth; the rest is reserved.
        let readahead = request.u32(8);
        let reply = [7, 40, readahead, flags, 0, MAX_WRITE, 1, 0, flags2, depth];
        let mut body = reply.map(u32::to_ne_bytes).concat();
        body.resize(64, 0);
        (offer, body)
    }

    fn open(&self, nodeid: u64, flags: u32) -> Result<Vec<u8>, Errno> {
        let backing = self.shared.backing.lock();
        let backing = backing.unwrap_or_else(PoisonError::into_inner);
        let reply = if nodeid == PASSED_THROUGH_NODE {
            let backing = backing.as_ref().ok_or(Errno::IO)?;
            let granted = Access::ReadOnly;
            let reply = OpenReply::passthrough(backing.id(), granted, flags, FopenFlags::empty())?;
            // Counted only now: an OPEN that fails gets no RELEASE.
            let opens = &self.shared.passed_through_opens;
            opens.fetch_add(1, Ordering::SeqCst);
            reply
        } else {
            OpenReply::server(FopenFlags::empty())?
        };
        Ok(reply.to_fuse_open_out(0).to_bytes().to_vec())
    }

    fn read(&self, nodeid: u64, offset: u64, size: u32) -> Vec<u8> {
        let reads = match nodeid {
            PASSED_THROUGH_NODE => &self.shared.passed_through_reads,
            _ => &self.shared.served_reads,
        };
        reads.fetch_add(1, Ordering::SeqCst);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.content.get(start..).unwrap_or_default();
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        rest[..size.min(rest.len())].to_vec()
    }

    /// `struct fuse_attr`.
    fn attributes(&self, nodeid: u64) -> Vec<u8> {
        let (mode, size) = match nodeid {
            ROOT => (0o40_555, 0),
            _ => (0o100_444, self.content.len() as u64),
        };
        // ino, size, blocks, and the seconds of three times.
        let long = [nodeid, size, 0, 0, 0, 0].map(u64::to_ne_bytes);
        // The nanoseconds of three times, mode, nlink, uid, gid, rdev, blksize, flags.
        let short = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].map(u32::to_ne_bytes);
        [long.concat(), short.concat()].concat()
    }

    fn reply(&self, request: &Request<'_>, answer: Result<Vec<u8>, Errno>) {
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let length = (16 + body.len()) as u32;
        let mut reply = length.to_ne_bytes().to_vec();
        reply.extend(error.to_ne_bytes());
        reply.extend(request.unique().to_ne_bytes());
        reply.extend(body);
        // Fails if the request was interrupted, or the filesystem has ended.
        let _ = write(&self.device, &reply);
    }
}

/// `struct fuse_in_header` and the body.
struct Request<'a>(&'a [u8]);

impl<'a> Request<'a> {
    fn opcode(&self) -> u32 {
        u32::from_ne_bytes(self.field(4))
    }

    fn unique(&self) -> u64 {
        u64::from_ne_bytes(self.field(8))
    }

    fn nodeid(&self) -> u64 {
        u64::from_ne_bytes(self.field(16))
    }

    fn body(&self) -> &'a [u8] {
        self.0.get(40..).unwrap_or_default()
    }

    /// At an offset in the body.
    fn u32(&self, offset: usize) -> u32 {
        u32::from_ne_bytes(self.field(40 + offset))
    }

    /// At an offset in the body.
    fn u64(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.field(40 + offset))
    }

    /// Zero if beyond the end, since older kernels send less.
    fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        let bytes = self.0.get(offset..offset + N);
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or([0; N])
    }
}
