//! [`Access`]: what a server grants.

use std::fmt;

/// Reading, writing, or both. A server grants it through a registration, and a client's open asks for it. The
/// kernel does not compare the two, see [`FuseDevice::backing_open`](crate::FuseDevice::backing_open).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reading.
    ReadOnly = 1,
    /// Writing.
    WriteOnly = 2,
    /// Reading and writing.
    ReadWrite = 3,
}

impl Access {
    /// One bit for reading, one for writing.
    pub(crate) const fn bits(self) -> u8 {
        self as u8
    }

    pub(crate) const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::ReadOnly),
            2 => Some(Self::WriteOnly),
            3 => Some(Self::ReadWrite),
            _ => None,
        }
    }

    /// All that either of the two permits.
    pub(crate) fn union(self, other: Self) -> Self {
        Self::from_bits(self.bits() | other.bits()).unwrap_or(Self::ReadWrite)
    }

    /// Whether this access includes all of `wanted`.
    #[must_use]
    pub fn allows(self, wanted: Self) -> bool {
        self == Self::ReadWrite || self == wanted
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "read-only",
            Self::WriteOnly => "write-only",
            Self::ReadWrite => "read-write",
        })
    }
}
