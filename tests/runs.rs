//! Runs as a user meets them: they outlive terminals, obey commands, and lose nothing when killed.

mod workbench;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use workbench::{
    Bench, assert_whole_checkpoints, events, finish, first_line, kill, name, of_kind, until, until_no_worker,
    until_step, updates, worker,
};

/// Long enough to be interrupted (some seconds, where a signal and a look at the journal take milliseconds), short enough
/// to be waited for.
const LONG: &[&str] = &["train.steps=150", "train.batch=32", "train.save_every=5", "train.eval_every=20"];
/// Goes on until it is stopped.
const ENDLESS: &[&str] = &["train.steps=1000000", "train.batch=4", "train.save_every=0.9", "train.eval_every=0"];

fn assert_same_updates(folder: &std::path::Path, reference: &std::path::Path) {
    let (found, wanted) = (updates(&events(folder)), updates(&events(reference)));
    assert_eq!(found.len(), wanted.len());
    for (step, values) in &wanted {
        assert_eq!(&found[step], values, "update {step} differs from the uninterrupted run");
    }
    let result = |folder: &std::path::Path| std::fs::read(folder.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(result(folder) == result(reference), "the adapters differ");
}

#[test]
fn a_run_goes_to_its_end_and_its_folder_tells_everything() {
    let bench = Bench::new();
    let output = bench.train(&["--json"], &["train.steps=6", "train.batch=4"]);
    assert_eq!(output.code, 0, "{}", output.all());
    let shown = output.events();
    let folder = bench.only_run();
    assert_eq!(shown, events(&folder), "what is shown is what is recorded");
    assert_eq!(shown.first().unwrap()["event"], "started");
    assert_eq!(shown.last().unwrap()["event"], "finished");
    assert_eq!(of_kind(&shown, "step").len(), 6);
    assert!(of_kind(&shown, "eval").len() >= 2, "before the first step and at the end");
    assert!(folder.join("adapter/adapter_config.json").is_file());
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(mode(&folder.join("events.jsonl")), 0o600);
    let spec = std::fs::read_to_string(folder.join("run.toml")).unwrap();
    assert!(spec.contains("learning_rate = 2e-4") && spec.contains("[resolved.data]"), "{spec}");
    let summary = bench.summary(&folder);
    assert_eq!((&summary["state"], &summary["step"]), (&"finished".into(), &6.into()));
    assert_eq!(bench.tune(&["wait", "@last"]).code, 0);
    let log = bench.tune(&["logs", &name(&folder)[..8]]);
    assert!(log.out.contains("step 6/6") && log.out.contains("finished 6 updates"), "{}", log.all());
    assert_eq!(bench.tune(&["resume", "@last"]).code, 2, "a finished run is not resumed");
}

#[test]
fn a_runs_own_file_repeats_it_live_changes_included() {
    let bench = Bench::new();
    let folder = bench.detached(ENDLESS);
    until_step(&folder, 3);
    let changed = bench.tune(&["set", "@last", "learning_rate=1e-3"]);
    assert_eq!(changed.code, 0, "{}", changed.all());
    let change = of_kind(&events(&folder), "changed")[0].clone();
    let step = change["step"].as_u64().unwrap();
    until_step(&folder, step + 3);
    assert_eq!(bench.tune(&["stop", "@last"]).code, 0);
    let first = updates(&events(&folder));
    let file = folder.join("run.toml");
    let again = bench.tune(&["train", "--detach", "--json", file.to_str().unwrap()]).json();
    let again = std::path::PathBuf::from(again["path"].as_str().unwrap());
    until_step(&again, step + 3);
    assert_eq!(bench.tune(&["stop", &name(&again)]).code, 0);
    let second = updates(&events(&again));
    for update in 1..=step + 3 {
        assert_eq!(first[&update], second[&update], "update {update}; the rate was changed after {step}");
    }
    assert_ne!(first[&step].2, first[&(step + 1)].2);
}

#[test]
fn killing_whoever_watches_leaves_the_run_alone() {
    let bench = Bench::new();
    for signal in ["KILL", "HUP"] {
        let mut watcher = bench.spawn_train(&["--json"], LONG);
        assert!(first_line(&mut watcher).contains("started"));
        let folder =
            until("the run", || bench.run_folders().pop().filter(|folder| folder.join("events.jsonl").exists()));
        until_step(&folder, 1);
        assert_ne!(worker(&folder), watcher.id());
        kill(watcher.id(), signal);
        let status = watcher.wait().unwrap();
        if signal == "HUP" {
            assert_eq!(status.code(), Some(0), "a hang-up detaches");
        }
        let waited = bench.tune(&["wait", &name(&folder), "--json"]);
        assert_eq!(waited.code, 0, "{}", waited.all());
        assert_eq!(waited.json()["step"], 150);
        assert_eq!(bench.tune(&["rm", "--yes", &name(&folder)]).code, 0);
    }
}

#[test]
fn a_worker_ignores_the_hang_up_of_its_terminal() {
    let bench = Bench::new();
    let folder = bench.detached(LONG);
    kill(worker(&folder), "HUP");
    assert_eq!(bench.tune(&["wait", "@last"]).code, 0);
}

#[test]
fn a_run_that_is_asked_to_stop_is_saved_and_resumes_bit_for_bit() {
    let bench = Bench::new();
    assert_eq!(bench.train(&["--json"], LONG).code, 0);
    let reference = bench.only_run();
    for signal in ["INT", "TERM"] {
        let watcher = bench.spawn_train(&["--json"], LONG);
        let folder = until("the run", || {
            bench.run_folders().into_iter().find(|folder| *folder != reference && folder.join("events.jsonl").exists())
        });
        until_step(&folder, 7);
        kill(watcher.id(), signal);
        let output = finish(watcher);
        assert_eq!(output.code, 3, "{}", output.all());
        assert_eq!(output.events().last().unwrap()["event"], "stopped");
        assert_whole_checkpoints(&folder);
        let resumed = bench.tune(&["resume", "--json", &name(&folder)]);
        assert_eq!(resumed.code, 0, "{}", resumed.all());
        assert!(of_kind(&resumed.events(), "resumed").len() == 1, "{}", resumed.all());
        assert_same_updates(&folder, &reference);
        assert_eq!(bench.tune(&["rm", "--yes", &name(&folder)]).code, 0);
    }
}

#[test]
fn eight_bit_optimizer_states_resume_bit_for_bit() {
    let bench = Bench::new();
    let settings = [LONG, &["train.optimizer=adamw8bit"]].concat();
    assert_eq!(bench.train(&["--json"], &settings).code, 0);
    let reference = bench.only_run();
    let folder = bench.detached(&settings);
    until_step(&folder, 7);
    assert_eq!(bench.tune(&["stop", &name(&folder)]).code, 0);
    assert_eq!(bench.tune(&["resume", "--json", &name(&folder)]).code, 0);
    assert_same_updates(&folder, &reference);
}

/// On a software adapter, which must be named: `auto` takes another device.
#[test]
fn a_run_on_the_wgsl_engine_is_killed_and_resumes_bit_for_bit() {
    let adapter = tune::backend::wgpu::adapters().into_iter().find(|adapter| adapter.software);
    let adapter = adapter.expect("no software Vulkan adapter: run tests/mesa.sh");
    let bench = Bench::new();
    assert_eq!(bench.train(&["--json"], &["train.steps=1"]).code, 0);
    let auto = bench.only_run();
    assert!(!events(&auto)[0].to_string().contains(&adapter.name), "{}", events(&auto)[0]);
    assert_eq!(bench.tune(&["rm", "--yes", &name(&auto)]).code, 0);

    let device = format!("engine.device=wgpu:{}", adapter.index);
    let short = ["train.steps=60", "train.batch=4", "train.save_every=5", "train.eval_every=8"];
    let settings = [&short[..], &[device.as_str(), "train.optimizer=adamw8bit"]].concat();
    let output = bench.train(&["--json"], &settings);
    assert_eq!(output.code, 0, "{}", output.all());
    let reference = bench.only_run();
    assert!(events(&reference)[0].to_string().contains(&adapter.name), "{}", events(&reference)[0]);
    let folder = bench.detached(&settings);
    until_step(&folder, 7);
    kill(worker(&folder), "KILL");
    until_no_worker(&folder);
    let resumed = bench.tune(&["resume", "--json", &name(&folder)]);
    assert_eq!(resumed.code, 0, "{}", resumed.all());
    assert_same_updates(&folder, &reference);
}

#[test]
fn a_worker_killed_at_any_moment_resumes_bit_for_bit() {
    let bench = Bench::new();
    assert_eq!(bench.train(&["--json"], LONG).code, 0);
    let reference = bench.only_run();
    let folder = bench.detached(LONG);
    let mut state = 0x9e37_79b9_u32;
    let mut kills = 0;
    loop {
        // Steps into this life after which it ends; a pseudo-random moment between two looks at the file.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let lines = events(&folder).len() + 3 + (state >> 28) as usize;
        let over = until("more events", || {
            let events = events(&folder);
            let over = events.last().is_some_and(|event| event["event"] == "finished");
            (over || events.len() >= lines).then_some(over)
        });
        if over {
            break;
        }
        // It may have come to its end since the last look.
        if let Some(holder) = tune::run::lock::holder(&folder.join("worker.lock"))
            && holder.process != 0
        {
            kill(holder.process, "KILL");
        }
        until_no_worker(&folder);
        if events(&folder).last().unwrap()["event"] != "finished" {
            assert_eq!(bench.summary(&folder)["state"], "dead");
            kills += 1;
            let resumed = bench.tune(&["resume", "--detach", &name(&folder)]);
            assert_eq!(resumed.code, 0, "{}", resumed.all());
        }
    }
    assert!(kills >= 3, "the run was killed {kills} times only");
    assert_eq!(bench.tune(&["wait", &name(&folder)]).code, 0);
    assert_whole_checkpoints(&folder);
    assert_same_updates(&folder, &reference);
}

#[test]
fn sigterm_during_a_checkpoint_leaves_whole_checkpoints() {
    let bench = Bench::new();
    let settings = ["train.steps=1000000", "train.batch=4", "train.save_every=1", "train.eval_every=0", "train.keep=3"];
    let folder = bench.detached(&settings);
    for round in 1..=6 {
        // A checkpoint is written after every update: wherever the signal falls, it is in or beside one.
        until("checkpoints", || {
            let events = events(&folder);
            (of_kind(&events, "checkpoint").len() >= 2 * round).then_some(())
        });
        kill(worker(&folder), "TERM");
        assert_eq!(bench.tune(&["wait", "@last"]).code, 3);
        assert_whole_checkpoints(&folder);
        let stopped = events(&folder).last().unwrap().clone();
        assert_eq!(stopped["event"], "stopped");
        assert!(folder.join(format!("checkpoints/step-{}", stopped["step"])).is_dir());
        assert_eq!(bench.tune(&["resume", "--detach", "@last"]).code, 0);
    }
    assert_eq!(bench.tune(&["stop", "@last"]).code, 0);
}

#[test]
fn a_full_disk_at_a_checkpoint_is_told_and_leaves_nothing_half_written() {
    let bench = Bench::new();
    // Files may not grow past 24 KiB: events fit, tensors do not.
    let request = bench.request(&["train.steps=6", "train.batch=4", "train.save_every=2", "method.rank=16"]);
    let arguments: Vec<&str> =
        ["-c", "trap '' XFSZ; ulimit -f 48; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_tune"), "train", "--json"]
            .into_iter()
            .chain(request.iter().map(String::as_str))
            .collect();
    let output = finish(bench.prepare(Command::new("sh"), &bench.home(), &arguments).spawn().unwrap());
    assert_eq!(output.code, 1, "{}", output.all());
    let folder = bench.only_run();
    let shown = output.events();
    let warnings = of_kind(&shown, "warning");
    assert!(
        warnings.iter().any(|event| event["message"].as_str().unwrap().contains("no checkpoint at step 2")),
        "{shown:?}"
    );
    assert_eq!(of_kind(&shown, "step").len(), 6, "training goes on");
    let failed = shown.last().unwrap();
    assert_eq!(failed["event"], "failed");
    assert!(failed["hint"].as_str().unwrap().contains("resume"), "{failed}");
    assert!(!folder.join("adapter").exists());
    assert_whole_checkpoints(&folder);
    // With room again, it goes on.
    let resumed = bench.tune(&["resume", "--json", "@last"]);
    assert_eq!(resumed.code, 0, "{}", resumed.all());
    assert!(folder.join("adapter/adapter_model.safetensors").is_file());
}

