//! Runs under a login manager, played by scripts in the places of `busctl` and `systemd-run`.

mod workbench;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use workbench::{Bench, Output, events, finish, until_step, worker};

const RUN: &[&str] = &["train.steps=1000000", "train.batch=4", "train.save_every=0.9", "train.eval_every=0"];

/// A machine with a user's service manager.
struct Login {
    bench: Bench,
    folder: tempfile::TempDir,
}

impl Login {
    /// What the login manager answers, and whether `systemd-run` works.
    fn new(linger: bool, kill: bool, works: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        script(
            "busctl",
            format!("case \"$*\" in *Linger) echo b {linger};; *KillUserProcesses) echo b {kill};; *) exit 1;; esac"),
        );
        let log = folder.path().join("asked");
        let then = if works { "while [ \"$1\" != -- ]; do shift; done; shift; exec \"$@\"" } else { "exit 1" };
        script("systemd-run", format!("echo \"$*\" >> {}; {then}", log.display()));
        let runtime = folder.path().join("run");
        std::fs::create_dir_all(runtime.join("systemd")).unwrap();
        std::fs::set_permissions(&runtime, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(runtime.join("systemd/private"), "").unwrap();
        Self { bench: Bench::new(), folder }
    }

    /// Starts a run in the background.
    fn start(&self) -> (Output, PathBuf) {
        let request = self.bench.request(RUN);
        let arguments: Vec<&str> =
            ["train", "--detach", "--json"].into_iter().chain(request.iter().map(String::as_str)).collect();
        let mut command = self.bench.command(&arguments);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.folder.path().display()));
        command.env("XDG_RUNTIME_DIR", self.folder.path().join("run"));
        let output = finish(command.spawn().unwrap());
        assert_eq!(output.code, 0, "{}", output.all());
        let folder = PathBuf::from(output.json()["path"].as_str().unwrap());
        (output, folder)
    }

    /// What `systemd-run` was asked.
    fn asked(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("asked")).unwrap_or_default()
    }
}

#[test]
fn where_the_user_lingers_the_run_is_put_under_the_users_manager() {
    let login = Login::new(true, true, true);
    let (output, folder) = login.start();
    until_step(&folder, 1);
    let asked = login.asked();
    let unit = format!("--unit=tune-{}-", workbench::name(&folder));
    for part in ["--user", "--scope", "--collect", unit.as_str(), " worker "] {
        assert!(asked.contains(part), "no {part} in {asked}");
    }
    assert!(!output.err.contains("log-out"), "{}", output.err);
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(worker(&folder) as i32)).unwrap();
    assert_eq!(session.as_raw_nonzero().get() as u32, worker(&folder), "a session of its own");
}

#[test]
fn where_nobody_lingers_and_the_login_manager_kills_the_user_is_warned() {
    let login = Login::new(false, true, true);
    let (output, folder) = login.start();
    until_step(&folder, 1);
    assert!(output.err.contains("loginctl enable-linger"), "{}", output.err);
    assert_eq!(login.asked(), "", "under a manager that ends at log-out it would end for sure");
}

#[test]
fn where_the_login_manager_does_not_kill_nothing_is_said() {
    let login = Login::new(false, false, true);
    let (output, folder) = login.start();
    until_step(&folder, 1);
    assert!(!output.err.contains("log-out") && login.asked().is_empty(), "{}", output.err);
}

#[test]
fn a_refusal_of_the_users_manager_does_not_stop_the_run() {
    let login = Login::new(true, true, false);
    let (output, folder) = login.start();
    until_step(&folder, 1);
    assert!(output.err.contains("may end at log-out"), "{}", output.err);
    assert_eq!(events(&folder).iter().filter(|event| event["event"] == "started").count(), 1);
}
