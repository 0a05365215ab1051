//! Writing and reading `events.jsonl`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{Event, Record};

/// Appends events. Only the holder of the worker lock has one.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    length: u64,
}

impl EventWriter {
    /// Opens for appending; a line that a killed worker left half-written is cut off.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = std::fs::OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut length = file.metadata()?.len();
        let whole = whole_lines(&file, length)?;
        if whole < length {
            file.set_len(whole)?;
            length = whole;
        }
        Ok(Self { file, length })
    }

    /// Appends one line, in one write. When the disk is full, what was written of the line is taken back.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn append(&mut self, event: Event) -> std::io::Result<Record> {
        let record = Record { time: super::event::now(), event };
        let mut line = serde_json::to_vec(&record).map_err(std::io::Error::other)?;
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += line.len() as u64;
        Ok(record)
    }
}

/// Length of the file up to and with its last newline.
fn whole_lines(file: &File, length: u64) -> std::io::Result<u64> {
    let mut block = vec![0; 1 << 16];
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.read_exact_at(part, start)?;
        if let Some(at) = part.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Bytes asked of the file system at a time.
const BLOCK: usize = 1 << 20;

/// Reads events first to last and then, asked again, those added since. A last line without its newline is left
/// for the next time; a line that is no event is passed over and counted.
#[derive(Debug)]
pub struct EventReader {
    file: File,
    buffer: Vec<u8>,
    /// Where the next line starts in `buffer`.
    at: usize,
    /// Where `buffer` starts in the file.
    origin: u64,
    /// Lines passed over.
    pub skipped: u64,
}

impl EventReader {
    /// # Errors
    /// Those of the file system; [`NotFound`](std::io::ErrorKind::NotFound) before the worker's first event.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self { file: File::open(path)?, buffer: Vec::new(), at: 0, origin: 0, skipped: 0 })
    }

    /// Starts at the first line that begins at or after `offset` bytes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open_at(path: &Path, offset: u64) -> std::io::Result<Self> {
        let mut reader = Self::open(path)?;
        if offset > 0 {
            reader.origin = offset - 1;
            // The rest of the line that `offset` lies in, or the newline before it.
            reader.line()?;
        }
        Ok(reader)
    }

    /// Bytes of the file that have been read and handed out.
    pub fn offset(&self) -> u64 {
        self.origin + self.at as u64
    }

    /// The next event; none when there is no further whole line yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn next_record(&mut self) -> std::io::Result<Option<Record>> {
        loop {
            let Some((start, end)) = self.line()? else { return Ok(None) };
            let line = &self.buffer[start..end];
            if let Some(record) = Record::parse(line) {
                return Ok(Some(record));
            }
            self.skipped += u64::from(!line.is_empty());
        }
    }

    /// The next event as it stands in the file, without its newline.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn next_line(&mut self) -> std::io::Result<Option<&[u8]>> {
        Ok(self.line()?.map(|(start, end)| &self.buffer[start..end]))
    }

    fn line(&mut self) -> std::io::Result<Option<(usize, usize)>> {
        loop {
            if let Some(length) = memchr::memchr(b'\n', &self.buffer[self.at..]) {
                let start = self.at;
                self.at += length + 1;
                return Ok(Some((start, start + length)));
            }
            // A pending half line is read again: its writer may have died and the next one cut it off.
            let pending = self.buffer.len() - self.at;
            self.origin += self.at as u64;
            self.at = 0;
            self.buffer.resize(BLOCK + pending, 0);
            let mut filled = 0;
            while filled < self.buffer.len() {
                match self.file.read_at(&mut self.buffer[filled..], self.origin + filled as u64) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            self.buffer.truncate(filled);
            if memchr::memchr(b'\n', &self.buffer).is_none() && filled < BLOCK + pending {
                return Ok(None);
            }
        }
    }
}

impl Iterator for EventReader {
    type Item = std::io::Result<Record>;

    /// Ends at the last whole line; may be asked again later.
    fn next(&mut self) -> Option<Self::Item> {
        self.next_record().transpose()
    }
}