/// A home on a file system of one MiB that this process alone sees, which a run fills up: the journal cannot be written
/// either.
#[cfg(target_os = "linux")]
#[test]
fn a_file_system_that_is_full_ends_in_words_and_loses_no_checkpoint() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.home()).unwrap();
    let home = bench.home().to_str().unwrap().to_owned();
    let kept = bench.path().join("kept");
    let allowed = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", &home]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        println!("left out: a full file system needs user namespaces (unshare -rm)");
        return;
    }
    // What is left of the home is copied out before the namespace, and with it the file system, is gone.
    let script = format!(
        "mount -t tmpfs -o size=1m none {home}; \"$@\"; code=$?; df --output=avail {home} | tail -1 >&2; \
         cp -r {home} {}; exit $code",
        kept.display()
    );
    let request = bench.request(&["train.steps=400", "train.batch=4", "train.save_every=20", "train.keep=50"]);
    let arguments: Vec<&str> = ["-rm", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_tune"), "train", "--json"]
        .into_iter()
        .chain(request.iter().map(String::as_str))
        .collect();
    let output = finish(bench.prepare(Command::new("unshare"), &bench.home(), &arguments).spawn().unwrap());
    assert_eq!(output.code, 1, "{}", output.all());
    let text = output.all();
    assert!(text.contains("No space left on device"), "{text}");
    let mut runs = std::fs::read_dir(kept.join("runs")).unwrap().flatten().map(|entry| entry.path());
    let folder = runs.next().expect("the run's folder");
    assert_whole_checkpoints(&folder);
    assert!(!folder.join("adapter").exists());
    // Moved to where there is room, it goes on from the last whole checkpoint.
    let resumed = bench.tune_at(&kept, &["resume", "--json", "@last"]);
    assert_eq!(resumed.code, 0, "{}", resumed.all());
    assert!(folder.join("adapter/adapter_model.safetensors").is_file());
}

