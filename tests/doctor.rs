//! `tune doctor` on a machine with a driver and no libraries of NVIDIA's, as most rented ones are: with stand-ins for the driver
//! and for what a package manager brings.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A machine with an NVIDIA card.
struct Machine {
    folder: tempfile::TempDir,
}

/// What a run of the program said.
struct Said {
    text: String,
    succeeded: bool,
}

impl Machine {
    /// None, with a line, where the loader finds real libraries: they would be found here too.
    fn new(test: &str) -> Option<Self> {
        let machine = Self { folder: tempfile::tempdir().expect("a folder") };
        machine.library("loader/libcuda.so.1", "-DDRIVER");
        machine.library("packages/nvidia-cuda-nvrtc/libnvrtc.so.13", "-DNVRTC=120");
        machine.library("packages/nvidia-cublas/libcublasLt.so.13", "-DCUBLASLT");
        std::fs::create_dir_all(machine.path("run")).expect("a folder");
        // uv pip install --target FOLDER PACKAGE
        machine.script("uv", "mkdir -p \"$4/nvidia/cu13/lib\" && cp \"$PACKAGES/${5%%<*}/\"* \"$4/nvidia/cu13/lib/\"");
        if machine.tune(&["doctor"], &[]).text.contains("missing NVRTC") {
            return Some(machine);
        }
        println!("left out: {test} needs a machine without NVIDIA's libraries");
        None
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Builds a stand-in.
    fn library(&self, name: &str, macros: &str) {
        let (path, source) =
            (self.path(name), Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nvidia_stub.c"));
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        // NVIDIA's libraries have their names in them, by which the loader knows those that are loaded.
        let own = format!("-Wl,-soname,{}", path.file_name().expect("a name").display());
        let flags = ["-shared", "-fPIC", "-w", &own, macros, "-o"];
        let status = Command::new("cc").args(flags).arg(&path).arg(source).status();
        assert!(status.expect("a C compiler").success());
    }

    fn script(&self, name: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path("programs").join(name);
        std::fs::create_dir_all(self.path("programs")).expect("a folder");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a program");
    }

    fn tune(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Said {
        let output = Command::new(env!("CARGO_BIN_EXE_tune"))
            .args(arguments)
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", self.path("programs").display()))
            .env("HOME", self.folder.path())
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("LD_LIBRARY_PATH", self.path("loader"))
            .env("PACKAGES", self.path("packages"))
            .envs(variables.iter().copied())
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Said { text: text.into_owned(), succeeded: output.status.success() }
    }
}

fn has(said: &Said, parts: &[&str]) {
    for part in parts {
        assert!(said.text.contains(part), "`{part}` is missing in:\n{}", said.text);
    }
}

#[test]
fn what_is_missing_is_brought_after_asking_and_is_there_then() {
    let Some(machine) = Machine::new("bringing libraries") else { return };
    let before = machine.tune(&["doctor"], &[]);
    has(&before, &["RTX 5090 cannot be used", "missing cuBLASLt", "tune doctor --fix"]);
    let asked = machine.tune(&["doctor", "--fix"], &[]);
    has(
        &asked,
        &["nvidia-cuda-nvrtc<14 and nvidia-cublas<14", "about 505 MB", "uv pip install --target", "bring these?"],
    );
    assert!(!asked.succeeded && !machine.path("data/tune/nvidia-libraries").exists());
    let brought = machine.tune(&["doctor", "--fix", "--yes"], &[]);
    assert!(brought.succeeded, "{}", brought.text);
    let after = machine.tune(&["doctor"], &[]);
    has(&after, &["runs go to NVIDIA GeForce RTX 5090", "cuda can be used", "nvidia-libraries"]);
    has(&machine.tune(&["doctor", "--fix"], &[]), &["nothing to bring"]);
}

#[test]
fn a_compiler_older_than_the_card_is_passed_over_and_named() {
    let Some(machine) = Machine::new("an old compiler") else { return };
    machine.library("python/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13", "-DNVRTC=90");
    let python = machine.path("python").display().to_string();
    let variables = [("VIRTUAL_ENV", python.as_str())];
    let said = machine.tune(&["doctor"], &variables);
    has(
        &said,
        &["missing NVRTC", "does not know NVIDIA GeForce RTX 5090 (compute capability 12.0)", "tune doctor --fix"],
    );
    assert!(machine.tune(&["doctor", "--fix", "--yes"], &variables).succeeded);
    has(&machine.tune(&["doctor"], &variables), &["cuda can be used"]);
}

#[test]
fn a_package_manager_that_brings_nothing_is_found_out() {
    let Some(machine) = Machine::new("a package manager") else { return };
    machine.script("uv", "exit 0");
    let said = machine.tune(&["doctor", "--fix", "--yes"], &[]);
    has(&said, &["NVRTC is not where it was to be put"]);
    assert!(!said.succeeded);
    machine.script("uv", "echo broken >&2; exit 3");
    has(&machine.tune(&["doctor", "--fix", "--yes"], &[]), &["broken", "failed", "without uv it is `pip install"]);
}

#[test]
fn nothing_is_brought_for_a_card_that_cannot_use_it() {
    let Some(machine) = Machine::new("an old card") else { return };
    let old = [("STUB_MAJOR", "7")];
    has(&machine.tune(&["doctor", "--fix"], &old), &["nothing to bring", "compute capability 7.0", "--device wgpu"]);
    has(&machine.tune(&["doctor"], &old), &["of no use here", "8.0 and newer do"]);
    has(&machine.tune(&["doctor", "--fix"], &[("STUB_DRIVER", "11080")]), &["nothing to bring", "CUDA 11.8", "12.0"]);
}
