//! All that can be seen of a tree of files, as lines that can be compared.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use libtest_mimic::Failed;
use rustix::fs::{AtFlags, CWD, FileType, Stat, statat};

use crate::place::{attributes, time};

/// For each path below the root, a line of attributes, extended attributes and content.
pub type Tree = BTreeMap<String, String>;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What is equal for files made by the same calls.
    Calls,
    /// What is equal for one file that is seen by two paths.
    Exact,
}

pub fn of(root: &Path, detail: Detail) -> Result<Tree, Failed> {
    let mut tree = Tree::new();
    add(&mut tree, root, "", detail)?;
    Ok(tree)
}

fn add(tree: &mut Tree, root: &Path, path: &str, detail: Detail) -> Result<(), Failed> {
    let full = root.join(path);
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", full.display());
    let stat = statat(CWD, &full, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| failed(&e))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let content = match kind {
        FileType::RegularFile => {
            // O_NOATIME, since the access time is compared too.
            let mut options = fs::File::options();
            let file = options.read(true).custom_flags(libc::O_NOATIME).open(&full);
            let mut file = file.map_err(|e| failed(&e))?;
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut file, &mut content).map_err(|e| failed(&e))?;
            format!("crc32 {:08x}", crc32fast::hash(&content))
        }
        FileType::Symlink => format!("to {}", fs::read_link(&full)?.display()),
        _ => String::new(),
    };
    let times = match detail {
        Detail::Calls => format!("mtime {}", time(stat.st_mtime, stat.st_mtime_nsec)),
        Detail::Exact => exact(&stat, kind),
    };
    let line = format!(
        "{} {times} {content} {}",
        attributes(&stat),
        extended(&full)?
    );
    tree.insert(path.to_owned(), line);
    if kind == FileType::Directory {
        for entry in fs::read_dir(&full).map_err(|e| failed(&e))? {
            let name = entry?.file_name();
            let name = name.to_str().ok_or("a name that is not UTF-8")?;
            let path = format!("{path}/{name}");
            add(tree, root, path.trim_start_matches('/'), detail)?;
        }
    }
    Ok(())
}

/// Exact times. The number of blocks is left out: on tmpfs it changes without any call.
fn exact(stat: &Stat, kind: FileType) -> String {
    let mut line = format!(
        "mtime {}.{:09} ctime {}.{:09}",
        stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec,
    );
    // Looking at other kinds of files changes their access time.
    if kind == FileType::RegularFile {
        line += &format!(" atime {}.{:09}", stat.st_atime, stat.st_atime_nsec);
    }
    line
}

/// Names and values of extended attributes.
fn extended(path: &Path) -> Result<String, Failed> {
    let mut list = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(format!("{}: {errno}", path.display()).into()),
    };
    let mut all = BTreeMap::new();
    for name in list[..len]
        .split(|byte| *byte == 0)
        .filter(|n| !n.is_empty())
    {
        let mut value = vec![0; 1 << 16];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        let name = name.escape_ascii().to_string();
        all.insert(name, crc32fast::hash(&value[..len]));
    }
    Ok(format!("{all:x?}"))
}

/// The paths whose lines differ.
pub fn differences(left: &Tree, right: &Tree) -> Vec<String> {
    let mut paths: Vec<_> = left.keys().chain(right.keys()).collect();
    paths.sort();
    paths.dedup();
    paths
        .into_iter()
        .filter(|path| left.get(*path) != right.get(*path))
        .map(|path| format!("{path}: {:?} and {:?}", left.get(path), right.get(path)))
        .collect()
}
