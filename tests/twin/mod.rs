//! The judge of every engine: each operation alone, and those that an engine may take together, on random inputs, against
//! their f64 twins.
//!
//! `check_engine` is generic over engines: include this module with `mod twin;` and give it a target and a way to
//! open a plan. The twin sees inputs as the engine's storage types hold them.

#![allow(dead_code)]

pub mod bitsandbytes;
pub mod branches;
pub mod cases;
pub mod ops;
pub mod quantized;
pub mod writer;

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use tune::backend::{EngineError, Session, Tensor, WeightSource};
use tune::program::plan::plan;
use tune::program::{Access, BufferId, DType, Kind, Op, Plan, Target, Workload, block8};

/// One operation with its inputs, or a few after each other.
pub struct Case {
    pub name: String,
    /// One program.
    pub workload: Workload,
    /// Contents before the run, as the storage types hold them, by buffer index.
    pub inputs: Vec<Vec<f64>>,
    /// Storage of weights in the checkpoint.
    pub checkpoint: HashMap<String, DType>,
    /// Values in the checkpoint of weights that the engine quantizes: `inputs` has what they are worth then.
    pub exact: HashMap<String, Vec<f64>>,
}

impl Case {
    /// # Panics
    /// When the target has no plan for it.
    pub fn plan(&self, target: &Target) -> Plan {
        plan(self.workload.clone(), target.clone()).expect("a plan")
    }

    pub fn ops(&self) -> impl Iterator<Item = &Op> {
        self.workload.programs[0].steps.iter().map(|step| &step.op)
    }
}

pub type Opener<'a> = &'a dyn Fn(Plan, Arc<dyn WeightSource>) -> Result<Box<dyn Session>, EngineError>;

/// Runs every case whose name contains `filter`.
///
/// # Panics
/// With a table of all that differ.
pub fn check_engine(target: &Target, open: Opener, filter: &str) {
    check_cases(cases::all(target), target, open, filter);
}

/// As [`check_engine`], of these cases.
///
/// # Panics
/// With a table of all that differ.
pub fn check_cases(cases: Vec<Case>, target: &Target, open: Opener, filter: &str) {
    let cases: Vec<Case> = cases.into_iter().filter(|case| case.name.contains(filter)).collect();
    assert!(!cases.is_empty(), "no case is called {filter}");
    let failures: Vec<String> = cases.iter().flat_map(|case| check_case(case, target, open)).collect();
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
    println!("{} cases agree with their twins on {}", cases.len(), target.name);
}

/// A loss that is no number is none in the sum either.
///
/// # Panics
/// When it is left out.
pub fn check_losses_that_are_no_number(target: &Target, open: Opener) {
    let is_case = |case: &Case| case.name.starts_with("linear_cross_entropy 70x64");
    let mut case = cases::all(target).into_iter().find(is_case).expect("a case of evaluation");
    let find = |name: &str| {
        let found = case.workload.buffers.iter().position(|buffer| buffer.name.ends_with(name));
        BufferId(found.expect("a buffer") as u32)
    };
    let (input, sum) = (find("input"), find("loss_sum"));
    // The first token with a target.
    case.inputs[input.index()][3 * 64] = f64::NAN;
    let plan = plan(case.workload.clone(), target.clone()).expect("a plan");
    let mut session = open(plan, Arc::new(Checkpoint::new(&case))).expect("a session");
    let written = outputs(&case, session.as_mut()).expect("it runs");
    let bytes = &written.iter().find(|(id, _)| *id == sum).expect("it is written").1;
    let found = from_bytes(DType::F32, "loss_sum", bytes, 1)[0];
    assert!(found.is_nan(), "the sum of losses is {found}");
}

/// A session of an engine on the first of the cases whose name begins so.
///
/// # Panics
/// Without such a case.
pub fn session<S>(cases: &[Case], target: &Target, open: impl Fn(Plan, Arc<dyn WeightSource>) -> S, name: &str) -> S {
    let case = cases.iter().find(|case| case.name.starts_with(name)).expect("a case of that name");
    open(case.plan(target), Arc::new(Checkpoint::new(case)))
}

