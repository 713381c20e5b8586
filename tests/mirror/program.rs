//! Programs that the tests run: the examples, and others by name.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;

use libtest_mimic::Failed;

/// An example that cargo has built, in a folder beside that of this program.
pub fn example(name: &str) -> Result<PathBuf, Failed> {
    let built = folder(2)?.join("examples").join(name);
    if built.is_file() {
        Ok(built)
    } else {
        let built = built.display();
        Err(format!("there is no {built}: run `cargo build --examples`, or all tests").into())
    }
}

/// Cargo's target folder, or the folder in it for a target triple.
pub fn target() -> Result<PathBuf, Failed> {
    folder(3)
}

/// `levels` above this program, which is `TARGET/PROFILE/deps/mirror-HASH`.
fn folder(levels: usize) -> Result<PathBuf, Failed> {
    let this = env::current_exe()?;
    let folder = this.ancestors().nth(levels);
    Ok(folder
        .ok_or("this program is not where cargo puts it")?
        .to_owned())
}

/// The program of that name in `PATH`.
pub fn in_path(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(name.as_ref()))
        .find(|path| path.is_file())
}
