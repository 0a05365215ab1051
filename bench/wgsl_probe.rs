//! Runs WGSL files on an adapter as a list of jobs says, for experiments with kernels: `wgsl_probe JOBS.json` prints one
//! JSON object a job. `bench/wgsl_probe.py` writes the jobs and judges the results.
//!
//! A job: `{"name", "wgsl": path, "grid": [x, y, z], "repeats": n, "buffers": [{"bytes", "uniform", "file", "noise",
//! "keep", "keep_bytes"}]}`. A buffer holds the file's contents, or f16 noise of that size, or zeros; after one run its first
//! `keep_bytes` are written to the file `keep`. Times are seconds a dispatch, the best of five submissions of `repeats`.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, anyhow};
use half::f16;
use rayon::prelude::*;
use serde_json::{Value, json};
use tune::program::random;

struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
}

fn open() -> anyhow::Result<Device> {
    let instance = wgpu::Instance::default();
    let options =
        wgpu::RequestAdapterOptions { power_preference: wgpu::PowerPreference::HighPerformance, ..Default::default() };
    let adapter = pollster::block_on(instance.request_adapter(&options))?;
    let wanted = wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SUBGROUP_BARRIER
        | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let descriptor = wgpu::DeviceDescriptor {
        required_features: adapter.features() & wanted,
        required_limits: adapter.limits(),
        // SAFETY: for experiments; the shaders use the shapes that the adapter lists.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
    println!("{}", json!({ "adapter": adapter.get_info().name, "driver": adapter.get_info().driver_info }));
    Ok(Device { device, queue })
}

impl Device {
    fn compile(&self, job: &Value) -> anyhow::Result<(wgpu::ComputePipeline, f64)> {
        let path = text(job, "wgsl").context("a job has wgsl")?;
        let source = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let begun = Instant::now();
        let descriptor = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(source.into()) };
        // SAFETY: for experiments; the jobs give buffers of the sizes that the shaders reach.
        let module =
            unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(anyhow!("{error}"));
        }
        Ok((pipeline, begun.elapsed().as_secs_f64()))
    }

    fn run(
        &self,
        job: &Value,
        pipeline: &wgpu::ComputePipeline,
        made: &mut HashMap<String, wgpu::Buffer>,
    ) -> anyhow::Result<f64> {
        let specs = job["buffers"].as_array().context("a job has buffers")?;
        let mut used = Vec::new();
        for spec in specs {
            // Results of megabytes share a buffer.
            let mut shared = spec.clone();
            if let Some(shared) = shared.as_object_mut().filter(|spec| spec["bytes"].as_u64() > Some(1 << 20)) {
                shared.remove("keep");
            }
            let key = shared.to_string();
            if !made.contains_key(&key) {
                let bytes = spec["bytes"].as_u64().context("a buffer has bytes")?;
                let kind =
                    if spec["uniform"] == true { wgpu::BufferUsages::UNIFORM } else { wgpu::BufferUsages::STORAGE };
                let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
                    label: None,
                    size: bytes.next_multiple_of(16),
                    usage: kind | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                });
                if let Some(file) = text(spec, "file") {
                    self.queue.write_buffer(&buffer, 0, &std::fs::read(file)?);
                } else if let Some(size) = spec["noise"].as_f64() {
                    let block: Vec<u8> = (0..1u32 << 16)
                        .flat_map(|i| {
                            let value = f64::from(random::mix(i) >> 8) / 8_388_608.0 - 1.0;
                            f16::from_f64(value * size).to_le_bytes()
                        })
                        .collect();
                    for at in (0..bytes).step_by(block.len()) {
                        self.queue.write_buffer(&buffer, at, &block[..block.len().min((bytes - at) as usize)]);
                    }
                }
                made.insert(key.clone(), buffer);
            }
            used.push(key);
        }
        let entries: Vec<_> = used
            .iter()
            .enumerate()
            .map(|(binding, key)| wgpu::BindGroupEntry {
                binding: binding as u32,
                resource: made[key].as_entire_binding(),
            })
            .collect();
        let bindings = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let grid: Vec<u32> = job["grid"]
            .as_array()
            .context("a job has a grid")?
            .iter()
            .map(|n| n.as_u64().unwrap_or(1) as u32)
            .collect();
        let submit = |count: u64| -> anyhow::Result<f64> {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            {
                let mut pass = encoder.begin_compute_pass(&Default::default());
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, &bindings, &[]);
                for _ in 0..count {
                    pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
                }
            }
            let begun = Instant::now();
            self.queue.submit([encoder.finish()]);
            self.device.poll(wgpu::PollType::wait_indefinitely())?;
            Ok(begun.elapsed().as_secs_f64() / count as f64)
        };
        submit(1)?;
        for (spec, key) in specs.iter().zip(&used) {
            if let Some(file) = text(spec, "keep") {
                let bytes = spec["keep_bytes"].as_u64().unwrap_or(made[key].size());
                std::fs::write(file, self.read(&made[key], bytes)?)?;
            }
        }
        let mut best = f64::INFINITY;
        if let Some(repeats) = job["repeats"].as_u64().filter(|&repeats| repeats > 0) {
            for _ in 0..5 {
                best = best.min(submit(repeats)?);
            }
        }
        Ok(best)
    }

    fn read(&self, buffer: &wgpu::Buffer, bytes: u64) -> anyhow::Result<Vec<u8>> {
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, bytes);
        self.queue.submit([encoder.finish()]);
        staging.slice(..).map_async(wgpu::MapMode::Read, |_| ());
        self.device.poll(wgpu::PollType::wait_indefinitely())?;
        let mapped = staging.slice(..).get_mapped_range().map_err(|error| anyhow!("{error}"))?;
        Ok(mapped.to_vec())
    }
}

fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).context("usage: wgsl_probe JOBS.json")?;
    let jobs: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    let device = open()?;
    let mut made = HashMap::new();
    let jobs = jobs.as_array().context("a list of jobs")?;
    let compiled: Vec<_> = jobs.par_iter().map(|job| device.compile(job)).collect();
    for (job, compiled) in jobs.iter().zip(compiled) {
        let result = compiled.and_then(|(pipeline, compiled)| {
            let seconds = Some(device.run(job, &pipeline, &mut made)?).filter(|seconds| seconds.is_finite());
            Ok(json!({ "name": job["name"], "seconds": seconds, "compiled": compiled }))
        });
        match result {
            Ok(result) => println!("{result}"),
            Err(error) => println!("{}", json!({ "name": job["name"], "error": format!("{error:#}") })),
        }
    }
    Ok(())
}

fn text(value: &Value, key: &str) -> Option<String> {
    value[key].as_str().map(str::to_string)
}
