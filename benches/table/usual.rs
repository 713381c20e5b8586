//! The cache of a server without this crate's table: one map of weak references behind one lock.
//!
//! It does less than the table: it ignores the flags of an open, holds the lock during the ioctl, and
//! leaves entries behind.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use fuse_backing::error::BackingError;
use fuse_backing::{Access, BackingFile};

use crate::Device;

pub type Backing<'d> = Arc<BackingFile<&'d Device>>;

pub struct Usual<'d> {
    device: &'d Device,
    by_inode: Mutex<HashMap<u64, Weak<BackingFile<&'d Device>>>>,
}

impl<'d> Usual<'d> {
    pub fn new(device: &'d Device) -> Self {
        Self {
            device,
            by_inode: Mutex::default(),
        }
    }

    /// Dropping the returned value is the release.
    pub fn open(&self, inode: u64, file: &File) -> Result<Backing<'d>, BackingError> {
        let mut by_inode = self.by_inode.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backing) = by_inode.get(&inode).and_then(Weak::upgrade) {
            return Ok(backing);
        }
        let backing = Arc::new(BackingFile::open(self.device, file, Access::ReadOnly)?);
        by_inode.insert(inode, Arc::downgrade(&backing));
        Ok(backing)
    }
}
