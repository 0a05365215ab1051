//! Locks held by living processes: the kernel lets go of them however the process ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Who holds a lock, as written in the locked file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Holder {
    pub run: String,
    pub process: u32,
    /// The worker's control socket.
    pub socket: Option<PathBuf>,
}

/// A lock that this process holds until it is dropped.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

/// Looking whether a lock is held takes it for a moment, so taking it is tried again for this long.
const PATIENCE: Duration = Duration::from_secs(1);

impl Lock {
    /// Takes the lock, or says that somebody else has it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn take(path: &Path, holder: &Holder) -> std::io::Result<Option<Self>> {
        Self::take_within(path, holder, PATIENCE)
    }

    /// As [`take`](Self::take), trying again for some time.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn take_within(path: &Path, holder: &Holder, patience: Duration) -> std::io::Result<Option<Self>> {
        if let Some(folder) = path.parent() {
            super::folder::private_folder(folder)?;
        }
        let mut file = open(path, true)?;
        let started = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if started.elapsed() >= patience => return Ok(None),
                Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(5)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&serde_json::to_vec(holder).map_err(std::io::Error::other)?)?;
        file.flush()?;
        Ok(Some(Self { file }))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Nobody reads a holder that is gone.
        let _ = self.file.set_len(0);
    }
}

/// Who holds the lock now; none when nobody does. A holder that has not yet written who it is has process 0.
pub fn holder(path: &Path) -> Option<Holder> {
    let mut file = open(path, false).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => None,
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            file.read_to_string(&mut text).ok()?;
            Some(serde_json::from_str(&text).unwrap_or_default())
        }
        Err(_) => None,
    }
}

fn open(path: &Path, create: bool) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(create).create(create).truncate(false).mode(0o600).open(path)
}
