//! Landlock domains for registrar threads.

use fuse_backing::Access;
use landlock::{AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError};

/// The calling thread can open no file for more than this any more. An error where the kernel has no Landlock.
pub fn restrict(to: Access) -> Result<(), RulesetError> {
    let denied: BitFlags<AccessFs> = match to {
        Access::ReadOnly => AccessFs::WriteFile | AccessFs::Truncate,
        Access::WriteOnly => AccessFs::ReadFile.into(),
        Access::ReadWrite => return Ok(()),
    };
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(denied)?
        .create()?
        .restrict_self()
        .map(drop)
}
