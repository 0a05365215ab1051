//! Models and datasets of the hub, against a local server that speaks its protocol.

mod hub_server;
mod workbench;

use std::path::PathBuf;
use std::process::Command;

use hub_server::{Asked, COMMIT, HubServer, TOKEN, Trouble};
use workbench::{Bench, Output, finish, kill, until};

/// The program with this server as its hub and its own cache.
fn command(bench: &Bench, server: &HubServer, arguments: &[&str]) -> Command {
    let mut command = bench.command(arguments);
    command.env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE").env_remove("HF_TOKEN");
    command.env("HF_HOME", bench.path().join("hf")).env("HF_ENDPOINT", &server.address);
    command
}

fn plan(bench: &Bench, server: &HubServer, model: &str) -> Output {
    finish(command(bench, server, &planned(model)).spawn().unwrap())
}

fn planned(model: &str) -> [&str; 9] {
    let (device, length) = ("engine.device=cpu", "data.max_length=64");
    ["plan", "--model", model, "--data", "tiny/rows", "--set", device, "--set", length]
}

fn folder(bench: &Bench, repository: &str) -> PathBuf {
    bench.path().join("hf/hub").join(repository)
}

/// Requests for the weights themselves.
fn of_weights(asked: &[Asked]) -> Vec<&Asked> {
    asked.iter().filter(|asked| asked.line.starts_with("GET ") && asked.line.ends_with("model.safetensors")).collect()
}

#[test]
fn what_a_run_names_on_the_hub_is_fetched_once() {
    let (bench, server) = (Bench::new(), HubServer::start());
    let first = plan(&bench, &server, "tiny/llama");
    assert_eq!(first.code, 0, "{}", first.all());
    assert!(first.err.contains("fetching tiny/llama") && first.err.contains("fetching tiny/rows"), "{}", first.err);
    let model = folder(&bench, "models--tiny--llama");
    assert_eq!(std::fs::read_to_string(model.join("refs/main")).unwrap(), COMMIT);
    let weights = model.join("snapshots").join(COMMIT).join("model.safetensors");
    assert!(std::fs::read(&weights).unwrap() == std::fs::read(hub_server::model().join("model.safetensors")).unwrap());
    assert!(std::fs::read_link(&weights).unwrap().starts_with("../../blobs"), "as Python's client links");
    let rows = folder(&bench, "datasets--tiny--rows").join("snapshots").join(COMMIT);
    assert!(rows.join("train.jsonl").is_file() && !rows.join("train.parquet").exists());
    let asked = server.asked();
    assert!(!asked.iter().any(|asked| asked.line.contains("golden.json")), "only what training needs: {asked:?}");
    let second = plan(&bench, &server, "tiny/llama");
    assert_eq!((second.code, second.err.contains("fetching")), (0, false), "{}", second.all());
    assert!(server.asked().is_empty(), "what is here is not asked for");
}

#[test]
fn a_connection_that_is_cut_goes_on_at_its_byte() {
    let (bench, server) = (Bench::new(), HubServer::start());
    server.trouble(Trouble::Cut);
    let output = plan(&bench, &server, "tiny/llama");
    assert_eq!(output.code, 0, "{}", output.all());
    let asked = server.asked();
    let size = std::fs::metadata(hub_server::model().join("model.safetensors")).unwrap().len();
    let ranges: Vec<_> = of_weights(&asked).iter().map(|asked| asked.range.clone()).collect();
    assert_eq!(ranges, [None, Some(format!("bytes={}-{}", size / 2, size - 1))]);
}

