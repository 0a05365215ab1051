//! Starting a worker that outlives its terminal.
//!
//! The worker gets a process group of its own, then a session of its own, and no file of the terminal. That is
//! enough against a hang-up. A login manager may end all processes of a session at log-out: where the user's
//! service manager outlives the log-out (lingering is on) the worker is put under it; where it does not, being
//! under it would end the worker for sure, so it stays outside and the user is told if the login manager kills.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{EventReader, RunError, RunFolder, lock};

/// Longest wait for a new worker to hold its lock.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts a run's worker and waits until it lives (or has already ended). Gives what the user should know.
///
/// # Errors
/// When the worker cannot be started, or another one has the run.
pub fn start(folder: &RunFolder) -> Result<Option<String>, RunError> {
    if lock::holder(&folder.lock_path()).is_some() {
        return Err(RunError::Busy { id: folder.id() });
    }
    let before = length(folder);
    let executable = std::env::current_exe()?;
    let keeper = Keeper::find();
    if keeper == Keeper::UserManager {
        let mut command = Command::new("systemd-run");
        let unit = format!("--unit=tune-{}-{}", folder.id(), std::process::id());
        command.args(["--user", "--scope", "--quiet", "--collect", &unit, "--"]).arg(&executable);
        if run_and_wait(command, folder, before).is_ok() {
            return Ok(None);
        }
    }
    run_and_wait(Command::new(&executable), folder, before)?;
    Ok(match keeper {
        Keeper::NotNeeded => None,
        Keeper::UserManager => Some(
            "`systemd-run --user` refused the run: it may end at log-out, and `tune resume` goes on from there"
                .to_owned(),
        ),
        Keeper::Nobody => Some(
            "the login manager ends the run at log-out; `loginctl enable-linger` lets runs go on after it".to_owned(),
        ),
    })
}

fn run_and_wait(mut command: Command, folder: &RunFolder, before: u64) -> Result<(), RunError> {
    let log = || {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(folder.log_path());
        file.map_err(|source| RunError::NotWritable { path: folder.path().to_owned(), source })
    };
    command.arg("worker").arg(folder.path()).current_dir(folder.path());
    command.stdin(Stdio::null()).stdout(log()?).stderr(log()?).process_group(0);
    let mut child = command.spawn()?;
    let started = Instant::now();
    loop {
        if lock::holder(&folder.lock_path()).is_some_and(|holder| holder.process != 0) || length(folder) > before {
            // Reaps a launcher that has already gone; one that has not is left alone.
            let _ = child.try_wait();
            return Ok(());
        }
        if let Some(status) = child.try_wait()?
            && !status.success()
        {
            return Err(RunError::NoWorker { id: folder.id(), log: folder.log_path() });
        }
        if started.elapsed() > PATIENCE {
            return Err(RunError::NoWorker { id: folder.id(), log: folder.log_path() });
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

fn length(folder: &RunFolder) -> u64 {
    std::fs::metadata(folder.events_path()).map(|file| file.len()).unwrap_or(0)
}

/// Leaves the launcher's process group and session. A group's leader cannot make a session, so it starts itself
/// once more, and that process can.
///
/// # Errors
/// When the second process cannot be started.
pub fn leave_session(folder: &Path) -> Result<Session, RunError> {
    if rustix::process::setsid().is_ok() {
        return Ok(Session::Own);
    }
    let process = rustix::process::getpid();
    if rustix::process::getsid(None).is_ok_and(|session| session == process) {
        return Ok(Session::Own);
    }
    Command::new(std::env::current_exe()?).arg("worker").arg(folder).spawn()?;
    Ok(Session::Delegated)
}

/// Whether this process is the one to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    Own,
    /// Another process was started for it.
    Delegated,
}

/// What keeps a worker alive at log-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeper {
    /// Nothing ends it.
    NotNeeded,
    /// The user's service manager, which lingers.
    UserManager,
    /// The login manager kills and nothing lingers.
    Nobody,
}

impl Keeper {
    fn find() -> Self {
        let manager = std::env::var_os("XDG_RUNTIME_DIR").map(|folder| PathBuf::from(folder).join("systemd/private"));
        if !manager.is_some_and(|socket| socket.exists()) {
            return Keeper::NotNeeded;
        }
        let property = |arguments: &[&str]| {
            let output = Command::new("busctl").args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output();
            output.ok().filter(|output| output.status.success()).map(|output| output.stdout == b"b true\n")
        };
        let login = "org.freedesktop.login1";
        let user = format!("/org/freedesktop/login1/user/_{}", rustix::process::getuid().as_raw());
        if property(&["get-property", login, &user, "org.freedesktop.login1.User", "Linger"]) == Some(true) {
            return Keeper::UserManager;
        }
        let manager = ["get-property", login, "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
        match property(&[&manager[..], &["KillUserProcesses"]].concat()) {
            Some(true) => Keeper::Nobody,
            _ => Keeper::NotNeeded,
        }
    }
}

/// Ends a run's worker at once, without saving. What was recorded and the checkpoints stay.
///
/// # Errors
/// When no worker lives, or it is not ours to end.
pub fn kill(folder: &RunFolder) -> Result<(), RunError> {
    let silent = || RunError::NotRunning { id: folder.id() };
    let holder = lock::holder(&folder.lock_path()).ok_or_else(silent)?;
    let process = i32::try_from(holder.process).ok().and_then(rustix::process::Pid::from_raw).ok_or_else(silent)?;
    rustix::process::kill_process(process, rustix::process::Signal::KILL).map_err(std::io::Error::from)?;
    let started = Instant::now();
    while lock::holder(&folder.lock_path()).is_some() {
        if started.elapsed() > PATIENCE {
            return Err(RunError::Busy { id: folder.id() });
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

/// Records that a killed run was stopped on purpose: at the last step its events tell of.
///
/// # Errors
/// When its events cannot be written, or a worker has the run.
pub fn record_kill(folder: &RunFolder) -> Result<(), RunError> {
    let holder = lock::Holder { run: folder.id(), process: std::process::id(), socket: None };
    let Some(_lock) = lock::Lock::take(&folder.lock_path(), &holder)? else {
        return Err(RunError::Busy { id: folder.id() });
    };
    let mut step = 0;
    if let Ok(reader) = EventReader::open(&folder.events_path()) {
        for record in reader.map_while(Result::ok) {
            if let super::Event::Step { step: done, .. } | super::Event::Resumed { step: done, .. } = record.event {
                step = done;
            }
        }
    }
    let saved = folder.checkpoint_steps().pop();
    let path = saved.map(|step| folder.checkpoints().join(format!("step-{step}")));
    let reason = match saved {
        Some(saved) => format!("stopped at once; step {saved} is saved"),
        None => "stopped at once; nothing was saved".to_owned(),
    };
    super::EventWriter::open(&folder.events_path())?.append(super::Event::Stopped { step, path, reason })?;
    Ok(())
}
