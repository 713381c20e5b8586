//! A client process that lives as long as a sequence, and obeys commands.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use libtest_mimic::Failed;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::client::{Client, Role, errno_of};

pub const ROLES: &[(&str, Role)] = &[("obey", obey)];

/// How many bytes of a file a mapping covers.
pub const MAPPED: usize = 4 * 4096;

/// A client process that was started.
pub struct Puppet {
    client: Client,
    commands: File,
}

/// The answer to a command: a text, in which bytes are hexadecimal, or an errno.
pub type Answer = Result<String, i32>;

impl Puppet {
    pub fn start() -> Result<Self, Failed> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Self {
            client: Client::start_with_fd("obey", &[], read)?,
            commands: write.into(),
        })
    }

    /// Sends a command. The caller must then wait for its `answer`.
    pub fn send(&mut self, command: &str) -> io::Result<()> {
        self.commands.write_all(format!("{command}\n").as_bytes())
    }

    pub fn answer(&mut self) -> Result<Answer, Failed> {
        let line = self.client.line()?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("ok", rest) => Ok(Ok(rest.to_owned())),
            ("errno", number) => Ok(Err(number.parse()?)),
            _ => Err(format!("the client says '{line}'").into()),
        }
    }

    pub fn ask(&mut self, command: &str) -> Result<Answer, Failed> {
        self.send(command)?;
        self.answer()
    }

    pub fn finish(self) -> Result<(), Failed> {
        drop(self.commands);
        let last = self.client.finish()?;
        if last == "end" {
            Ok(())
        } else {
            Err(format!("the client ended with '{last}'").into())
        }
    }
}

pub fn open_command(slot: u64, flags: i32, path: &Path) -> String {
    format!("open {slot} {flags} {}", path.display())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> io::Result<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits
        .map(|pair| byte(pair).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
        .collect()
}

fn obey(_: &[String]) -> Result<String, Box<dyn std::error::Error>> {
    let mut hands = Hands::default();
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.splitn(4, ' ').collect();
        match hands.command(&words) {
            Ok(text) => println!("ok {text}"),
            Err(error) => println!("{}", errno_of(&error)),
        }
    }
    Ok("end".into())
}

#[derive(Default)]
struct Hands {
    files: HashMap<u64, File>,
    maps: HashMap<u64, Mapping>,
}

impl Hands {
    fn command(&mut self, words: &[&str]) -> io::Result<String> {
        let bad = || io::Error::from_raw_os_error(libc::EBADMSG);
        let number = |at: usize| -> io::Result<usize> {
            let word = words.get(at).ok_or_else(bad)?;
            word.parse().map_err(|_| bad())
        };
        let slot = number(1)? as u64;
        let file = || self.files.get(&slot).ok_or_else(bad);
        let map = || self.maps.get(&slot).ok_or_else(bad);
        match words[0] {
            "open" => {
                let flags = OFlags::from_bits_retain(number(2)? as u32) | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(0o644);
                let file = rustix::fs::open(words[3], flags, mode)?;
                self.files.insert(slot, file.into());
                Ok(String::new())
            }
            "close" => {
                let file = self.files.remove(&slot).ok_or_else(bad)?;
                close(file)?;
                Ok(String::new())
            }
            "read" => {
                let mut bytes = vec![0; number(3)?];
                let length = file()?.read_at(&mut bytes, number(2)? as u64)?;
                Ok(hex(&bytes[..length]))
            }
            "write" => {
                let bytes = unhex(words[3])?;
                let length = file()?.write_at(&bytes, number(2)? as u64)?;
                Ok(length.to_string())
            }
            "size" => Ok(file()?.metadata()?.len().to_string()),
            "map" => {
                let map = Mapping::new(file()?, words[2] == "rw")?;
                self.maps.insert(slot, map);
                Ok(String::new())
            }
            "unmap" => {
                self.maps.remove(&slot).ok_or_else(bad)?;
                Ok(String::new())
            }
            "peek" => Ok(hex(&map()?.read(number(2)?, number(3)?))),
            "poke" => {
                map()?.write(number(2)?, &unhex(words[3])?)?;
                Ok(String::new())
            }
            _ => Err(bad()),
        }
    }
}

/// Closes a file, and reports the result, which dropping it would not.
#[allow(unsafe_code)]
fn close(file: File) -> io::Result<()> {
    // SAFETY: the fd was this file's alone.
    match unsafe { libc::close(file.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A `MAP_SHARED` mapping. Access beyond the file's size is the caller's fault, and raises SIGBUS.
struct Mapping(*mut u8);

#[allow(unsafe_code)]
impl Mapping {
    fn new(file: &File, write: bool) -> io::Result<Self> {
        let prot = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        let (null, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: the kernel chooses where the new mapping goes.
        let map = unsafe { libc::mmap(null, MAPPED, prot, libc::MAP_SHARED, fd, 0) };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(map.cast()))
    }

    fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= MAPPED);
        let byte = |at| {
            // SAFETY: inside the mapping, which lives as long as `self`.
            unsafe { self.0.add(at).read_volatile() }
        };
        (offset..offset + length).map(byte).collect()
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        assert!(offset + bytes.len() <= MAPPED);
        for (at, byte) in (offset..).zip(bytes) {
            // SAFETY: as above; "poke" is sent only for a mapping that was made writable.
            unsafe { self.0.add(at).write_volatile(*byte) };
        }
        // SAFETY: the whole of the mapping.
        match unsafe { libc::msync(self.0.cast(), MAPPED, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[allow(unsafe_code)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, to which nothing refers any more.
        unsafe { libc::munmap(self.0.cast(), MAPPED) };
    }
}
