//! Looking into a program on an open device: time per operation, agreement with another engine, and where a
//! value that is not finite comes from. Operations run one by one, outside any graph, and change the state as
//! they always do: gradients are added to, an update updates.

use std::fmt;
use std::time::Instant;

use half::{bf16, f16};

use super::floats::{is_float, unpack};
use super::{EngineError, Session};
use crate::program::plan::estimate_op;
use crate::program::{Access, AdamWPart, BufferId, DType, Kind, Op, Workload, block8};

/// Time of one operation.
#[derive(Clone, Debug)]
pub struct OpTime {
    /// The step's stable name, `layers.3.attn.qkv`.
    pub name: String,
    /// The operation's, `linear`.
    pub op: &'static str,
    /// Median over the repetitions.
    pub milliseconds: f64,
    /// What the target's rates allow.
    pub floor_milliseconds: f64,
    /// Of the program's time, 0 to 1.
    pub share: f64,
}

/// Runs a program `repeats` times, operation by operation, and gives the time of each.
///
/// # Errors
/// When the device fails.
pub fn profile(session: &mut dyn Session, program: usize, repeats: usize) -> Result<Vec<OpTime>, EngineError> {
    let steps = session.plan().workload.programs[program].steps.len();
    let mut times = vec![Vec::with_capacity(repeats); steps];
    session.synchronize()?;
    for _ in 0..repeats.max(1) {
        for (step, times) in times.iter_mut().enumerate() {
            let start = Instant::now();
            session.run_steps(program, step..step + 1)?;
            session.synchronize()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let medians: Vec<f64> = times
        .iter_mut()
        .map(|times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
        .collect();
    let total: f64 = medians.iter().sum();
    let plan = session.plan();
    let steps = plan.workload.programs[program].steps.iter().zip(medians);
    Ok(steps
        .map(|(step, milliseconds)| OpTime {
            name: step.name.clone(),
            op: step.op.name(),
            milliseconds,
            floor_milliseconds: estimate_op(&plan.workload, &step.op, &plan.target) * 1e3,
            share: if total > 0.0 { milliseconds / total } else { 0.0 },
        })
        .collect())
}

/// How far one output of an operation is from the reference's.
#[derive(Clone, Debug)]
pub struct Agreement {
    pub name: String,
    pub op: &'static str,
    pub buffer: String,
    /// Norm of the difference over the reference's norm.
    pub error: f64,
}

/// The workload as a reference engine computes it: the same buffers and programs, in f32. Frozen weights keep
/// their type.
pub fn reference_workload(workload: &Workload) -> Workload {
    let mut reference = workload.clone();
    let trained = written(workload);
    for (buffer, trained) in reference.buffers.iter_mut().zip(trained) {
        let half = matches!(buffer.dtype, DType::BF16 | DType::F16);
        if half && (buffer.kind != Kind::Weight || trained) {
            buffer.dtype = DType::F32;
        }
    }
    reference
}

/// Whether any program writes the buffer.
fn written(workload: &Workload) -> Vec<bool> {
    let mut written = vec![false; workload.buffers.len()];
    for step in workload.programs.iter().flat_map(|program| &program.steps) {
        for (id, access) in step.op.accesses() {
            written[id.index()] |= access != Access::Read;
        }
    }
    written
}

/// Runs each operation of a program on the reference's inputs in both sessions and compares what they write;
/// errors do not add up. Operations that an engine may take together run together (see [`Op::may_join`]; the CUDA engine takes
/// more together where LoRA is trained, which this does not follow), and what nothing
/// reads afterwards is not compared. The sessions hold the same workload, up to storage types (see [`reference_workload`]);
/// the caller has written inputs, scalars and adapters to the reference.
///
/// # Errors
/// When a device fails, or the workloads differ.
pub fn check(
    session: &mut dyn Session,
    reference: &mut dyn Session,
    program: usize,
) -> Result<Vec<Agreement>, EngineError> {
    let names = |session: &dyn Session| -> Vec<String> {
        session.plan().workload.buffers.iter().map(|buffer| buffer.name.clone()).collect()
    };
    if names(session) != names(reference) {
        let what = "the reference has another workload".to_string();
        return Err(EngineError::Unsupported { engine: "check", what });
    }
    let workload = reference.plan().workload.clone();
    let changes = written(&workload);
    let mut results = Vec::new();
    let steps = &workload.programs[program].steps;
    let mut start = 0;
    for unit in steps.chunk_by(|step, next| step.op.may_join(&next.op)) {
        let range = start..start + unit.len();
        start = range.end;
        let mut known: Vec<BufferId> = Vec::new();
        for (id, access) in unit.iter().flat_map(|step| distinct(step.op.accesses())) {
            let frozen = workload.buffer(id).kind == Kind::Weight && !changes[id.index()];
            if access != Access::Write && !frozen && !known.contains(&id) {
                transfer(reference, session, id)?;
            }
            known.push(id);
        }
        session.run_steps(program, range.clone())?;
        reference.run_steps(program, range)?;
        let last = start - 1;
        for step in unit {
            let maps = block_maps(&step.op);
            for (id, access) in distinct(step.op.accesses()) {
                let buffer = workload.buffer(id);
                let lives = || steps[last..].iter().any(|step| step.op.accesses().iter().any(|access| access.0 == id));
                if access == Access::Read || buffer.kind == Kind::Workspace || buffer.kind.is_transient() && !lives() {
                    continue;
                }
                let map = maps.iter().find(|(buffer, _)| *buffer == id).map(|(_, map)| *map);
                let (found, expected) = (values(session, id, map)?, values(reference, id, map)?);
                results.push(Agreement {
                    name: step.name.clone(),
                    op: step.op.name(),
                    buffer: workload.buffer(id).name.clone(),
                    error: relative_error(&found, &expected),
                });
            }
        }
    }
    Ok(results)
}

/// Each buffer once; written where it is also read.
fn distinct(accesses: Vec<(BufferId, Access)>) -> Vec<(BufferId, Access)> {
    let mut found: Vec<(BufferId, Access)> = Vec::new();
    for (id, access) in accesses {
        match found.iter_mut().find(|(other, _)| *other == id) {
            None => found.push((id, access)),
            Some(entry) if entry.1 != access => entry.1 = Access::Update,
            Some(_) => {}
        }
    }
    found
}

fn block_maps(op: &Op) -> Vec<(BufferId, block8::Map)> {
    let Op::AdamW { parts, .. } = op else { return Vec::new() };
    let of = |part: &AdamWPart| [(part.first_moment, block8::Map::Signed), (part.second_moment, block8::Map::Unsigned)];
    parts.iter().flat_map(of).collect()
}

/// Copies a buffer from one session to another, converted.
fn transfer(from: &mut dyn Session, to: &mut dyn Session, id: BufferId) -> Result<(), EngineError> {
    let (source, target) = (from.plan().workload.buffer(id).dtype, to.plan().workload.buffer(id).dtype);
    let bytes = read_bytes(from, id)?;
    if source == target {
        return to.write(id, &bytes);
    }
    let Some(values) = decode(source, &bytes) else {
        let what = format!("{} to {}", source.name(), target.name());
        return Err(EngineError::Unsupported { engine: "check", what });
    };
    let bytes: Vec<u8> = match target {
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
    };
    to.write(id, &bytes)
}

fn read_bytes(session: &mut dyn Session, id: BufferId) -> Result<Vec<u8>, EngineError> {
    let mut bytes = vec![0; session.plan().workload.buffer(id).bytes() as usize];
    session.read(id, &mut bytes)?;
    Ok(bytes)
}

/// Floating-point contents; none for other types.
fn decode(dtype: DType, bytes: &[u8]) -> Option<Vec<f32>> {
    is_float(dtype).then(|| {
        let mut values = vec![0.0; bytes.len() / dtype.bytes(&[1]) as usize];
        unpack(dtype, bytes, &mut values);
        values
    })
}

fn values(session: &mut dyn Session, id: BufferId, map: Option<block8::Map>) -> Result<Vec<f32>, EngineError> {
    let (dtype, elements) = {
        let buffer = session.plan().workload.buffer(id);
        (buffer.dtype, buffer.elements())
    };
    let bytes = read_bytes(session, id)?;
    Ok(match (dtype, map) {
        (DType::Block8, Some(map)) => block8::decode(map, &bytes, elements),
        _ => decode(dtype, &bytes).unwrap_or_else(|| bytes.iter().map(|&byte| f32::from(byte)).collect()),
    })
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm.max(1e-30)).sqrt() }
}

/// Where a NaN or an infinity was met first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// Index of the operation in its program.
    pub step: usize,
    pub name: String,
    pub op: &'static str,
    pub buffer: String,
    /// Rows of the buffer that hold such values, ascending.
    pub rows: Vec<usize>,
    pub origin: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The operation was given finite values and wrote others.
    Computed,
    /// The operation was given a persistent buffer with such values.
    Given,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, op, buffer, rows, .. } = self;
        match self.origin {
            Origin::Computed => write!(f, "{name} ({op}) wrote NaN or infinity to {buffer} from finite inputs")?,
            Origin::Given => write!(f, "{name} ({op}) reads {buffer}, which holds NaN or infinity")?,
        }
        let shown: Vec<String> = rows.iter().take(8).map(ToString::to_string).collect();
        let noun = if rows.len() == 1 { "row" } else { "rows" };
        write!(f, ", {noun} {}", shown.join(", "))?;
        if rows.len() > shown.len() {
            write!(f, " and {} more", rows.len() - shown.len())?;
        }
        Ok(())
    }
}

