//! The interface on a pseudo-terminal, with a terminal's own parser at the other end.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use portable_pty::{Child, CommandBuilder, PtySize, native_pty_system};

pub const PATIENCE: Duration = Duration::from_secs(120);

/// The interface on a terminal of 100x30.
pub struct Workbench {
    parser: vt100::Parser,
    pub output: Receiver<Vec<u8>>,
    input: Box<dyn Write + Send>,
    child: Box<dyn Child + Send + Sync>,
    /// Everything that was written.
    pub bytes: Vec<u8>,
}

impl Workbench {
    pub fn open(home: &Path, arguments: &[&str]) -> Self {
        Self::open_in(home, arguments, &[])
    }

    pub fn open_in(home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::open_program(Path::new(env!("CARGO_BIN_EXE_tune")), home, arguments, environment)
    }

    /// Another program in its place.
    pub fn open_program(program: &Path, home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let size = PtySize { rows: 30, cols: 100, pixel_width: 0, pixel_height: 0 };
        let pair = native_pty_system().openpty(size).unwrap();
        let mut command = CommandBuilder::new(program);
        command.args(arguments);
        command.cwd(home);
        for (name, value) in [("TERM", "xterm-256color"), ("LANG", "C.UTF-8")] {
            command.env(name, value);
        }
        for name in ["TUNE_HOME", "TUNE_CONFIG", "HF_HOME"] {
            command.env(name, home);
        }
        for (name, value) in environment {
            command.env(name, value);
        }
        for name in ["NO_COLOR", "LC_ALL", "LC_CTYPE", "HF_HUB_CACHE", "HF_TOKEN"] {
            command.env_remove(name);
        }
        let child = pair.slave.spawn_command(command).unwrap();
        drop(pair.slave);
        let mut reader = pair.master.try_clone_reader().unwrap();
        let input = pair.master.take_writer().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let _master = pair.master;
            let mut buffer = vec![0; 65536];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let parser = vt100::Parser::new(30.try_into().unwrap(), 100.try_into().unwrap(), 0);
        Self { parser, output, input, child, bytes: Vec::new() }
    }

    pub fn screen(&self) -> String {
        self.parser.screen().contents()
    }

    pub fn take(&mut self, bytes: Vec<u8>) {
        self.parser.process(&bytes);
        self.bytes.extend(bytes);
    }

    /// Reads until the screen shows this.
    pub fn see(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.screen().contains(text) {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.take(bytes),
                Err(error) => panic!("no \"{text}\" ({error}) on:\n{}", self.screen()),
            }
        }
    }

    /// Presses again and again until the screen shows this: for a key whose list may still be on its way.
    pub fn press_until(&mut self, keys: &str, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.screen().contains(text) {
            assert!(Instant::now() < end, "no \"{text}\" on:\n{}", self.screen());
            self.press(keys);
            let pause = Instant::now() + Duration::from_secs(3);
            while !self.screen().contains(text) {
                match self.output.recv_timeout(pause.saturating_duration_since(Instant::now())) {
                    Ok(bytes) => self.take(bytes),
                    Err(_) => break,
                }
            }
        }
    }

    pub fn press(&mut self, keys: &str) {
        self.input.write_all(keys.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    /// Waits until the process has ended and reads what it wrote last. Gives its exit status.
    pub fn end(&mut self) -> portable_pty::ExitStatus {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "it did not end:\n{}", self.screen());
            if let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(20)) {
                self.take(bytes);
            }
        };
        // All that it wrote lies in the terminal by now; the end of the output is not waited for, as it may have
        // left children on the terminal.
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(2000)) {
            self.take(bytes);
        }
        status
    }

    pub fn process(&self) -> u32 {
        self.child.process_id().unwrap()
    }

    pub fn signal(&self, name: &str) {
        let process = self.process().to_string();
        assert!(Command::new("kill").args([name, &process]).status().unwrap().success());
    }

    /// Reads for as long as this, as a terminal does that nobody looks at.
    pub fn watch(&mut self, span: Duration) {
        let end = Instant::now() + span;
        while let Ok(bytes) = self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.take(bytes);
        }
    }

    /// Whether the terminal is as it was: alternate screen left, cursor shown, paste as before.
    pub fn is_restored(&self) -> bool {
        let screen = self.parser.screen();
        !screen.alternate_screen() && !screen.hide_cursor() && !screen.bracketed_paste()
    }
}

impl Drop for Workbench {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}