#[test]
fn commands_are_carried_out_and_recorded() {
    let bench = Bench::new();
    let folder = bench.detached(ENDLESS);
    until_step(&folder, 2);
    let ok = |arguments: &[&str]| {
        let output = bench.tune(arguments);
        assert_eq!(output.code, 0, "{}", output.all());
        output.out
    };
    assert!(ok(&["pause", "@last"]).contains("paused after step"));
    assert_eq!(bench.summary(&folder)["state"], "paused");
    assert_eq!(bench.tune(&["resume", "@last"]).code, 2, "a living run is not resumed");
    assert_eq!(bench.tune(&["rm", "--yes", "@last"]).code, 2, "a living run is not removed");
    assert!(ok(&["set", "@last", "learning_rate=5e-5"]).contains("to 0.00005"));
    assert!(ok(&["save", "@last"]).contains("checkpoint at step"));
    let paused = updates(&events(&folder)).len();
    assert!(ok(&["continue", "@last"]).contains("continued"));
    assert_eq!(bench.tune(&["continue", "@last"]).code, 2, "a run that is not paused is not continued");
    until_step(&folder, paused as u64 + 1);
    assert!(ok(&["stop", "@last"]).contains("stopped and saved"));
    assert_eq!(bench.tune(&["wait", "@last"]).code, 3);
    let output = bench.tune(&["pause", "@last"]);
    assert_eq!(output.code, 2);
    assert!(output.err.contains("has no living worker") && output.err.contains("tune resume"), "{}", output.err);
    let refused = bench.tune(&["rm", "@last"]);
    assert_eq!(refused.code, 2, "without a terminal nobody can say yes");
    assert!(folder.exists());
    ok(&["rm", "--yes", "@last"]);
    assert!(!folder.exists());
}

