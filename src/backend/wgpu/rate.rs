//! How fast an adapter multiplies matrices, for `tune doctor`.

use std::sync::Arc;
use std::time::Instant;

use super::adapter::{Options, target};
use super::session::WgpuSession;
use crate::backend::{EngineError, Session, Tensor, WeightSource};
use crate::program::{Columns, DType, Kind, Op, Projection, Role, WorkloadBuilder, plan};

/// A weight of zeros: products take as long.
struct Zeros(Vec<usize>);

impl WeightSource for Zeros {
    fn tensor(&self, _: &str) -> Result<Tensor<'_>, EngineError> {
        static BYTES: [u8; 2 * LARGE * LARGE] = [0; 2 * LARGE * LARGE];
        let bytes = &BYTES[..2 * self.0.iter().product::<usize>()];
        Ok(Tensor { dtype: DType::BF16, shape: self.0.clone(), bytes })
    }
}

const LARGE: usize = 2048;

/// FLOP/s of `[n, n] · [n, n]ᵀ` as a linear layer computes it, in the type that the engine would choose.
///
/// # Errors
/// When the adapter cannot be opened.
pub fn measured(adapter: usize, software: bool) -> Result<f64, EngineError> {
    let options = Options { adapter: Some(adapter), compute: None, portable: false, narrow: None };
    let (n, repeats) = if software { (256, 1) } else { (LARGE, 8) };
    let target = target(&options)?;
    let compute = target.compute;
    let mut builder = WorkloadBuilder::new();
    let input = builder.persistent("input", &[n, n], compute, Kind::Output);
    let output = builder.persistent("output", &[n, n], compute, Kind::Output);
    let weight = builder.persistent("weight", &[n, n], DType::BF16, Kind::Weight);
    builder.begin("rate", Role::Evaluate, n);
    for _ in 0..repeats {
        let columns = Columns { buffer: output, start: 0, width: n };
        let projection = Projection { weight, bias: None, output: columns, lora: None };
        builder.push("rate", Op::Linear { input, projections: vec![projection] });
    }
    builder.end();
    let unsupported = |what: String| EngineError::Unsupported { engine: super::adapter::ENGINE, what };
    let plan = plan::plan(builder.finish(), target).map_err(|error| unsupported(error.to_string()))?;
    let mut session = WgpuSession::open(plan, Arc::new(Zeros(vec![n, n])), &options, None)?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let begun = Instant::now();
        session.run(0)?;
        session.synchronize()?;
        best = best.min(begun.elapsed().as_secs_f64() / repeats as f64);
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}
