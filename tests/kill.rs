//! Signals at random moments, to the interface and to the worker: no run is lost.

mod pty;
mod workbench;

use std::collections::BTreeMap;
use std::time::Duration;

use pty::Workbench;
use workbench::{
    Bench, assert_checkpoints_open, assert_whole_checkpoints, events, kill, of_kind, until, until_no_worker,
    until_step, worker,
};

/// Goes on until it is stopped, and saves all the time.
const RUN: &[&str] =
    &["train.steps=1000000", "train.batch=4", "train.save_every=4", "train.eval_every=9", "train.keep=3"];
const MOMENTS: usize = 50;

/// The moments: the same ones every time, as far as a clock can.
struct Moments(u64);

impl Moments {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    /// Most within the start of a process, where it is least ready.
    fn span(&mut self) -> Duration {
        let most = if self.below(3) == 0 { 400 } else { 60 };
        Duration::from_millis(self.below(most))
    }
}

#[test]
fn fifty_signals_at_random_moments_lose_no_run() {
    let bench = Bench::new();
    let folder = bench.detached(RUN);
    let home = bench.home();
    let open = || Workbench::open(&home, &["attach", "@last"]);
    let mut interface = open();
    let mut moments = Moments(7);
    let mut sent = BTreeMap::new();
    for _ in 0..MOMENTS {
        let to_interface = moments.below(2) == 0;
        let signal = ["HUP", "TERM", "KILL"][moments.below(3) as usize];
        *sent.entry((to_interface, signal)).or_insert(0) += 1;
        interface.watch(moments.span());
        if to_interface {
            let process = worker(&folder);
            interface.signal(&format!("-{signal}"));
            interface.end();
            assert!(signal == "KILL" || interface.is_restored(), "{signal}");
            assert_eq!(worker(&folder), process, "the worker does not mind");
            interface = open();
            continue;
        }
        let process = worker(&folder);
        kill(process, signal);
        if signal == "HUP" {
            let before = of_kind(&events(&folder), "step").len();
            until("more steps", || (of_kind(&events(&folder), "step").len() > before).then_some(()));
            assert_eq!(worker(&folder), process, "a hang-up is not for a process that has no terminal");
            continue;
        }
        until_no_worker(&folder);
        assert_checkpoints_open(&folder);
        let state = bench.summary(&folder)["state"].clone();
        assert_eq!(state, if signal == "KILL" { "dead" } else { "stopped" });
        let resumed = bench.tune(&["resume", "--detach", "@last"]);
        assert_eq!(resumed.code, 0, "{}", resumed.all());
    }
    assert_eq!(sent.len(), 6, "{sent:?}");
    // The last interface still follows.
    let last = events(&folder).iter().filter_map(|event| event["step"].as_u64()).max().unwrap_or(0);
    until_step(&folder, last + 2);
    interface.see("running");
    assert_eq!(bench.tune(&["stop", "@last"]).code, 0);
    interface.see("stopped");
    interface.press("q");
    assert!(interface.end().success());
    assert_eq!(bench.only_run(), folder);
    assert_whole_checkpoints(&folder);

    // No update is missing, and those that were done again after a kill came out the same, to the last bit.
    let mut updates: BTreeMap<u64, String> = BTreeMap::new();
    let mut at = 0;
    for event in events(&folder) {
        if event["event"] == "resumed" {
            let step = event["step"].as_u64().unwrap();
            assert!(step <= at, "resumed at {step}, and {at} was the last");
            at = step;
        } else if event["event"] == "started" && at > 0 && updates.len() as u64 == at {
            at = 0;
        } else if event["event"] == "step" {
            let step = event["step"].as_u64().unwrap();
            assert_eq!(step, at + 1);
            at = step;
            let figures = format!("{} {} {}", event["loss"], event["grad_norm"], event["learning_rate"]);
            assert_eq!(updates.entry(step).or_insert_with(|| figures.clone()), &figures, "update {step} repeated");
        }
    }
    assert_eq!(updates.len() as u64, *updates.keys().last().unwrap());
}
