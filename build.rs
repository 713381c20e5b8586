//! Checks the crate against the machine's `<linux/fuse.h>`.
fn main() {
    println!("cargo::rustc-check-cfg=cfg(fuse_backing_uapi_header)");
    println!("cargo::rerun-if-changed=build.rs");
}
