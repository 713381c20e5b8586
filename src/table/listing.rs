//! Figures and listing of a table.

use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use rustix::fs::{major, minor};

use crate::access::Access;
use crate::error::{BackingError, ServerReason};

/// Figures of a [`BackingTable`](super::BackingTable).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TableStats {
    /// Backing ids: of open inodes, idle ones, those that could not be closed, and those that are being registered or
    /// closed. The limit applies to this number.
    pub ids: usize,
    /// How many ids there may be.
    pub limit: usize,
    /// Ids without opens, kept for reopening.
    pub idle: usize,
    /// Opens in server mode so far, by cause.
    pub served: Vec<(ServerReason, u64)>,
    /// Failed closes so far, including retries.
    pub close_failures: u64,
    /// Registrations so far of the fd that [`open`](super::BackingTable::open) was given: there was no `O_PATH` fd of
    /// the file, or the kernel is older than 6.12 and does not take one.
    pub by_open_fd: u64,
    /// The error that holds for the whole connection. While it is set, nothing more is registered.
    pub refused: Option<BackingError>,
}

/// An inode in a [`Listing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry<K> {
    /// The key by which the server identifies it.
    pub inode: K,
    /// The backing id; `None` in server mode.
    pub id: Option<i32>,
    /// `st_dev` of the backing file.
    pub backing_device: Option<u64>,
    /// `st_ino` of the backing file.
    pub backing_inode: Option<u64>,
    /// The access that has been granted so far.
    pub access: Option<Access>,
    /// Opens that have not been released. 0: the id is idle, or closing it failed.
    pub opens: u64,
    /// Whether no key leads to it any more: it was forgotten, invalidated, or replaced by another inode.
    pub detached: bool,
    /// Why it is in server mode.
    pub server_reason: Option<ServerReason>,
    /// Why its id could not be closed.
    pub close_failed: Option<BackingError>,
    /// Time since its first open, in whole seconds.
    pub age: Duration,
}

/// The result of [`BackingTable::list`](super::BackingTable::list): entries, which print as a table.
#[derive(Clone, Debug)]
pub struct Listing<K>(pub(super) Vec<Entry<K>>);

impl<K> Deref for Listing<K> {
    type Target = [Entry<K>];

    fn deref(&self) -> &[Entry<K>] {
        &self.0
    }
}

impl<'a, K> IntoIterator for &'a Listing<K> {
    type Item = &'a Entry<K>;
    type IntoIter = std::slice::Iter<'a, Entry<K>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<K: fmt::Display> fmt::Display for Listing<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>10} {:>10} {:>8} {:>12} {:<10} {:>6} {:>7} MODE",
            "INODE", "ID", "DEVICE", "BACKING", "ACCESS", "OPENS", "AGE"
        )?;
        for entry in &self.0 {
            let device = |device| format!("{}:{}", major(device), minor(device));
            write!(
                f,
                "{:>10} {:>10} {:>8} {:>12} {:<10} {:>6} {:>6}s ",
                entry.inode,
                or_dash(entry.id),
                or_dash(entry.backing_device.map(device)),
                or_dash(entry.backing_inode),
                or_dash(entry.access),
                entry.opens,
                entry.age.as_secs(),
            )?;
            match (entry.server_reason, entry.close_failed) {
                (Some(reason), _) => write!(f, "server: {reason}")?,
                (None, Some(cause)) => write!(f, "passthrough, not closed: {cause}")?,
                (None, None) if entry.opens == 0 => write!(f, "passthrough, idle")?,
                (None, None) => write!(f, "passthrough")?,
            }
            writeln!(f, "{}", if entry.detached { ", detached" } else { "" })?;
        }
        Ok(())
    }
}

fn or_dash(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
