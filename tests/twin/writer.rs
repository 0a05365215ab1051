//! A case of one operation, or a few after each other, being written: its buffers and what they hold before.

use std::collections::HashMap;

use tune::program::{BufferId, DType, Kind, Op, Role, Target, WorkloadBuilder, random};

use super::{Case, from_bytes, quantized, to_bytes};

/// A case being written. Values are uniform and depend on the case's name alone.
pub struct Writer {
    pub name: String,
    pub builder: WorkloadBuilder,
    pub inputs: Vec<Vec<f64>>,
    checkpoint: HashMap<String, DType>,
    exact: HashMap<String, Vec<f64>>,
    pub compute: DType,
    pub trainable: DType,
    pub gradients: DType,
    /// Of activations that are only read: where a second operation reads them, they are there before the first.
    pub given: Kind,
    drawn: u32,
}

impl Writer {
    pub fn new(target: &Target, name: String) -> Self {
        let mut builder = WorkloadBuilder::new();
        builder.begin("case", Role::Micro, 0);
        let (compute, trainable) = (target.compute, target.trainable);
        let gradients = target.gradients;
        let (checkpoint, exact) = (HashMap::new(), HashMap::new());
        let given = Kind::Activation;
        Self { name, builder, inputs: Vec::new(), checkpoint, exact, compute, trainable, gradients, given, drawn: 0 }
    }

    /// `count` numbers, uniform in `[-1, 1)`.
    pub fn draw(&mut self, count: usize) -> Vec<f64> {
        self.drawn += 1;
        let key = [random::stream(&self.name), self.drawn, 0, 0];
        (0..count)
            .map(|i| f64::from(random::uniform(key, 0, (i >> 16) as u32, (i & 0xffff) as u32)) * 2.0 - 1.0)
            .collect()
    }

    /// A buffer that holds these values as its type can.
    pub fn put(&mut self, name: &str, shape: &[usize], dtype: DType, kind: Kind, values: &[f64]) -> BufferId {
        let id = if kind.is_transient() {
            self.builder.transient(name, shape, dtype, kind)
        } else {
            self.builder.persistent(name, shape, dtype, kind)
        };
        if id.index() == self.inputs.len() {
            let rounded = from_bytes(dtype, name, &to_bytes(dtype, name, values), values.len());
            self.inputs.push(rounded);
        }
        id
    }

    pub fn random(&mut self, name: &str, shape: &[usize], dtype: DType, kind: Kind, size: f64) -> BufferId {
        let values: Vec<f64> = self.draw(shape.iter().product()).iter().map(|v| v * size).collect();
        self.put(name, shape, dtype, kind, &values)
    }

    pub fn activation(&mut self, name: &str, shape: &[usize]) -> BufferId {
        self.random(name, shape, self.compute, self.given, 1.0)
    }

    /// A buffer that the operation has to fill: NaN before.
    pub fn output(&mut self, name: &str, shape: &[usize], dtype: DType) -> BufferId {
        self.put(name, shape, dtype, Kind::Activation, &vec![f64::NAN; shape.iter().product()])
    }

    pub fn workspace(&mut self, name: &str, shape: &[usize], dtype: DType) -> BufferId {
        self.put(name, shape, dtype, Kind::Workspace, &vec![f64::NAN; shape.iter().product()])
    }

    /// A weight whose products with activations stay near 1.
    pub fn weight(&mut self, name: &str, shape: &[usize], dtype: DType) -> BufferId {
        let inputs = shape.get(1).copied().unwrap_or(1) as f64;
        let size = 1.7 / inputs.sqrt();
        if dtype.is_quantized() && shape.len() > 1 {
            return self.quantized_weight(name, shape, dtype, size);
        }
        let dtype = if dtype.is_quantized() { DType::F32 } else { dtype };
        self.random(name, shape, dtype, Kind::Weight, size)
    }

    /// A weight that the engine quantizes on loading, from bf16 or, where there are few columns, from f32.
    pub fn quantized_weight(&mut self, name: &str, shape: &[usize], dtype: DType, size: f64) -> BufferId {
        let stored = if shape[1] < 100 { DType::F32 } else { DType::BF16 };
        // Few large values among small ones, as weights have them.
        let values: Vec<f64> = self.draw(shape.iter().product()).iter().map(|v| v * v.abs() * 1.3 * size).collect();
        let exact = from_bytes(stored, name, &to_bytes(stored, name, &values), values.len());
        let held: Vec<f32> = exact.iter().map(|&v| v as f32).collect();
        self.inputs.push(quantized::rounded(dtype, &held, shape[1]));
        self.exact.insert(name.to_string(), exact);
        self.checkpoint.insert(name.to_string(), stored);
        self.builder.persistent(name, shape, dtype, Kind::Weight)
    }

    pub fn adapter(&mut self, name: &str, shape: &[usize]) -> BufferId {
        let size = 1.7 / (shape[1] as f64).sqrt();
        self.random(name, shape, self.compute, Kind::Adapter, size)
    }

    pub fn gradient(&mut self, name: &str, shape: &[usize]) -> BufferId {
        self.random(name, shape, DType::F32, Kind::Gradient, 1.0)
    }

    /// Of a matrix of the model.
    pub fn matrix_gradient(&mut self, name: &str, shape: &[usize]) -> BufferId {
        self.random(name, shape, self.gradients, Kind::Gradient, 1.0)
    }

    pub fn scalar(&mut self, name: &str, value: f64) -> BufferId {
        self.put(name, &[1], DType::F32, Kind::Scalar, &[value])
    }

    pub fn key(&mut self) -> BufferId {
        self.put("random_key", &[4], DType::U32, Kind::Scalar, &[3407.0, 1.0, 7.0, 2.0])
    }

    pub fn integers(&mut self, name: &str, values: &[usize]) -> BufferId {
        let values: Vec<f64> = values.iter().map(|&v| v as f64).collect();
        self.put(name, &[values.len()], DType::I32, Kind::Input, &values)
    }

    pub fn random_integers(&mut self, name: &str, count: usize, limit: usize) -> BufferId {
        let values: Vec<usize> = self.draw(count).iter().map(|v| ((v + 1.0) / 2.0 * limit as f64) as usize).collect();
        self.integers(name, &values)
    }

    pub fn finish(self, op: Op) -> Case {
        self.finish_all([op])
    }

    pub fn finish_all(mut self, ops: impl IntoIterator<Item = Op>) -> Case {
        ops.into_iter().for_each(|op| self.builder.push("op", op));
        self.builder.end();
        let workload = self.builder.finish();
        Case { name: self.name, workload, inputs: self.inputs, checkpoint: self.checkpoint, exact: self.exact }
    }
}
