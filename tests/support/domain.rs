//! Landlock domains for registrar threads.

use fuse_backing::Access;
use landlock::{AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError};

/// From now on the calling thread can open files only for this access. Fails if the kernel has no Landlock.
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
