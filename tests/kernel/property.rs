//! Random servers and clients against the kernel's rules.

use crate::Test;
use crate::client::Role;

pub const TESTS: &[Test] = &[];

pub const ROLES: &[(&str, Role)] = &[];