#[test]
fn the_control_socket_is_private_and_refuses_nonsense() {
    use std::io::{BufRead, BufReader, Write};
    let bench = Bench::new();
    let folder = bench.detached(ENDLESS);
    until_step(&folder, 1);
    let holder = tune::run::lock::holder(&folder.join("worker.lock")).unwrap();
    let path = holder.socket.unwrap();
    assert!(path.as_os_str().len() <= 100);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut ask = |request: &str| -> serde_json::Value {
        writeln!(&stream, "{request}").unwrap();
        serde_json::from_str(&replies.next().unwrap().unwrap()).unwrap()
    };
    for request in ["nonsense", "{}", "{\"command\":\"dance\"}", "{\"command\":\"set_learning_rate\",\"value\":-1}"] {
        let reply = ask(request);
        assert_eq!(reply["ok"], false, "{request}: {reply}");
        assert!(reply["error"].is_string(), "{reply}");
    }
    let reply = ask("{\"command\":\"status\"}");
    assert_eq!((&reply["ok"], &reply["status"]["state"]), (&true.into(), &"training".into()), "{reply}");
    assert_eq!(reply["status"]["process"], holder.process);
    assert_eq!(ask("{\"command\":\"stop\"}")["ok"], true);
    assert_eq!(bench.tune(&["wait", "@last"]).code, 3);
    assert!(!path.exists(), "the socket goes with its worker");
}

