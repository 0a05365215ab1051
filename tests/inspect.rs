//! Programs looked into operation by operation, on the CPU engine.

mod tiny;

use tiny::{TOKENS, lora, session};
use tune::backend::Session;
use tune::backend::cpu::{CpuSession, Layout, Options};
use tune::backend::inspect::{Origin, check, locate_non_finite, profile};
use tune::model::Recompute;

fn micro(session: &CpuSession) -> usize {
    session.plan().workload.program(&format!("micro.{TOKENS}")).expect("a program")
}

fn write(session: &mut CpuSession, name: &str, change: impl FnOnce(&mut Vec<f32>)) {
    let id = session.plan().workload.find(name).expect("a buffer");
    let mut values: Vec<f32> = tune::backend::read_values(session, id).expect("read");
    change(&mut values);
    session.write(id, bytemuck::cast_slice(&values)).expect("written");
}

#[test]
fn a_profile_has_every_operation_and_its_share() {
    let mut session = session(&lora(), Recompute::None, Options::default());
    let program = micro(&session);
    let times = profile(&mut session, program, 3).expect("a profile");
    assert_eq!(times.len(), session.plan().workload.programs[program].steps.len());
    assert!((times.iter().map(|time| time.share).sum::<f64>() - 1.0).abs() < 1e-9);
    assert!(times.iter().all(|time| time.milliseconds > 0.0 && time.floor_milliseconds > 0.0));
}

#[test]
fn an_engine_agrees_with_itself() {
    let mut first = session(&lora(), Recompute::None, Options::default());
    let mut second = session(&lora(), Recompute::None, Options { layout: Layout::Apart, ..Options::default() });
    let program = micro(&first);
    let agreements = check(&mut first, &mut second, program).expect("a check");
    assert!(agreements.len() > 50);
    assert!(agreements.iter().all(|agreement| agreement.error == 0.0));
}

#[test]
fn finite_programs_have_no_address_to_give() {
    let mut session = session(&lora(), Recompute::None, Options::default());
    let program = micro(&session);
    assert_eq!(locate_non_finite(&mut session, program).expect("runs"), None);
}

#[test]
fn an_overflow_is_found_where_it_happens() {
    let mut session = session(&lora(), Recompute::None, Options::default());
    write(&mut session, "model.layers.1.mlp.down_proj.lora_B.weight", |values| values.fill(3e38));
    let program = micro(&session);
    let found = locate_non_finite(&mut session, program).expect("runs").expect("something");
    assert_eq!((found.name.as_str(), found.op, found.origin), ("layers.1.mlp.down", "linear", Origin::Computed));
    assert!(found.to_string().contains("layers.1.mlp.down (linear) wrote NaN or infinity"), "{found}");
}

#[test]
fn a_parameter_that_is_nan_is_named() {
    let mut session = session(&lora(), Recompute::None, Options::default());
    let name = "model.layers.2.self_attn.v_proj.lora_A.weight";
    write(&mut session, name, |values| values[70] = f32::NAN);
    let program = micro(&session);
    let found = locate_non_finite(&mut session, program).expect("runs").expect("something");
    assert_eq!((found.buffer.as_str(), found.rows.as_slice(), found.origin), (name, &[1][..], Origin::Given));
}