/// What is wrong with the engine's results, one line a buffer.
pub fn check_case(case: &Case, target: &Target, open: Opener) -> Vec<String> {
    match run_case(case, target, open) {
        Ok(failures) => failures,
        Err(error) => vec![format!("{}: {error}", case.name)],
    }
}

fn tolerance(compute: DType) -> f64 {
    match compute {
        DType::F16 => 2e-3,
        DType::BF16 => 1e-2,
        _ => 1e-5,
    }
}

fn run_case(case: &Case, target: &Target, open: Opener) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let workload = &case.workload;
    let mut twin = ops::Values { workload, of: case.inputs.clone() };
    for op in case.ops() {
        ops::run(&mut twin, op);
        // The next one sees what the storage types hold.
        for (id, access) in op.accesses() {
            let buffer = workload.buffer(id);
            if access != Access::Read && case.ops().count() > 1 {
                let bytes = to_bytes(buffer.dtype, &buffer.name, &twin.of[id.index()]);
                twin.of[id.index()] = from_bytes(buffer.dtype, &buffer.name, &bytes, buffer.elements());
            }
        }
    }
    let plan = plan(workload.clone(), target.clone())?;
    let mut session = open(plan, Arc::new(Checkpoint::new(case)))?;
    let first = outputs(case, session.as_mut())?;
    let second = outputs(case, session.as_mut())?;
    let mut failures = Vec::new();
    for ((id, bytes), (_, again)) in first.iter().zip(&second) {
        let buffer = workload.buffer(*id);
        if bytes != again {
            failures.push(format!("{}: {} differs from one run to the next", case.name, buffer.name));
        }
        let found = from_bytes(buffer.dtype, &buffer.name, bytes, buffer.elements());
        let expected = &twin.of[id.index()];
        let limit = if buffer.dtype == DType::Block8 { 1e-2 } else { tolerance(target.compute) };
        let error = relative_error(&found, expected);
        // NaN fails too.
        if !matches!(error.partial_cmp(&limit), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            let worst = worst_element(&found, expected);
            failures
                .push(format!("{}: {} is off by {error:.2e} (allowed {limit:.0e}); {worst}", case.name, buffer.name));
        }
    }
    Ok(failures)
}

/// Writes all inputs, runs the operation, and reads what it wrote.
fn outputs(case: &Case, session: &mut dyn Session) -> Result<Vec<(BufferId, Vec<u8>)>, EngineError> {
    let workload = &case.workload;
    let (mut written, mut read): (Vec<BufferId>, Vec<BufferId>) = (Vec::new(), Vec::new());
    for (id, access) in case.ops().flat_map(|op| op.accesses()) {
        let kind = workload.buffer(id).kind;
        if access != Access::Write && !written.contains(&id) {
            read.push(id);
        }
        if access != Access::Read && kind != Kind::Workspace && !written.contains(&id) {
            written.push(id);
        }
    }
    // What the last operation does not touch may have given up its place, or never been written.
    let touched: Vec<BufferId> = case.ops().last().into_iter().flat_map(Op::accesses).map(|(id, _)| id).collect();
    written.retain(|id| touched.contains(id) || !workload.buffer(*id).kind.is_transient());
    // What is only written holds NaN before. It may share its place with an input (an element-wise result over what it
    // was made from), so inputs come last.
    let is_input = |id: BufferId| read.contains(&id);
    // What no operation touches has no place.
    let any: Vec<BufferId> = case.ops().flat_map(Op::accesses).map(|(id, _)| id).collect();
    for inputs in [false, true] {
        for (index, buffer) in workload.buffers.iter().enumerate() {
            let id = BufferId(index as u32);
            let frozen = buffer.kind == Kind::Weight && !written.contains(&id);
            let untouched = buffer.kind.is_transient() && !any.contains(&id);
            if frozen || untouched || buffer.kind == Kind::Constant || is_input(id) != inputs {
                continue;
            }
            session.write(id, &to_bytes(buffer.dtype, &buffer.name, &case.inputs[index]))?;
        }
    }
    session.run(0)?;
    session.synchronize()?;
    let mut results = Vec::new();
    for id in written {
        let mut bytes = vec![0u8; workload.buffer(id).bytes() as usize];
        session.read(id, &mut bytes)?;
        results.push((id, bytes));
    }
    Ok(results)
}

