//! The background: slow things happen here, and their results come back as messages.

mod catalog;
pub mod chat;
pub mod device;
mod forecast;
mod machine;
mod preview;
mod runs;

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::message::{Message, Request};
use crate::spec::RunSpec;

/// Hands work to threads: one for each kind, so that a slow kind holds up only itself.
pub struct Background {
    sender: Sender<Message>,
    catalog: Sender<Request>,
    preview: Sender<Request>,
    forecast: Sender<Request>,
    runs: Sender<Request>,
    downloads: Sender<Request>,
    examine: Sender<Request>,
    follower: runs::Follower,
    monitor: machine::MonitorThread,
    chat: chat::ChatProcess,
}

impl Background {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub fn start(sender: Sender<Message>) -> std::io::Result<Self> {
        Ok(Self {
            catalog: thread("catalog", sender.clone(), |requests, sender| {
                for request in requests {
                    catalog::perform(request, sender);
                }
            })?,
            downloads: thread("downloads", sender.clone(), |requests, sender| {
                for request in requests {
                    catalog::perform(request, sender);
                }
            })?,
            examine: thread("examine", sender.clone(), |requests, sender| {
                while let Some(request) = latest(&requests) {
                    catalog::perform(request, sender);
                }
            })?,
            preview: thread("preview", sender.clone(), |requests, sender| {
                while let Some(request) = latest(&requests) {
                    preview::perform(request, sender);
                }
            })?,
            forecast: thread("forecast", sender.clone(), |requests, sender| {
                let mut forecaster = forecast::Forecaster::default();
                while let Some(request) = latest(&requests) {
                    forecaster.perform(request, sender);
                }
            })?,
            runs: thread("runs", sender.clone(), |requests, sender| {
                for request in requests {
                    runs::perform(request, sender);
                }
            })?,
            follower: runs::Follower::default(),
            monitor: machine::MonitorThread::default(),
            chat: chat::ChatProcess::default(),
            sender,
        })
    }

    /// Takes a request on; never blocks.
    pub fn perform(&mut self, request: Request) {
        // A thread that is gone has panicked; its message was printed, and its requests have no answer.
        let _ = match request {
            Request::ListModels | Request::ListFiles => self.catalog.send(request),
            Request::SearchHub(..) | Request::Download(..) => self.downloads.send(request),
            Request::Examine(_) => self.examine.send(request),
            Request::Preview { .. } => self.preview.send(request),
            Request::Forecast { .. } => self.forecast.send(request),
            Request::Open(run) => {
                self.follower.open(run, self.sender.clone());
                Ok(())
            }
            Request::Monitor(on) => {
                self.monitor.switch(on, self.sender.clone());
                Ok(())
            }
            Request::Chat { run, prompt } => {
                self.chat.ask(run, prompt, self.sender.clone());
                Ok(())
            }
            Request::LeaveChat => {
                self.chat.stop();
                Ok(())
            }
            Request::Save { path, text } => {
                let message = match write_whole(&path, &text) {
                    Ok(()) => Message::Done(format!("saved {}", path.display())),
                    Err(error) => Message::Wrong(format!("{} was not saved: {error}", path.display())),
                };
                let _ = self.sender.send(message);
                Ok(())
            }
            Request::Load(path) => {
                let message = match RunSpec::read(&path, &[]) {
                    Ok(spec) => Message::Loaded { path: Some(path), spec: Box::new(spec) },
                    Err(error) => Message::Wrong(error.to_string()),
                };
                let _ = self.sender.send(message);
                Ok(())
            }
            Request::ListRuns
            | Request::Compare(..)
            | Request::Send { .. }
            | Request::Start(_)
            | Request::Resume(_)
            | Request::Remove(_)
            | Request::StopAt { .. }
            | Request::Export { .. }
            | Request::LoadRun(_) => self.runs.send(request),
            Request::Copy(_) | Request::Redraw | Request::Suspend => Ok(()),
        };
    }
}

/// Starts a thread that works requests off.
fn thread(
    name: &str,
    sender: Sender<Message>,
    work: impl FnOnce(Receiver<Request>, &Sender<Message>) + Send + 'static,
) -> std::io::Result<Sender<Request>> {
    let (requests, receiver) = channel();
    std::thread::Builder::new().name(name.into()).spawn(move || work(receiver, &sender))?;
    Ok(requests)
}

/// The latest request waiting; older ones have no answer, as nobody waits for it any more.
fn latest(requests: &Receiver<Request>) -> Option<Request> {
    let mut request = requests.recv().ok()?;
    while let Ok(newer) = requests.try_recv() {
        request = newer;
    }
    Some(request)
}

/// Writes a file under a temporary name and renames it: nobody sees half of it.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let mut staging = path.as_os_str().to_owned();
    staging.push(".new");
    std::fs::write(&staging, text)?;
    std::fs::rename(&staging, path)
}
