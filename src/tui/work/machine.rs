//! Samples of GPU and host, once a second, while somebody looks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use crate::monitor::Monitor;
use crate::tui::message::Message;

/// The thread that samples, if it was ever needed.
#[derive(Default)]
pub struct MonitorThread {
    wanted: Option<(Arc<AtomicBool>, std::thread::Thread)>,
}

impl MonitorThread {
    /// Switches sampling on or off.
    pub fn switch(&mut self, on: bool, sender: Sender<Message>) {
        if let Some((wanted, thread)) = &self.wanted {
            wanted.store(on, Ordering::Relaxed);
            thread.unpark();
            return;
        }
        if !on {
            return;
        }
        let wanted = Arc::new(AtomicBool::new(true));
        let seen = wanted.clone();
        let spawned = std::thread::Builder::new().name("monitor".into()).spawn(move || {
            let mut monitor = Monitor::open();
            loop {
                while !seen.load(Ordering::Relaxed) {
                    std::thread::park();
                }
                if sender.send(Message::Machine(Box::new(monitor.sample()))).is_err() {
                    return;
                }
                std::thread::park_timeout(Duration::from_secs(1));
            }
        });
        if let Ok(handle) = spawned {
            self.wanted = Some((wanted, handle.thread().clone()));
        }
    }
}
