//! Prints the logits after the last of some tokens, as JSON: `logits MODEL ADAPTER|- ID...`. For comparing with
//! other software.

use std::path::Path;

use tune::backend::{self, Session};
use tune::generate::Generator;
use tune::model::adapter::Adapter;
use tune::model::{GenerationOptions, Model, generation_workload};
use tune::program::plan;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, adapter, ids @ ..] = arguments.as_slice() else {
        return Err("usage: logits MODEL ADAPTER|- ID...".into());
    };
    let ids: Vec<u32> = ids.iter().map(|id| id.parse()).collect::<Result<_, _>>()?;
    let model = Model::open(Path::new(folder), 0)?;
    let adapter = match adapter.as_str() {
        "-" => None,
        folder => Some(Adapter::read(Path::new(folder), &model.config)?),
    };
    let choice = backend::choose("cpu", "auto")?;
    let options = GenerationOptions { capacity: 128, prefill_sizes: vec![32] };
    let shape = adapter.as_ref().map(Adapter::options);
    let workload = generation_workload(&model.config, &options, shape.as_ref(), None, &choice.target)?;
    let plan = plan::plan(workload, choice.target.clone())?;
    let mut session = backend::open(plan, model.weights.clone(), &choice.device)?;
    if let Some(adapter) = &adapter {
        write(&mut *session, adapter)?;
    }
    let mut generator = Generator::new(&session.plan().workload, &[], options.capacity)?;
    println!("{}", serde_json::to_string(&generator.logits(&mut *session, &ids)?)?);
    Ok(())
}

fn write(session: &mut dyn Session, adapter: &Adapter) -> Result<(), Box<dyn std::error::Error>> {
    let find = |session: &dyn Session, name: &str| session.plan().workload.find(name).ok_or("no such buffer");
    for (name, tensor) in &adapter.tensors {
        let buffer = find(session, name)?;
        session.write(buffer, bytemuck::cast_slice(&tensor.values))?;
    }
    let scale = find(session, "lora_scale")?;
    session.write(scale, bytemuck::bytes_of(&adapter.scale()))?;
    Ok(())
}
