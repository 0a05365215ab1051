//! The program itself in a pseudo-terminal, by keyboard alone, with the embedded model.

mod hub_server;
mod pty;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hub_server::{COMMIT, HubServer};
use pty::{PATIENCE, Workbench};

fn tune(home: &Path, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_tune"))
        .args(arguments)
        .env("TUNE_HOME", home)
        .current_dir(home)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_five_steps_and_a_run_that_outlives_its_interface() {
    let home = tempfile::tempdir().unwrap();
    let mut first = Workbench::open(home.path(), &[]);
    first.see("demo");
    first.press("\r");
    first.see("Files");
    first.press_until("\r", "What is tune?");
    first.press("\r");
    first.see("(estimates)");
    // A rate that is too high is warned of, and one key mends it.
    first.press("/learning_rate\r\r\x151e-3\r");
    first.see("is high for lora");
    // Warnings of the data come before it.
    while !first.screen().contains("▸ 1e-3 is high") {
        first.press("w");
        let bytes = first.output.recv_timeout(PATIENCE).unwrap();
        first.take(bytes);
    }
    first.press("f");
    first.see("train.learning_rate = 2e-4");
    // Long enough to be still there when it is needed.
    first.press("/\x15steps\r\r\x15100000\r");
    first.see("100,000");
    first.press("s");
    first.see("running");
    first.see("smooth");
    first.signal("-KILL");
    first.end();

    let listed = tune(home.path(), &["runs"]);
    assert!(listed.contains("training"), "{listed}");
    let mut second = Workbench::open(home.path(), &["attach", "@last"]);
    second.see("running");
    second.press("p");
    second.see("paused");
    second.press("p");
    second.see("goes on");
    second.press("r\x155e-5\r");
    second.see("train.learning_rate from 0.0002 to 0.00005");
    second.press("s");
    second.see("checkpoint");
    second.press("x");
    second.see("Save a checkpoint and stop the run?");
    second.press("y");
    second.see("stopped");
    second.press("\r");
    second.see("Result");
    second.press("cWhat is tune?\r");
    second.see("you:");
    let end = Instant::now() + PATIENCE;
    // Both answers are whole when another question is taken.
    while !second.screen().contains("▸ Again?") {
        assert!(Instant::now() < end, "{}", second.screen());
        second.press("\x15Again?\r");
        while let Ok(bytes) = second.output.recv_timeout(Duration::from_millis(300)) {
            second.take(bytes);
        }
    }
    second.press("\x1b");
    second.see("held-out loss");
    second.press("e\x15exported\r");
    second.see("copied to exported");
    assert!(home.path().join("exported/adapter_config.json").is_file());
    second.press("q");
    assert!(second.end().success());
    assert!(second.is_restored());
}

/// Drivers map compilers and hold memory of the card: devices are looked up in another process.
#[test]
fn the_interface_opens_no_driver() {
    let home = tempfile::tempdir().unwrap();
    let mut workbench = Workbench::open(home.path(), &[]);
    // What fits is known: devices were looked up.
    workbench.see("lora fits: ");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", workbench.process())).unwrap();
    for library in ["libvulkan", "libLLVM", "libcuda.so", "libnvrtc", "libcublas"] {
        assert!(!maps.contains(library), "{library} is mapped into the interface");
    }
    let found = Command::new(env!("CARGO_BIN_EXE_tune")).args(["choose", "cpu", "auto"]).output().unwrap();
    assert!(String::from_utf8(found.stdout).unwrap().starts_with("{\"Ok\":{\"device\":\"Cpu\""));
}

#[test]
fn a_signal_that_can_be_caught_restores_the_terminal() {
    for signal in ["-TERM", "-HUP", "-INT", "-QUIT"] {
        let home = tempfile::tempdir().unwrap();
        let mut workbench = Workbench::open(home.path(), &[]);
        // From the first byte on, and while adapters are looked for in the background.
        workbench.see("1 Model");
        assert!(!workbench.is_restored());
        workbench.signal(signal);
        let status = workbench.end();
        assert!(workbench.is_restored(), "{signal}");
        assert!(status.success(), "{signal}: {status:?}");
    }
}

/// Set for the copy of this test that plays an interface with a mistake in it.
const PANICS: &str = "TUNE_TEST_PANICS";

#[test]
fn a_panic_in_any_thread_restores_the_terminal_and_says_why() {
    if std::env::var_os(PANICS).is_some() {
        let _taken = tune::tui::terminal::Takeover::new().unwrap();
        let _ = std::thread::spawn(|| panic!("a mistake was made")).join();
        unreachable!("the panic ends the process");
    }
    let home = tempfile::tempdir().unwrap();
    let this = std::env::current_exe().unwrap();
    let arguments = ["--exact", "a_panic_in_any_thread_restores_the_terminal_and_says_why", "--nocapture"];
    let mut interface = Workbench::open_program(&this, home.path(), &arguments, &[(PANICS, "1")]);
    let status = interface.end();
    assert_eq!(status.exit_code(), 101);
    let written = String::from_utf8_lossy(&interface.bytes).into_owned();
    assert!(written.contains("\x1b[?1049h") && interface.is_restored(), "{written}");
    let (_, after) = written.split_once("\x1b[?1049l").unwrap();
    assert!(after.contains("a mistake was made"), "after the screen is given back: {after}");
}

#[test]
fn a_wrong_keymap_is_named_before_the_terminal_is_taken() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("keymap.toml"), "[train]\nfly = \"x\"\n").unwrap();
    let mut workbench = Workbench::open(home.path(), &[]);
    workbench.end();
    assert!(workbench.screen().contains("no command \"fly\""), "{}", workbench.screen());
    assert!(workbench.is_restored());
}