#[test]
fn a_second_run_waits_for_the_device() {
    let bench = Bench::new();
    let first = bench.detached(ENDLESS);
    until_step(&first, 1);
    let second = bench.detached(&["train.steps=2", "train.batch=4"]);
    let queued =
        until("its turn to wait", || of_kind(&events(&second), "queued").first().map(|event| (*event).clone()));
    assert_eq!(queued["behind"], name(&first));
    assert_eq!(bench.summary(&second)["state"], "queued");
    let third = bench.detached(&["train.steps=2", "train.batch=4"]);
    until("its turn to wait", || (!of_kind(&events(&third), "queued").is_empty()).then_some(()));
    assert_eq!(bench.tune(&["stop", &name(&third)]).code, 0, "a waiting run can be stopped");
    assert_eq!(bench.tune(&["stop", &name(&first)]).code, 0);
    assert_eq!(bench.tune(&["wait", &name(&second)]).code, 0);
    assert!(of_kind(&events(&third), "started").is_empty());
}

#[test]
fn runs_are_found_by_prefix_word_and_last() {
    let bench = Bench::new();
    let folders: Vec<_> = (0..2)
        .map(|_| {
            assert_eq!(bench.train(&["--json"], &["train.steps=1", "train.batch=4"]).code, 0);
            bench.run_folders()
        })
        .collect();
    let (first, second) =
        (name(&folders[0][0]), name(folders[1].iter().find(|folder| !folders[0].contains(folder)).unwrap()));
    let found = |run: &str| bench.tune(&["wait", "--json", run]).json()["run"].clone();
    assert_eq!(found(&first), first);
    assert_eq!(found("@last"), std::cmp::max(&first, &second).as_str());
    let ambiguous = bench.tune(&["wait", &first[..3]]);
    assert_eq!(ambiguous.code, 2);
    assert!(ambiguous.err.contains(&first) && ambiguous.err.contains(&second), "{}", ambiguous.err);
    assert!(bench.tune(&["wait", "nothing"]).err.contains("no run nothing"));
    let compared = bench.tune(&["compare", &first, &second]);
    assert!(
        compared.out.contains("held-out loss") && compared.out.contains("training loss: a is"),
        "{}",
        compared.all()
    );
    let difference = bench.tune(&["compare", "--json", &first, &second]).json();
    assert_eq!(difference["runs"][0]["train"], difference["runs"][1]["train"], "the same seed gives the same losses");
}

