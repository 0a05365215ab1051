//! Sessions of the CPU engine on the tiny Llama, with inputs written.

#![allow(dead_code)]

use std::path::Path;

use tune::backend::Session;
use tune::backend::cpu::{CpuSession, Options, open_with};
use tune::model::{AdapterOptions, Method, Model, Recompute, TrainingOptions, names, training_workload};
use tune::program::plan::plan;
use tune::program::{DType, Kind, random};

pub const TOKENS: usize = 64;

pub fn options(method: Method, recompute: Recompute, layers: usize) -> TrainingOptions {
    TrainingOptions::new(method, vec![TOKENS], vec![recompute; layers])
}

pub fn lora() -> Method {
    lora_on(None)
}

pub fn lora_on(weights: Option<DType>) -> Method {
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    Method::Lora { adapter: AdapterOptions { rank: 4, targets, dropout: 0.1 }, weights }
}

pub fn session(method: &Method, recompute: Recompute, engine: Options) -> CpuSession {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama");
    let model = Model::open(&folder, 0).expect("the tiny Llama opens");
    let mut target = tune::backend::cpu::target().expect("a target");
    if recompute == Recompute::All {
        // MLPs in chunks of tokens, the last of them shorter: rows of buffers are buffers of their own.
        target.mlp_tokens = 31;
    }
    let options = options(method.clone(), recompute, model.config.layers);
    let workload = training_workload(&model.config, &options, &target).expect("a workload");
    let plan = plan(workload, target).expect("a plan");
    let mut session = open_with(plan, model.weights, engine).expect("the session opens");
    write_inputs(&mut session);
    session
}

/// Three documents, the last one padding; an adapter with no zeros.
fn write_inputs(session: &mut CpuSession) {
    let starts = [0usize, 23, 50, TOKENS];
    let number = |row: u32, column: u32| random::uniform([1, 2, 3, 4], 5, row, column);
    let (mut ids, mut positions, mut from, mut to, mut targets) = (vec![], vec![], vec![], vec![], vec![]);
    for token in 0..TOKENS {
        let document = starts.partition_point(|&start| start <= token) - 1;
        ids.push((number(token as u32, 0) * 512.0) as i32);
        positions.push((token - starts[document]) as i32);
        from.push(starts[document] as i32);
        to.push(starts[document + 1] as i32);
        let labelled = document < 2 && token + 1 < starts[document + 1] && token % 5 != 0;
        targets.push(if labelled { (number(token as u32, 1) * 512.0) as i32 } else { -100 });
    }
    let mut write_i32 = |name: &str, values: &[i32]| {
        let id = session.plan().workload.find(&format!("inputs.{TOKENS}.{name}")).expect("an input");
        session.write(id, bytemuck::cast_slice(values)).expect("written");
    };
    write_i32("ids", &ids);
    write_i32("positions", &positions);
    write_i32("document_start", &from);
    write_i32("document_end", &to);
    write_i32("targets", &targets);
    let mut write_f32 = |name: &str, values: &[f32]| {
        if let Some(id) = session.plan().workload.find(name) {
            session.write(id, bytemuck::cast_slice(values)).expect("written");
        }
    };
    write_f32(&format!("inputs.{TOKENS}.token_weights"), &[1.0; TOKENS]);
    write_f32("loss_scale", &[1.0 / 37.0]);
    write_f32("lora_scale", &[2.0]);
    write_f32("hyper", &[1e-3, 0.1, 0.03162, 0.0]);
    let adapters: Vec<_> = session.plan().workload.of_kind(Kind::Adapter).map(|(id, b)| (id, b.elements())).collect();
    for (id, elements) in adapters {
        let values: Vec<f32> = (0..elements).map(|i| (number(id.0, i as u32) - 0.5) * 0.1).collect();
        session.write(id, bytemuck::cast_slice(&values)).expect("written");
    }
}

pub fn step(session: &mut CpuSession) {
    for name in ["begin".to_string(), format!("micro.{TOKENS}"), "update".to_string()] {
        let program = session.plan().workload.program(&name).expect("a program");
        session.run(program).expect("runs");
    }
}
