//! Downloads into the Hugging Face cache that go on at the byte where they were cut off.
//!
//! Layout and names are those of Python's `huggingface_hub`, so that each goes on where the other stopped: content lies
//! in `blobs/<etag>` (`<etag>.incomplete` until it is whole), `snapshots/<commit>/` links to it, `refs/` names commits.

use std::future::poll_fn;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_core::Stream;
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFRepository, RepoType};
use rustix::fs::FlockOperation;
use sha2::{Digest, Sha256};

use super::cache;
use super::fetch::FetchError;

/// Attempts that bring nothing before a download is given up.
const ATTEMPTS: u32 = 3;
/// Progress is told at most this often.
const CALM: Duration = Duration::from_millis(100);

/// What to fetch, and whom to tell.
pub struct Order<'a> {
    /// `models` or `datasets`.
    pub kind: &'static str,
    pub id: &'a str,
    /// A branch, tag or commit; empty for `main`.
    pub revision: &'a str,
    /// Leaves the wanted ones of a repository's files.
    pub wanted: &'a (dyn Fn(&mut Vec<String>) + Sync),
    /// Gets bytes had and bytes in all.
    pub tell: &'a (dyn Fn(u64, u64) + Sync),
}

/// A file of the repository.
struct File {
    path: String,
    etag: String,
    /// Bytes.
    size: u64,
}

/// Fetches the wanted files and gives the snapshot's folder. Nothing lies there under its name before all is whole.
///
/// # Errors
/// When the hub cannot be reached or refuses, no file is wanted, or what came is not what the hub has.
pub async fn snapshot<T: RepoType>(repository: &HFRepository<T>, order: &Order<'_>) -> Result<PathBuf, FetchError> {
    let failed = |error| FetchError::of(format!("the download of {}", order.id), error);
    let revision = if order.revision.is_empty() { "main" } else { order.revision };
    let mut paths = Vec::new();
    let tree = repository.list_tree().revision(revision).recursive(true).send().map_err(failed)?;
    let mut tree = Box::pin(tree);
    while let Some(entry) = poll_fn(|context| tree.as_mut().poll_next(context)).await {
        if let RepoTreeEntry::File { path, .. } = entry.map_err(failed)? {
            paths.push(path);
        }
    }
    let there = paths.len();
    (order.wanted)(&mut paths);
    if paths.is_empty() {
        return Err(FetchError::Nothing { id: order.id.to_owned(), files: there });
    }
    let mut commit = String::new();
    let mut files = Vec::new();
    for path in paths {
        let about = repository.get_file_metadata().filepath(path.as_str()).revision(revision).send().await;
        let about = about.map_err(failed)?;
        commit = about.commit_hash;
        files.push(File { path, etag: about.etag, size: about.file_size });
    }
    let folder = cache::folder().join(format!("{}--{}", order.kind, order.id.replace('/', "--")));
    let blobs = folder.join("blobs");
    std::fs::create_dir_all(&blobs).map_err(|error| unwritten(&blobs, error))?;
    let total = files.iter().map(|file| file.size).sum();
    let mut before = 0;
    for file in &files {
        let mut told = Instant::now();
        (order.tell)(before, total);
        let mut tell = |had: u64| {
            if told.elapsed() >= CALM {
                told = Instant::now();
                (order.tell)(before + had, total);
            }
        };
        fetch(repository, order.id, &commit, file, &blobs, &mut tell).await?;
        before += file.size;
    }
    (order.tell)(total, total);
    let snapshot = folder.join("snapshots").join(&commit);
    for file in &files {
        link(&snapshot, file).map_err(|error| unwritten(&snapshot, error))?;
    }
    let name = folder.join("refs").join(revision);
    if revision != commit {
        let written =
            name.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&name, &commit));
        written.map_err(|error| unwritten(&name, error))?;
    }
    Ok(snapshot)
}

fn unwritten(path: &Path, source: std::io::Error) -> FetchError {
    FetchError::NotWritable { path: path.to_owned(), source }
}

