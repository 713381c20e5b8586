//! `FUSE_BACKING_TEST=off|auto|require`: what becomes of a test that cannot run here.

use std::env;

use libtest_mimic::{Completion, Failed, Trial};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every test is ignored.
    Off,
    /// A test that cannot run is ignored, with the reason.
    Auto,
    /// A test that cannot run fails, with the reason.
    Require,
}

impl Mode {
    pub fn from_env() -> Self {
        match env::var("FUSE_BACKING_TEST").as_deref() {
            Err(_) | Ok("" | "auto") => Self::Auto,
            Ok("off") => Self::Off,
            Ok("require") => Self::Require,
            Ok(other) => panic!("FUSE_BACKING_TEST is '{other}': use off, auto or require"),
        }
    }

    /// A test that can run only if `ready` is `Ok`.
    pub fn trial(
        self,
        name: &str,
        ready: &Result<(), String>,
        test: impl FnOnce() -> Result<(), Failed> + Send + 'static,
    ) -> Trial {
        let outcome = match (self, ready) {
            (Self::Off, _) => Some(Ok(Completion::ignored_with("FUSE_BACKING_TEST=off"))),
            (_, Ok(())) => None,
            (Self::Auto, Err(why)) => Some(Ok(Completion::ignored_with(why))),
            (Self::Require, Err(why)) => Some(Err(Failed::from(format!("cannot run here: {why}")))),
        };
        Trial::ignorable_test(name, move || match outcome {
            Some(outcome) => outcome,
            None => test().map(|()| Completion::Completed),
        })
    }
}
