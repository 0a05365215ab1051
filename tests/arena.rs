//! The arena is sound: sharing memory between transient buffers changes no bit of any result, and nothing reads
//! a buffer that is dead.

mod tiny;

use tiny::{TOKENS, lora, session, step};
use tune::backend::cpu::{CpuSession, Dead, Layout, Options};
use tune::backend::{Session, read_values};
use tune::model::{Method, Recompute};
use tune::program::Kind;

/// Every persistent f32 buffer after `steps` updates and an evaluation.
fn results(session: &mut CpuSession, steps: usize) -> Vec<(String, Vec<u32>)> {
    for _ in 0..steps {
        step(session);
    }
    let evaluate = session.plan().workload.program(&format!("evaluate.{TOKENS}")).expect("a program");
    session.run(evaluate).expect("runs");
    let kinds = [Kind::Adapter, Kind::Weight, Kind::Gradient, Kind::Optimizer, Kind::Output, Kind::Scalar];
    let workload = &session.plan().workload;
    let buffers: Vec<_> = kinds.into_iter().flat_map(|kind| workload.of_kind(kind)).collect();
    let named: Vec<_> = buffers.into_iter().map(|(id, buffer)| (id, buffer.name.clone())).collect();
    named.into_iter().map(|(id, name)| (name, read_values(session, id).expect("read"))).collect()
}

fn for_each_workload(check: impl Fn(&Method, Recompute)) {
    for method in [lora(), Method::Full] {
        for recompute in [Recompute::None, Recompute::Cheap, Recompute::All] {
            check(&method, recompute);
        }
    }
}

fn assert_same(expected: &[(String, Vec<u32>)], found: &[(String, Vec<u32>)]) {
    for ((name, expected), (_, found)) in expected.iter().zip(found) {
        assert_eq!(expected, found, "{name} differs");
    }
    let (_, losses) = expected.iter().find(|(name, _)| name.ends_with("losses")).expect("losses");
    assert!(losses.iter().any(|&loss| f32::from_bits(loss) > 1.0), "nothing was computed");
}

#[test]
fn results_are_the_same_bits_with_every_buffer_apart() {
    for_each_workload(|method, recompute| {
        let expected = results(&mut session(method, recompute, Options::default()), 3);
        let apart = Options { layout: Layout::Apart, ..Options::default() };
        assert_same(&expected, &results(&mut session(method, recompute, apart), 3));
    });
}

#[test]
fn dead_memory_filled_with_nan_changes_nothing() {
    for_each_workload(|method, recompute| {
        let expected = results(&mut session(method, recompute, Options::default()), 3);
        let poisoned = Options { dead: Dead::Poisoned, ..Options::default() };
        assert_same(&expected, &results(&mut session(method, recompute, poisoned), 3));
    });
}