#[test]
fn a_model_of_the_hub_is_found_fetched_and_chosen() {
    let server = HubServer::start();
    let home = tempfile::tempdir().unwrap();
    let mut workbench = Workbench::open_in(home.path(), &[], &[("HF_ENDPOINT", &server.address)]);
    workbench.see("fits");
    workbench.press("h");
    workbench.see("search the hub");
    workbench.press("llama\r");
    workbench.see("tiny/llama");
    workbench.see("4,321");
    // Its configuration alone says whether it fits.
    workbench.see("lora fits: ");
    let asked = server.asked();
    assert!(asked.iter().any(|asked| asked.line.starts_with("GET /api/models?search=llama")), "{asked:?}");
    assert!(
        asked.iter().any(|asked| asked.line.contains("/tiny/llama/resolve/") && asked.line.contains("config.json"))
    );
    assert!(
        !asked.iter().any(|asked| asked.line.contains("safetensors?") || asked.line.ends_with(".safetensors")),
        "{asked:?}"
    );
    workbench.press("\r");
    workbench.see("tiny/llama is here");
    let snapshot = home.path().join("hub/models--tiny--llama/snapshots").join(COMMIT);
    assert!(snapshot.join("config.json").is_file() && snapshot.join("tokenizer.json").is_file());
    workbench.press("1");
    workbench.see("cache");
    // And a dataset for it.
    workbench.press("2h");
    workbench.see("search the hub");
    workbench.press("rows\r");
    workbench.see("hub 765");
    workbench.press("\r");
    workbench.see("= question");
    workbench.see("what is");
    let snapshot = home.path().join("hub/datasets--tiny--rows/snapshots").join(COMMIT);
    assert!(snapshot.join("train.jsonl").is_file());
    assert!(server.asked().iter().any(|asked| asked.line.starts_with("GET /api/datasets?search=rows")));
}

#[test]
fn offline_the_hub_is_not_asked() {
    let server = HubServer::start();
    let home = tempfile::tempdir().unwrap();
    let environment = [("HF_ENDPOINT", server.address.as_str()), ("HF_HUB_OFFLINE", "1")];
    let mut workbench = Workbench::open_in(home.path(), &[], &environment);
    workbench.see("fits");
    workbench.press("hllama\r");
    workbench.see("HF_HUB_OFFLINE is set");
    assert!(server.asked().is_empty());
}
