//! `BackingTable` on real mounts.

use crate::Test;
use crate::client::Role;

pub const TESTS: &[Test] = &[];

pub const ROLES: &[(&str, Role)] = &[];