#[test]
fn a_download_that_was_killed_goes_on_at_its_byte() {
    let (bench, server) = (Bench::new(), HubServer::start());
    let size = std::fs::metadata(hub_server::model().join("model.safetensors")).unwrap().len();
    let part = || {
        let blobs = std::fs::read_dir(folder(&bench, "models--tiny--llama/blobs")).ok()?.flatten();
        let incomplete = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "incomplete");
        blobs
            .map(|entry| entry.path())
            .find(incomplete)
            .filter(|path| path.metadata().is_ok_and(|part| part.len() == size / 2))
    };
    server.trouble(Trouble::Stall);
    let mut killed = command(&bench, &server, &planned("tiny/llama")).spawn().unwrap();
    until("half of the weights", part);
    let busy = plan(&bench, &server, "tiny/llama");
    assert!(busy.err.contains("being fetched by another process"), "{}", busy.all());
    kill(killed.id(), "KILL");
    killed.wait().unwrap();
    assert!(!folder(&bench, "models--tiny--llama/snapshots").exists(), "nothing has its name before it is whole");
    server.asked();
    server.trouble(Trouble::None);
    let output = plan(&bench, &server, "tiny/llama");
    assert_eq!(output.code, 0, "{}", output.all());
    let asked = server.asked();
    assert_eq!(of_weights(&asked).len(), 1);
    assert_eq!(of_weights(&asked)[0].range, Some(format!("bytes={}-{}", size / 2, size - 1)));
    assert_eq!(part(), None);
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let (bench, server) = (Bench::new(), HubServer::start());
    server.trouble(Trouble::Stall);
    let mut killed = command(&bench, &server, &planned("tiny/llama")).spawn().unwrap();
    let blobs = folder(&bench, "models--tiny--llama/blobs");
    let half = || {
        let names = std::fs::read_dir(&blobs).ok()?.flatten();
        names.map(|entry| entry.path()).find(|path| {
            path.extension().is_some_and(|ending| ending == "incomplete")
                && path.metadata().is_ok_and(|part| part.len() > 10_000)
        })
    };
    until("a part of the weights", half);
    kill(killed.id(), "KILL");
    killed.wait().unwrap();
    server.trouble(Trouble::NoRanges);
    let output = plan(&bench, &server, "tiny/llama");
    assert_eq!(output.code, 0, "{}", output.all());
}

#[test]
fn weights_that_came_wrong_are_not_kept() {
    let (bench, server) = (Bench::new(), HubServer::start());
    server.trouble(Trouble::Damage);
    let output = plan(&bench, &server, "tiny/llama");
    assert_eq!(output.code, 1, "{}", output.all());
    assert!(output.err.contains("model.safetensors of tiny/llama did not come as the hub has it"), "{}", output.err);
    server.trouble(Trouble::None);
    assert_eq!(plan(&bench, &server, "tiny/llama").code, 0);
}

#[test]
fn a_gated_model_needs_a_token_and_the_token_is_never_shown() {
    let (bench, server) = (Bench::new(), HubServer::start());
    let refused = plan(&bench, &server, "tiny/gated");
    assert_eq!(refused.code, 2, "{}", refused.all());
    assert!(refused.err.contains("the hub refused") && refused.err.contains("HF_TOKEN"), "{}", refused.err);
    server.asked();
    let mut command = command(&bench, &server, &planned("tiny/gated"));
    let opened = finish(command.env("HF_TOKEN", TOKEN).spawn().unwrap());
    assert_eq!(opened.code, 0, "{}", opened.all());
    assert!(server.asked().iter().all(|asked| asked.token.as_deref() == Some(TOKEN)));
    assert!(!opened.all().contains(TOKEN));
}

#[test]
fn offline_the_hub_is_not_asked_and_the_message_says_what_is_missing() {
    let (bench, server) = (Bench::new(), HubServer::start());
    let mut command = command(&bench, &server, &planned("tiny/llama"));
    let output = finish(command.env("HF_HUB_OFFLINE", "1").spawn().unwrap());
    assert_eq!(output.code, 2, "{}", output.all());
    assert!(output.err.contains("no model tiny/llama in the Hugging Face cache"), "{}", output.err);
    assert!(server.asked().is_empty());
}

#[test]
fn what_the_hub_has_not_is_said() {
    let (bench, server) = (Bench::new(), HubServer::start());
    let output = plan(&bench, &server, "tiny/nothing");
    assert_eq!(output.code, 2, "{}", output.all());
    assert!(output.err.contains("tiny/nothing"), "{}", output.err);
}
