//! Every operation of the CPU engine against its f64 twin.

mod twin;

use std::ops::Range;
use std::sync::Arc;

use tune::backend::{EngineError, Session, WeightSource, cpu, cuda};
use tune::program::plan::plan;
use tune::program::{BufferId, Op, Placement, Plan};

fn open(plan: Plan, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Session>, EngineError> {
    Ok(Box::new(cpu::open(plan, weights)?))
}

#[test]
fn every_operation_agrees_with_its_twin() {
    let target = cpu::target().expect("a target");
    twin::check_engine(&target, &open, "");
}

#[test]
fn a_loss_that_is_no_number_is_not_left_out() {
    let target = cpu::target().expect("a target");
    twin::check_losses_that_are_no_number(&target, &open);
}

#[test]
fn linear_operations_on_quantized_weights_agree_with_their_twins() {
    let target = cpu::target().expect("a target");
    twin::check_cases(twin::cases::quantized(&target), &target, &open, "");
    twin::check_cases(twin::cases::odd_rows(&target), &target, &open, "");
}

#[test]
fn four_and_eight_bits_are_those_of_bitsandbytes() {
    let target = cpu::target().expect("a target");
    twin::bitsandbytes::check_nf4(&target, &open);
    twin::bitsandbytes::check_adamw8bit(&target, &open);
}

/// A session in which some pairs of buffers have one place: what is written to one is in the other too.
struct Shared {
    session: Box<dyn Session>,
    pairs: Vec<(BufferId, BufferId)>,
}

impl Session for Shared {
    fn plan(&self) -> &Plan {
        self.session.plan()
    }

    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), EngineError> {
        for (one, other) in self.pairs.clone() {
            if one == buffer || other == buffer {
                self.session.write(if one == buffer { other } else { one }, bytes)?;
            }
        }
        self.session.write(buffer, bytes)
    }

    fn read(&mut self, buffer: BufferId, bytes: &mut [u8]) -> Result<(), EngineError> {
        self.session.read(buffer, bytes)
    }

    fn run(&mut self, program: usize) -> Result<(), EngineError> {
        self.session.run(program)
    }

    fn run_steps(&mut self, program: usize, steps: Range<usize>) -> Result<(), EngineError> {
        self.session.run_steps(program, steps)
    }

    fn synchronize(&mut self) -> Result<(), EngineError> {
        self.session.synchronize()
    }

    fn allocated_bytes(&self) -> u64 {
        self.session.allocated_bytes()
    }
}

/// Buffers of an operation of a case that a card's plan lays over each other.
fn sharing(case: &twin::Case) -> Vec<(BufferId, BufferId)> {
    let card = cuda::KnownCard::named("H100").expect("a known card").target();
    let plan = plan(case.workload.clone(), card).expect("a plan");
    let places: Vec<(usize, Placement)> =
        plan.placements.iter().copied().enumerate().filter(|(_, place)| *place != Placement::Own).collect();
    let mut pairs = Vec::new();
    for (index, (one, place)) in places.iter().enumerate() {
        let others = places[index + 1..].iter().filter(|(_, other)| other == place);
        let both = others.map(|(other, _)| (BufferId(*one as u32), BufferId(*other as u32)));
        pairs.extend(both.filter(|(one, other)| {
            let touches = |op: &Op, id: BufferId| op.accesses().iter().any(|&(touched, _)| touched == id);
            case.ops().any(|op| touches(op, *one) && touches(op, *other))
        }));
    }
    pairs
}

/// A result that a plan lays over its own input is judged as fairly as any.
#[test]
fn results_over_their_inputs_are_judged() {
    let target = cpu::target().expect("a target");
    let cases: Vec<twin::Case> =
        twin::cases::all(&target).into_iter().filter(|case| !sharing(case).is_empty()).collect();
    assert!(cases.iter().any(|case| case.name.starts_with("glu_backward")), "no case shares a place");
    for case in &cases {
        let open = |plan: Plan, weights: Arc<dyn WeightSource>| -> Result<Box<dyn Session>, EngineError> {
            Ok(Box::new(Shared { session: open(plan, weights)?, pairs: sharing(case) }))
        };
        let failures = twin::check_case(case, &target, &open);
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}
