//! The mirror example against a plain directory.

fn main() {}
