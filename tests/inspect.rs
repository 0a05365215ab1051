//! Programs looked into operation by operation, on the CPU engine.

mod tiny;

use tiny::{TOKENS, lora, lora_on, session};
use tune::backend::Session;
use tune::backend::cpu::{CpuSession, Layout, Options};
use tune::backend::inspect::{Origin, check, locate_non_finite, profile};
use tune::model::Recompute;
use tune::program::{DType, Kind};

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
    for method in [lora(), lora_on(Some(DType::Nf4)), lora_on(Some(DType::Int8))] {
        let mut first = session(&method, Recompute::None, Options::default());
        let mut second = session(&method, Recompute::None, Options { layout: Layout::Apart, ..Options::default() });
        let program = micro(&first);
        let agreements = check(&mut first, &mut second, program).expect("a check");
        assert!(agreements.len() > 50);
        assert!(agreements.iter().all(|agreement| agreement.error == 0.0));
    }
}

/// Weights as stored lie in the mapped file; quantized ones take what the plan says and not a byte more.
#[test]
fn quantized_weights_are_held_in_the_bytes_that_are_planned() {
    let mapped = session(&lora(), Recompute::None, Options::default());
    for dtype in [DType::Nf4, DType::Int8] {
        let mut session = session(&lora_on(Some(dtype)), Recompute::None, Options::default());
        let workload = session.plan().workload.clone();
        let quantized: Vec<_> = workload.of_kind(Kind::Weight).filter(|(_, buffer)| buffer.dtype == dtype).collect();
        let bytes: u64 = quantized.iter().map(|(_, buffer)| buffer.bytes()).sum();
        assert_eq!(quantized.len(), 7 * 3, "the projections of three layers");
        assert_eq!(session.allocated_bytes() - mapped.allocated_bytes(), bytes);
        let planned = |session: &CpuSession| session.plan().summary.bytes["weights"];
        let floats: u64 = quantized.iter().map(|(_, buffer)| DType::F32.bytes(&buffer.shape)).sum();
        let padding = planned(&session) + floats - planned(&mapped) - bytes;
        assert!(padding < 64 * quantized.len() as u64, "{padding} bytes of padding");
        let (id, buffer) = quantized[0];
        let mut held = vec![0; buffer.bytes() as usize];
        session.read(id, &mut held).expect("read");
        assert!(held.iter().any(|&byte| byte != 0));
        assert!(session.write(id, &held).is_err(), "a quantized weight was written");
    }
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