/// Norm of the difference over the norm.
fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|b| b * b).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm.max(1e-30)).sqrt() }
}

fn worst_element(found: &[f64], expected: &[f64]) -> String {
    let gap = |i: usize| {
        let gap = (found[i] - expected[i]).abs();
        if gap.is_nan() { f64::INFINITY } else { gap }
    };
    let worst = (0..found.len()).max_by(|&a, &b| gap(a).total_cmp(&gap(b))).unwrap_or(0);
    format!("worst at {worst} of {}: {} should be {}", found.len(), found[worst], expected[worst])
}

fn map(name: &str) -> block8::Map {
    if name.ends_with("exp_avg") { block8::Map::Signed } else { block8::Map::Unsigned }
}

/// Values in a storage type.
pub fn to_bytes(dtype: DType, name: &str, values: &[f64]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v as f32).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v as f32).to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
        DType::U32 => values.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        DType::Block8 => {
            let mut bytes = vec![0; dtype.bytes(&[values.len()]) as usize];
            let (scales, codes) = block8::split_mut(&mut bytes, values.len());
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            let blocks = values.chunks(block8::BLOCK).zip(scales.chunks_mut(4)).zip(codes.chunks_mut(block8::BLOCK));
            blocks.for_each(|((values, scale), codes)| block8::pack(map(name), values, scale, codes));
            bytes
        }
        DType::Nf4 | DType::Int8 | DType::Fp8 => panic!("{name}: {} cannot be written", dtype.name()),
    }
}

pub fn from_bytes(dtype: DType, name: &str, bytes: &[u8], elements: usize) -> Vec<f64> {
    let words = bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
    let halves = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        DType::F32 => words.map(|word| f64::from(f32::from_le_bytes(word))).collect(),
        DType::I32 => words.map(|word| f64::from(i32::from_le_bytes(word))).collect(),
        DType::U32 => words.map(|word| f64::from(u32::from_le_bytes(word))).collect(),
        DType::BF16 => halves.map(|half| bf16::from_le_bytes(half).to_f64()).collect(),
        DType::F16 => halves.map(|half| f16::from_le_bytes(half).to_f64()).collect(),
        DType::Block8 => block8::decode(map(name), bytes, elements).into_iter().map(f64::from).collect(),
        DType::Nf4 | DType::Int8 | DType::Fp8 => panic!("{name}: {} cannot be read", dtype.name()),
    }
}

/// The weights of a case as a checkpoint.
struct Checkpoint(HashMap<String, (DType, Vec<usize>, Vec<u8>)>);

impl Checkpoint {
    fn new(case: &Case) -> Self {
        let weights = case.workload.of_kind(Kind::Weight).map(|(id, buffer)| {
            let dtype = case.checkpoint.get(&buffer.name).copied().unwrap_or(buffer.dtype);
            let values = case.exact.get(&buffer.name).unwrap_or(&case.inputs[id.index()]);
            let bytes = to_bytes(dtype, &buffer.name, values);
            (buffer.name.clone(), (dtype, buffer.shape.clone(), bytes))
        });
        Self(weights.collect())
    }
}

impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>, EngineError> {
        let missing = || EngineError::Weight { name: name.to_string(), what: "is not in the case".to_string() };
        let (dtype, shape, bytes) = self.0.get(name).ok_or_else(missing)?;
        Ok(Tensor { dtype: *dtype, shape: shape.clone(), bytes })
    }
}
