//! The arena is sound: sharing memory between transient buffers changes no bit of any result, nothing reads a
//! buffer that is dead, and nothing is allocated once a step has run.

mod tiny;

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tiny::{TOKENS, lora, session, step};
use tune::backend::cpu::{CpuSession, Dead, Layout, Options};
use tune::backend::{Session, read_values};
use tune::model::{Method, Recompute};
use tune::program::{Access, Kind, Op, Role};

/// Counts allocations that no message or list would make.
struct Counting;

const LARGE: usize = 64 << 10;
static LARGE_ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: passes every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        if layout.size() >= LARGE {
            LARGE_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Allocation) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time, so that allocations are counted for one alone.
static ALONE: Mutex<()> = Mutex::new(());

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
        for recompute in [
            Recompute::None,
            Recompute::Cheap,
            Recompute::All,
            Recompute::Offload,
            Recompute::AllButAttention,
            Recompute::OffloadWithAttention,
        ] {
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
    let _alone = ALONE.lock();
    for_each_workload(|method, recompute| {
        let expected = results(&mut session(method, recompute, Options::default()), 3);
        let apart = Options { layout: Layout::Apart, ..Options::default() };
        assert_same(&expected, &results(&mut session(method, recompute, apart), 3));
    });
}

#[test]
fn dead_memory_filled_with_nan_changes_nothing() {
    let _alone = ALONE.lock();
    for_each_workload(|method, recompute| {
        let expected = results(&mut session(method, recompute, Options::default()), 3);
        let poisoned = Options { dead: Dead::Poisoned, ..Options::default() };
        assert_same(&expected, &results(&mut session(method, recompute, poisoned), 3));
    });
}

#[test]
fn nothing_large_is_allocated_after_the_first_step() {
    let _alone = ALONE.lock();
    let mut session = session(&lora(), Recompute::None, Options::default());
    step(&mut session);
    let before = LARGE_ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..3 {
        step(&mut session);
    }
    assert_eq!(LARGE_ALLOCATIONS.load(Ordering::Relaxed), before);
}

/// A copy between device and host may run beside what follows, up to a wait that names both its ends: until then nothing
/// writes its source, and nothing touches its result.
#[test]
fn copies_to_the_host_and_back_are_waited_for() {
    let _alone = ALONE.lock();
    let cases = [lora(), Method::Full]
        .into_iter()
        .flat_map(|method| [(method.clone(), Recompute::Offload, 1), (method, Recompute::OffloadWithAttention, 2)]);
    for (method, recompute, tensors) in cases {
        let session = session(&method, recompute, Options::default());
        let workload = &session.plan().workload;
        let mut copies = 0;
        for program in &workload.programs {
            for (start, step) in program.steps.iter().enumerate() {
                let Op::Cast { pairs } = &step.op else { continue };
                for &(from, to) in pairs {
                    if ![from, to].iter().any(|&id| workload.buffer(id).kind == Kind::Offload) {
                        continue;
                    }
                    copies += 1;
                    let later = &program.steps[start + 1..];
                    let waits = |op: &Op| matches!(op, Op::Wait { buffers } if buffers.contains(&from) && buffers.contains(&to));
                    let wait = later.iter().position(|step| waits(&step.op)).expect("a wait");
                    for step in &later[..wait] {
                        let touched = step.op.accesses();
                        let safe =
                            touched.iter().all(|&(id, access)| id != to && (id != from || access == Access::Read));
                        assert!(safe, "{} touches a copy on its way", step.name);
                    }
                }
            }
        }
        let hosts = workload.of_kind(Kind::Offload);
        let kept = hosts.filter(|(_, buffer)| buffer.name.contains("layers.0.")).count();
        let micros = workload.programs.iter().filter(|program| program.role == Role::Micro).count();
        assert_eq!(kept, tensors * micros);
        assert_eq!(copies, 2 * workload.of_kind(Kind::Offload).count());
    }
}
