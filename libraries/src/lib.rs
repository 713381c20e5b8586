//! The code of `docs/libraries.md`: the same small filesystem on each FUSE library, with passthrough.
//!
//! One module for each row of the page's table. Each has a function `serve`, which mounts, and serves until the
//! mount is gone. What the modules share is in [`files`], [`wire`] and [`relay`].

pub mod files;
pub mod relay;
pub mod wire;

pub mod fractal_fuse;
pub mod fuse_backend_rs;
pub mod fuser_0_16;
pub mod fuser_0_17;
pub mod fuser_0_18;
pub mod polyfuse;
pub mod raw;

/// fuse3.
pub mod fuse3 {
    use ::fuse3 as library;

    include!("fuse3.rs");

    fn init_reply(max_write: NonZeroU32) -> ReplyInit {
        ReplyInit::new(max_write)
    }
}

/// rfuse3.
pub mod rfuse3 {
    use ::rfuse3 as library;

    include!("fuse3.rs");

    fn init_reply(max_write: NonZeroU32) -> ReplyInit {
        ReplyInit { max_write }
    }
}

/// A thread that serves a mounted filesystem. It ends when the filesystem is unmounted.
pub type Server = std::thread::JoinHandle<std::io::Result<()>>;
