//! `tune demo` and `tune chat`, through the program itself.

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;

/// The program with a home of its own, on the CPU.
fn tune(home: &Path) -> Command {
    let mut command = Command::cargo_bin("tune").unwrap();
    command.env("TUNE_HOME", home).env_remove("NO_COLOR");
    command
}

fn chat(home: &Path, target: &str, arguments: &[&str], lines: &str) -> Output {
    let device: &[&str] = if arguments.contains(&"--device") { &[] } else { &["--device", "cpu"] };
    let mut command = tune(home);
    command.args(["chat", target]).args(device).args(arguments).write_stdin(lines).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_demo_learns_and_leaves_a_run_that_can_be_talked_to() {
    let home = tempfile::tempdir().unwrap();
    let output = tune(home.path()).args(["demo", "--device", "cpu"]).output().unwrap();
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{shown}\n{}", text(&output.stderr));
    let loss = |name: &str| -> f64 {
        let line = shown.lines().find(|line| line.starts_with(name) && line.contains("held-out loss")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(loss("after") < 0.5 * loss("before"), "{shown}");
    assert_eq!(shown.matches("\n  before  ").count(), 3, "{shown}");
    assert!(shown.lines().any(|line| line.starts_with("  after   ") && line.contains("Rust")), "{shown}");

    let question = "What programming language is tune written in?\n";
    let tuned = chat(home.path(), "@last", &[], question);
    assert_eq!(tuned.status.code(), Some(0), "{}", text(&tuned.stderr));
    assert!(text(&tuned.stdout).contains("Rust"), "{}", text(&tuned.stdout));
    let base = chat(home.path(), "@last", &["--base", "--max-tokens", "40"], question);
    assert_ne!(text(&base.stdout), text(&tuned.stdout));

    let runs = tune(home.path()).args(["runs", "--json"]).output().unwrap();
    assert!(text(&runs.stdout).contains("finished"), "{}", text(&runs.stdout));
}

#[test]
fn piped_lines_are_answered_one_by_one_without_prompts() {
    let home = tempfile::tempdir().unwrap();
    let arguments = ["--max-tokens", "6"];
    let output = chat(home.path(), "demo", &arguments, "Hello\n\nTell me more\n/quit\nnever read\n");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(!text(&output.stdout).contains("> "));
    let again = chat(home.path(), "demo", &arguments, "Hello\nTell me more\n");
    assert_eq!(output.stdout, again.stdout);
    let once = chat(home.path(), "demo", &arguments, "Hello\n");
    assert!(again.stdout.starts_with(&once.stdout) && again.stdout.len() > once.stdout.len());
}

#[test]
fn a_reset_forgets_what_was_said() {
    let home = tempfile::tempdir().unwrap();
    let arguments = ["--max-tokens", "12"];
    let once = text(&chat(home.path(), "demo", &arguments, "Hello\n").stdout);
    let twice = text(&chat(home.path(), "demo", &arguments, "Hello\n/reset\nHello\n").stdout);
    assert_eq!(twice, format!("{once}{once}"));
}

#[test]
fn a_seed_repeats_a_sampled_answer() {
    let home = tempfile::tempdir().unwrap();
    let say = |seed: &str| {
        let arguments = ["--temperature", "1.5", "--max-tokens", "24", "--seed", seed];
        chat(home.path(), "demo", &arguments, "Tell a story\n").stdout
    };
    assert_eq!(say("1"), say("1"));
    assert_ne!(say("1"), say("2"));
}

#[test]
fn bad_requests_name_what_is_wrong_and_exit_with_2() {
    let home = tempfile::tempdir().unwrap();
    for (target, arguments, expected) in [
        ("demo", &["--top-p", "0"][..], "top-p is 0"),
        ("demo", &["--context", "100000"], "1024"),
        ("no-such-thing", &[], "no-such-thing"),
        ("@last", &[], "no runs"),
        ("demo", &["--device", "abacus"], "abacus"),
    ] {
        let output = chat(home.path(), target, arguments, "Hello\n");
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{target} {arguments:?}: {message}");
        assert!(message.contains(expected), "{target} {arguments:?}: {message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn chat_answers_as_transformers_does() {
    let folder = std::env::var_os("TUNE_SMOLLM2")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m"), PathBuf::from);
    if !folder.join("config.json").exists() {
        println!("left out: no SmolLM2 at {}; tests/run.sh makes it", folder.display());
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let output = chat(home.path(), folder.to_str().unwrap(), &[], "What is the capital of France?\n");
    assert_eq!(text(&output.stdout), "The capital of France is Paris.\n", "{}", text(&output.stderr));
}
