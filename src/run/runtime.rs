//! The user's private folder for sockets.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Longest path of a socket that every platform takes (macOS: 104 with the final zero).
const LONGEST: usize = 100;

/// A path for a socket of this name: in `$XDG_RUNTIME_DIR/tune`, else in `/tmp/tune-<uid>`.
///
/// # Errors
/// When neither folder is there, private and ours.
pub fn socket_path(name: &str) -> std::io::Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let chosen = std::env::var_os("XDG_RUNTIME_DIR").map(|folder| Path::new(&folder).join("tune"));
    let fallback = PathBuf::from(format!("/tmp/tune-{uid}"));
    let mut reason = None;
    for folder in chosen.into_iter().filter(|folder| folder.is_absolute()).chain([fallback]) {
        let path = folder.join(name);
        if path.as_os_str().len() > LONGEST {
            continue;
        }
        match private(&folder, uid) {
            Ok(()) => return Ok(path),
            Err(error) => reason = Some(error),
        }
    }
    Err(reason.unwrap_or_else(|| std::io::Error::other("no folder has a path short enough for a socket")))
}

/// Makes the folder, or checks that the one which is there is no link, ours, and closed to others.
fn private(folder: &Path, uid: u32) -> std::io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(folder)?;
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
        let what = format!("{} is not a folder of this user alone", folder.display());
        return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, what));
    }
    Ok(())
}
