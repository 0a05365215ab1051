//! Helpers with which builders write a workload.

use std::collections::HashMap;

use super::{Buffer, BufferId, DType, Kind, Op, Program, Role, Step, Workload};

/// A workload being written. Persistent buffers are shared by name; transient ones belong to the program
/// that is open when they are made, and carry its name as a prefix.
#[derive(Default)]
pub struct WorkloadBuilder {
    workload: Workload,
    names: HashMap<String, BufferId>,
    open: Option<Program>,
}

impl WorkloadBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// A persistent buffer: the same id for the same name.
    ///
    /// # Panics
    /// When the name was used with another shape, type or kind: a builder's mistake.
    pub fn persistent(&mut self, name: &str, shape: &[usize], dtype: DType, kind: Kind) -> BufferId {
        assert!(!kind.is_transient(), "{name} is transient");
        if let Some(&id) = self.names.get(name) {
            let buffer = self.workload.buffer(id);
            assert!(buffer.shape == shape && buffer.dtype == dtype && buffer.kind == kind, "{name} made twice");
            return id;
        }
        self.add(name.to_string(), shape, dtype, kind)
    }

    /// A table with fixed contents.
    pub fn constant(&mut self, name: &str, values: &[f32]) -> BufferId {
        if let Some(&id) = self.names.get(name) {
            return id;
        }
        let id = self.add(name.to_string(), &[values.len()], DType::F32, Kind::Constant);
        self.workload.constants.push((id, values.to_vec()));
        id
    }

    /// A buffer of the open program. Names need not be unique: a recomputed value has its first one's.
    pub fn transient(&mut self, name: &str, shape: &[usize], dtype: DType, kind: Kind) -> BufferId {
        assert!(kind.is_transient(), "{name} is not transient");
        let program = &self.open.as_ref().expect("a program is open").name;
        let name = format!("{program}:{name}");
        let id = BufferId(self.workload.buffers.len() as u32);
        self.workload.buffers.push(Buffer { name, shape: shape.to_vec(), dtype, kind, within: None });
        id
    }

    /// Rows of a transient buffer as a buffer of their own.
    pub fn rows_of(&mut self, buffer: BufferId, first: usize, rows: usize) -> BufferId {
        let whole = self.workload.buffer(buffer);
        assert!(whole.kind.is_transient() && whole.within.is_none(), "rows of {}", whole.name);
        assert!(first + rows <= whole.rows(), "{} has {} rows", whole.name, whole.rows());
        let mut part = whole.clone();
        part.shape[0] = rows;
        part.within = Some((buffer, first));
        let id = BufferId(self.workload.buffers.len() as u32);
        self.workload.buffers.push(part);
        id
    }

    pub fn activation(&mut self, name: &str, shape: &[usize], dtype: DType) -> BufferId {
        self.transient(name, shape, dtype, Kind::Activation)
    }

    pub fn buffer(&self, id: BufferId) -> &Buffer {
        self.workload.buffer(id)
    }

    /// What is written so far.
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    pub fn begin(&mut self, name: &str, role: Role, tokens: usize) {
        assert!(self.open.is_none(), "a program is open");
        self.open = Some(Program { name: name.to_string(), role, tokens, steps: Vec::new() });
    }

    pub fn push(&mut self, name: &str, op: Op) {
        let program = self.open.as_mut().expect("a program is open");
        program.steps.push(Step { name: name.to_string(), op });
    }

    pub fn end(&mut self) {
        let program = self.open.take().expect("a program is open");
        self.workload.programs.push(program);
    }

    pub fn finish(self) -> Workload {
        assert!(self.open.is_none(), "a program is open");
        self.workload
    }

    fn add(&mut self, name: String, shape: &[usize], dtype: DType, kind: Kind) -> BufferId {
        let id = BufferId(self.workload.buffers.len() as u32);
        self.names.insert(name.clone(), id);
        self.workload.buffers.push(Buffer { name, shape: shape.to_vec(), dtype, kind, within: None });
        id
    }
}
