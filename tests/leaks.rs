//! An hour's training loop in miniature on software Vulkan: memory stays flat. Alone in its process, whose memory it
//! measures; a software adapter's device memory is among it. `TUNE_TEST_STEPS=2000` takes a minute; on a card
//! `bench/wgsl.sh leak` does that.
#![cfg(target_os = "linux")]

use std::path::Path;

use tune::backend::{Session, wgpu};
use tune::model::{AdapterOptions, Method, Model, Recompute, TrainingOptions, names, training_workload};
use tune::program::DType;
use tune::program::plan::plan;

const TOKENS: usize = 16;

fn resident_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

#[test]
fn hundreds_of_steps_leak_nothing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny/llama");
    let model = Model::open(&folder, 0).expect("a tiny model opens");
    let adapters = wgpu::adapters();
    let software = adapters.iter().find(|adapter| adapter.software);
    let software = software.unwrap_or_else(|| panic!("no software Vulkan adapter: run tests/mesa.sh"));
    let options =
        wgpu::Options { adapter: Some(software.index), compute: Some(DType::F32), portable: false, narrow: None };
    let target = wgpu::target(&options).expect("a target");
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    let training = TrainingOptions::new(
        Method::Lora { adapter: AdapterOptions { rank: 4, targets, dropout: 0.0 }, weights: None },
        vec![TOKENS],
        vec![Recompute::None; model.config.layers],
    );
    let workload = training_workload(&model.config, &training, &target).expect("a workload");
    let mut session =
        wgpu::open(plan(workload, target).expect("a plan"), model.weights.clone(), &options).expect("opens");
    let workload = session.plan().workload.clone();
    let find = |name: &str| workload.find(name).expect("a buffer");
    let programs =
        ["begin".to_string(), format!("micro.{TOKENS}"), "update".to_string()].map(|name| workload.program(&name));
    let input = |part: &str| find(&format!("inputs.{TOKENS}.{part}"));
    let words = |f: &dyn Fn(i32) -> i32| (0..TOKENS as i32).map(f).collect::<Vec<i32>>();
    let (before, mut held) = (session.allocated_bytes(), 0);
    let steps = std::env::var("TUNE_TEST_STEPS").map_or(500, |steps| steps.parse().expect("a number of steps"));
    let settled = steps / 4;
    for step in 0..steps {
        session.write(input("ids"), bytemuck::cast_slice(&words(&|t| (t * 7 + step) % 100))).expect("written");
        session.write(input("positions"), bytemuck::cast_slice(&words(&|t| t))).expect("written");
        session.write(input("document_start"), bytemuck::cast_slice(&words(&|_| 0))).expect("written");
        session.write(input("document_end"), bytemuck::cast_slice(&words(&|_| TOKENS as i32))).expect("written");
        session.write(input("targets"), bytemuck::cast_slice(&words(&|t| (t * 7 + 7 + step) % 100))).expect("written");
        for program in programs.iter().flatten() {
            session.run(*program).expect("runs");
        }
        let mut loss = [0; 4];
        session.read(find("loss_sum"), &mut loss).expect("read");
        if step == settled {
            held = resident_kilobytes();
        }
    }
    assert!(programs.iter().all(Option::is_some));
    assert_eq!(session.allocated_bytes(), before);
    let grown = resident_kilobytes().saturating_sub(held);
    println!("{held} kilobytes after {settled} steps, {grown} more after {steps}; {before} bytes on the device");
    // A page a step would be four times that.
    assert!(grown < 200 + (steps - settled) as u64, "{grown} kilobytes more after {} steps", steps - settled);
}