/// Runs a program operation by operation and stops at the first that reads or writes a value that is not finite.
///
/// # Errors
/// When the device fails.
pub fn locate_non_finite(session: &mut dyn Session, program: usize) -> Result<Option<NonFinite>, EngineError> {
    let workload = session.plan().workload.clone();
    let mut known = vec![false; workload.buffers.len()];
    for (index, step) in workload.programs[program].steps.iter().enumerate() {
        let accesses = distinct(step.op.accesses());
        let found = |buffer: &str, rows, origin| NonFinite {
            step: index,
            name: step.name.clone(),
            op: step.op.name(),
            buffer: buffer.to_string(),
            rows,
            origin,
        };
        for &(id, access) in &accesses {
            let buffer = workload.buffer(id);
            if access == Access::Write || known[id.index()] || buffer.kind.is_transient() {
                continue;
            }
            let rows = non_finite_rows(session, id)?;
            if !rows.is_empty() {
                return Ok(Some(found(&buffer.name, rows, Origin::Given)));
            }
            known[id.index()] = true;
        }
        session.run_steps(program, index..index + 1)?;
        for &(id, access) in &accesses {
            let buffer = workload.buffer(id);
            if access == Access::Read || buffer.kind == Kind::Workspace || session.leaves_out(program, index) {
                continue;
            }
            let rows = non_finite_rows(session, id)?;
            if !rows.is_empty() {
                return Ok(Some(found(&buffer.name, rows, Origin::Computed)));
            }
        }
    }
    Ok(None)
}

fn non_finite_rows(session: &mut dyn Session, id: BufferId) -> Result<Vec<usize>, EngineError> {
    let buffer = session.plan().workload.buffer(id);
    let (dtype, columns) = (buffer.dtype, buffer.columns().max(1));
    if !is_float(dtype) {
        return Ok(Vec::new());
    }
    let values = decode(dtype, &read_bytes(session, id)?).unwrap_or_default();
    let rows = values.chunks(columns).enumerate();
    Ok(rows.filter(|(_, row)| row.iter().any(|value| !value.is_finite())).map(|(index, _)| index).collect())
}
