//! Every operation of the CPU engine against its f64 twin.

mod twin;

use std::sync::Arc;

use tune::backend::cpu;
use tune::backend::{EngineError, Session, WeightSource};
use tune::program::Plan;

fn open(plan: Plan, weights: Arc<dyn WeightSource>) -> Result<Box<dyn Session>, EngineError> {
    Ok(Box::new(cpu::open(plan, weights)?))
}

#[test]
fn every_operation_agrees_with_its_twin() {
    let target = cpu::target().expect("a target");
    twin::check_engine(&target, &open, "");
}