#[test]
fn two_may_watch_and_a_visitor_leaves_without_harm() {
    let bench = Bench::new();
    let folder = bench.detached(LONG);
    let mut visitor = bench.command(&["attach", "@last"]).spawn().unwrap();
    first_line(&mut visitor);
    let follower = bench.command(&["logs", "--follow", "--json", "@last"]).spawn().unwrap();
    until_step(&folder, 1);
    kill(visitor.id(), "INT");
    let left = finish(visitor);
    assert_eq!(left.code, 0, "{}", left.all());
    let followed = finish(follower);
    assert_eq!(followed.code, 0, "{}", followed.all());
    assert_eq!(followed.events(), events(&folder));
    assert_eq!(bench.summary(&folder)["state"], "finished");
}

#[test]
fn stopping_now_loses_what_is_not_saved_and_says_so() {
    let bench = Bench::new();
    let folder = bench.detached(ENDLESS);
    until_step(&folder, 2);
    let output = bench.tune(&["stop", "--now", "@last"]);
    assert_eq!(output.code, 0, "{}", output.all());
    assert!(output.out.contains("nothing was saved"), "{}", output.out);
    assert_eq!(bench.summary(&folder)["state"], "stopped");
}

#[test]
fn the_journal_is_read_in_pieces_and_past_broken_lines() {
    use tune::run::{Event, EventReader, EventWriter};
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("events.jsonl");
    let mut writer = EventWriter::open(&path).unwrap();
    let step = |step: u64| Event::Step {
        step,
        epoch: 0.5,
        loss: f64::NAN,
        grad_norm: 0.25,
        learning_rate: 2e-4,
        tokens: 10,
        label_tokens: 5,
        padding: 0,
        tokens_per_second: 1e3,
        seconds: 0.01,
        vram_bytes: 1 << 40,
    };
    let mut reader = None;
    for number in 1..=3 {
        writer.append(step(number)).unwrap();
        let reader = reader.get_or_insert_with(|| EventReader::open(&path).unwrap());
        let record = reader.next_record().unwrap().unwrap();
        assert!(matches!(record.event, Event::Step { step, loss, .. } if step == number && loss.is_nan()));
        assert!(reader.next_record().unwrap().is_none());
    }
    drop(writer);
    // A worker died in the middle of a line; the next one goes on behind the last whole line.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&whole[..], b"not json\n{\"time\":\"2026"].concat()).unwrap();
    let mut reader = reader.unwrap();
    assert!(reader.next_record().unwrap().is_none());
    assert_eq!(reader.skipped, 1);
    EventWriter::open(&path).unwrap().append(Event::Paused { step: 4 }).unwrap();
    assert_eq!(reader.next_record().unwrap().unwrap().event, Event::Paused { step: 4 });
    let end = std::fs::metadata(&path).unwrap().len();
    let mut tail = EventReader::open_at(&path, end - 10).unwrap();
    assert!(tail.next_record().unwrap().is_none(), "the end of a line is no line");
    assert_eq!(EventReader::open_at(&path, whole.len() as u64).unwrap().count(), 1);
}
