//! A server that speaks as much of the hub's protocol as search and download need, on loopback.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// What opens `tiny/gated`.
pub const TOKEN: &str = "hf_not_a_real_token";

/// What happens to the next weights that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Trouble {
    None,
    /// The connection is closed after half of the bytes.
    Cut,
    /// Nothing comes after half of the bytes, and the connection stays.
    Stall,
    /// A byte is wrong.
    Damage,
    /// Ranges are not understood from now on: everything is sent again.
    NoRanges,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Method and path.
    pub line: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

pub struct HubServer {
    pub address: String,
    asked: Receiver<Asked>,
    trouble: Arc<AtomicU8>,
}

impl HubServer {
    /// Serves `tiny/llama` and `tiny/gated` (the fixture's model) and the dataset `tiny/rows`.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (sender, asked) = channel();
        let trouble = Arc::new(AtomicU8::new(Trouble::None as u8));
        let shared = trouble.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (sender, trouble) = (sender.clone(), shared.clone());
                std::thread::spawn(move || serve(stream, &sender, &trouble));
            }
        });
        Self { address, asked, trouble }
    }

    pub fn trouble(&self, trouble: Trouble) {
        self.trouble.store(trouble as u8, Ordering::SeqCst);
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.try_iter().collect()
    }
}

pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama")
}

fn rows() -> Vec<u8> {
    (0..40)
        .map(|row| format!("{{\"question\":\"what is {row}?\",\"answer\":\"it is {row}\"}}\n"))
        .collect::<String>()
        .into()
}

/// Content of a repository's file.
fn content(repository: &str, name: &str) -> Option<Vec<u8>> {
    match (repository, name) {
        ("datasets/tiny/rows", "train.jsonl") => Some(rows()),
        ("datasets/tiny/rows", "README.md" | "train.parquet") => Some(b"not for training".to_vec()),
        ("tiny/llama" | "tiny/gated", name) => std::fs::read(model().join(name)).ok(),
        _ => None,
    }
}

fn names(repository: &str) -> Option<Vec<String>> {
    match repository {
        "datasets/tiny/rows" => Some(["train.jsonl", "README.md", "train.parquet"].map(str::to_owned).to_vec()),
        "tiny/llama" | "tiny/gated" => {
            let entries = std::fs::read_dir(model()).ok()?.flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            Some(names.filter(|name| name != "golden.safetensors").collect())
        }
        _ => None,
    }
}

/// As the hub: a hash of the content for large files, another one of 40 digits for the rest.
fn etag(name: &str, bytes: &[u8]) -> String {
    let digits: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if name.ends_with(".safetensors") { digits } else { digits[..40].to_owned() }
}

fn serve(mut stream: TcpStream, sender: &Sender<Asked>, trouble: &AtomicU8) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut request = String::new();
    reader.read_line(&mut request).ok()?;
    let (method, path) = request.trim_end().rsplit_once(' ')?.0.split_once(' ')?;
    let (mut range, mut token) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    let _ = sender.send(Asked { line: format!("{method} {path}"), range: range.clone(), token: token.clone() });
    let path = path.split('?').next()?;
    if path.contains("tiny/gated") && token.as_deref() != Some(TOKEN) {
        let head =
            "HTTP/1.1 401 Unauthorized\r\nX-Error-Code: GatedRepo\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return stream.write_all(head.as_bytes()).ok();
    }
    let mut head = format!("X-Repo-Commit: {COMMIT}\r\nConnection: close\r\n");
    let Some((repository, file)) = path.strip_prefix('/')?.split_once("/resolve/") else {
        let answer = api(path);
        let status = if answer.is_some() { "200 OK" } else { "404 Not Found" };
        let body = answer.unwrap_or_else(|| "[]".into());
        head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{head}\r\n",
            body.len()
        );
        return stream.write_all((head + &body).as_bytes()).ok();
    };
    let name = file.split_once('/')?.1;
    let Some(bytes) = content(repository, name) else {
        return stream.write_all(format!("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n{head}\r\n").as_bytes()).ok();
    };
    head.push_str(&format!("ETag: \"{}\"\r\nAccept-Ranges: bytes\r\n", etag(name, &bytes)));
    let weights = method == "GET" && name.ends_with(".safetensors");
    let is = |wanted: Trouble| weights && trouble.load(Ordering::SeqCst) == wanted as u8;
    let from =
        range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse::<usize>().ok());
    let (status, mut bytes) = match from.filter(|_| !is(Trouble::NoRanges)) {
        Some(from) => ("206 Partial Content", bytes[from..].to_vec()),
        None => ("200 OK", bytes),
    };
    head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{head}\r\n", bytes.len());
    stream.write_all(head.as_bytes()).ok()?;
    if method == "HEAD" {
        return Some(());
    }
    if is(Trouble::Damage) {
        bytes[100] ^= 1;
    }
    if is(Trouble::Cut) || is(Trouble::Stall) {
        stream.write_all(&bytes[..bytes.len() / 2]).ok()?;
        if is(Trouble::Cut) {
            trouble.store(Trouble::None as u8, Ordering::SeqCst);
            return Some(());
        }
        let never = Condvar::new();
        let forever = Mutex::new(());
        drop(never.wait(forever.lock().ok()?));
    }
    stream.write_all(&bytes).ok()
}

/// Answers of the hub's JSON interface.
fn api(path: &str) -> Option<String> {
    match path {
        "/api/models" => Some(
            r#"[{"id":"tiny/llama","downloads":4321,"tags":["license:mit"],"config":{"model_type":"llama"},
                "safetensors":{"parameters":{"F32":100000},"total":100000}}]"#
                .into(),
        ),
        "/api/datasets" => Some(r#"[{"id":"tiny/rows","downloads":765,"tags":["license:cc0-1.0"]}]"#.into()),
        path => {
            let (repository, _) = path.strip_prefix("/api/")?.split_once("/tree/")?;
            let repository = repository.strip_prefix("models/").unwrap_or(repository);
            let entry = |name: &String| {
                let size = content(repository, name).map_or(0, |bytes| bytes.len());
                format!(r#"{{"type":"file","path":"{name}","size":{size},"oid":"{name}"}}"#)
            };
            Some(format!("[{}]", names(repository)?.iter().map(entry).collect::<Vec<_>>().join(",")))
        }
    }
}