/// Brings one blob, from the byte where an earlier attempt was cut off.
async fn fetch<T: RepoType>(
    repository: &HFRepository<T>,
    id: &str,
    commit: &str,
    file: &File,
    blobs: &Path,
    tell: &mut (dyn FnMut(u64) + Send),
) -> Result<(), FetchError> {
    let whole = blobs.join(&file.etag);
    if whole.exists() {
        return Ok(());
    }
    let staging = blobs.join(format!("{}.incomplete", file.etag));
    let options = std::fs::OpenOptions::new().read(true).append(true).create(true).open(&staging);
    let mut part = options.map_err(|error| unwritten(&staging, error))?;
    if rustix::fs::flock(&part, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(FetchError::Busy { id: id.to_owned() });
    }
    let mut fruitless = 0;
    // A server that knows no ranges sends everything again.
    let mut ranges = true;
    loop {
        let had = part.metadata().map_err(|error| unwritten(&staging, error))?.len();
        if had == file.size {
            break;
        }
        if had > file.size || !ranges {
            part.set_len(0).map_err(|error| unwritten(&staging, error))?;
        }
        match append(repository, commit, file, &mut part, tell).await {
            Ok(Appended::Whole) => {}
            Ok(Appended::TooMuch) if ranges => ranges = false,
            Ok(Appended::TooMuch) => return Err(FetchError::Damaged { id: id.to_owned(), file: file.path.clone() }),
            Err(Interrupted::Writing(error)) => return Err(unwritten(&staging, error)),
            Err(Interrupted::Hub(error)) => {
                let now = part.metadata().map_or(0, |about| about.len());
                fruitless = if now > had { 0 } else { fruitless + 1 };
                let error = FetchError::of(format!("the download of {id}: {} at byte {now}", file.path), *error);
                if fruitless >= ATTEMPTS || matches!(error, FetchError::Refused { .. }) {
                    return Err(error);
                }
                tokio::time::sleep(Duration::from_millis(200 << fruitless)).await;
            }
        }
    }
    // Large files are named by the hash of their content.
    if file.etag.len() == 64 && digest(&mut part).map_err(|error| unwritten(&staging, error))? != file.etag {
        let _ = std::fs::remove_file(&staging);
        return Err(FetchError::Damaged { id: id.to_owned(), file: file.path.clone() });
    }
    part.sync_all().and_then(|()| std::fs::rename(&staging, &whole)).map_err(|error| unwritten(&whole, error))
}

enum Appended {
    Whole,
    TooMuch,
}

enum Interrupted {
    Hub(Box<hf_hub::HFError>),
    Writing(std::io::Error),
}

/// Appends what is missing.
async fn append<T: RepoType>(
    repository: &HFRepository<T>,
    commit: &str,
    file: &File,
    part: &mut std::fs::File,
    tell: &mut (dyn FnMut(u64) + Send),
) -> Result<Appended, Interrupted> {
    let hub = |error| Interrupted::Hub(Box::new(error));
    let mut had = part.metadata().map_err(Interrupted::Writing)?.len();
    let range = (had > 0).then_some(had..file.size);
    let stream = repository.download_file_stream().filename(file.path.as_str()).revision(commit).maybe_range(range);
    let (_, mut stream) = stream.send().await.map_err(hub)?;
    while let Some(piece) = poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await {
        let piece = piece.map_err(hub)?;
        if had + piece.len() as u64 > file.size {
            return Ok(Appended::TooMuch);
        }
        part.write_all(&piece).map_err(Interrupted::Writing)?;
        had += piece.len() as u64;
        tell(had);
    }
    if had < file.size {
        let cut = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the connection was closed early");
        return Err(hub(hf_hub::HFError::from(cut)));
    }
    Ok(Appended::Whole)
}

/// SHA-256 in hexadecimal digits.
fn digest(file: &mut std::fs::File) -> std::io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Links a snapshot's file to its blob, by a relative path: the cache may be moved.
fn link(snapshot: &Path, file: &File) -> std::io::Result<()> {
    let path = snapshot.join(&file.path);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let up = "../".repeat(2 + file.path.matches('/').count());
    match std::os::unix::fs::symlink(format!("{up}blobs/{}", file.etag), &path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}
