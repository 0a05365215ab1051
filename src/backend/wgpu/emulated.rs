//! Cooperative matrices on adapters that have none, for tests: the shader's text with each operation on matrices replaced
//! by plain WGSL. A subgroup is 32 neighbouring threads; of a sum a thread holds half a row; an operand is where it was
//! read from, and is read when it is multiplied (no shader writes there in between).

/// What an operand or a sum is read from and written to.
struct Buffer {
    name: String,
    /// Elements of a vector; 1 for scalars.
    lanes: usize,
    half: bool,
}

const MATRICES: &str = "
struct Operand { buffer: u32, at: u32, row: u32, column: u32 }
struct Sums { part: array<f32, 8> }
var<private> lane_of_32: u32;
fn emulated_multiply(a: Operand, b: Operand, c: Sums) -> Sums {
  var sums = c;
  for (var k = 0u; k < 16u; k++) {
    let left = emulated_get(a, lane_of_32 / 2u, k);
    for (var i = 0u; i < 8u; i++) {
      sums.part[i] += left * emulated_get(b, k, lane_of_32 % 2u * 8u + i);
    }
  }
  return sums;
}
fn emulated_sums(source: Operand) -> Sums {
  var sums = Sums();
  for (var i = 0u; i < 8u; i++) { sums.part[i] = emulated_get(source, lane_of_32 / 2u, lane_of_32 % 2u * 8u + i); }
  return sums;
}
";

/// The shader without cooperative matrices.
pub fn rewrite(source: &str) -> String {
    let source: String = source.lines().map(|line| format!("{}\n", line.split("//").next().unwrap_or(""))).collect();
    let mut text = source.replace("enable wgpu_cooperative_matrix;\n", "");
    let mut buffers = buffers(&text);
    let touched: Vec<String> =
        ["coopLoad", "coopStoreT("].iter().flat_map(|operation| arrays(&text, operation)).collect();
    buffers.retain(|buffer| touched.contains(&buffer.name));
    let number = |name: &str| buffers.iter().position(|buffer| buffer.name == name).expect("a declared array");
    // coopLoadT<coop_mat16x16<f16, A>>(&tile[i], s): rows; coopLoad: columns.
    while let Some(start) = text.find("coopLoad") {
        let end = start + text[start..].find(')').expect("closed") + 1;
        let call = text[start..end].to_string();
        let (name, index, stride) = place(&call);
        let at = number(name);
        let lanes = buffers[at].lanes;
        let (row, column) = if call.starts_with("coopLoadT") {
            (format!("{stride} * {lanes}u"), "1u".to_string())
        } else {
            ("1u".to_string(), format!("{stride} * {lanes}u"))
        };
        let operand = format!("Operand({at}u, {index} * {lanes}u, {row}, {column})");
        let sums = call.contains(", C>");
        let value = if sums { format!("emulated_sums({operand})") } else { operand };
        text.replace_range(start..end, &value);
    }
    // coopStoreT(sums, &tile[i], s)
    while let Some(start) = text.find("coopStoreT(") {
        let end = start + text[start..].find(')').expect("closed") + 1;
        let call = text[start..end].to_string();
        let sums = call["coopStoreT(".len()..].split(',').next().expect("an argument").trim();
        let (name, index, stride) = place(&call);
        let lanes = buffers[number(name)].lanes;
        text.replace_range(
            start..end,
            &format!("emulated_put_{name}({sums}, {index} * {lanes}u, {stride} * {lanes}u)"),
        );
    }
    text = text.replace("coop_mat16x16<f32, C>()", "Sums()").replace("coopMultiplyAdd(", "emulated_multiply(");
    let declared = "@builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {";
    assert!(text.contains(declared), "another main");
    text =
        text.replace(declared, ") {\n  let subgroup = thread / 32u;\n  let lane = thread % 32u;\n  lane_of_32 = lane;");
    text + MATRICES + &access(&buffers, &arrays(&source, "coopLoad"), &arrays(&source, "coopStoreT("))
}

/// Name, index and stride of `...(&name[index], stride)`.
fn place(call: &str) -> (&str, &str, &str) {
    let rest = &call[call.find('&').expect("a pointer") + 1..];
    let (name, rest) = rest.split_once('[').expect("an index");
    let (index, rest) = rest.split_once("], ").expect("a stride");
    (name, index, rest.trim_end_matches(')'))
}

/// Arrays that an operation names.
fn arrays(source: &str, operation: &str) -> Vec<String> {
    let calls = source.split(operation).skip(1);
    calls.map(|call| place(&call[..call.find(')').expect("closed") + 1]).0.into()).collect()
}

/// Every array of floating-point numbers in memory that threads share.
fn buffers(source: &str) -> Vec<Buffer> {
    let mut found = Vec::new();
    for line in source.lines().filter(|line| line.contains("var<workgroup>") || line.contains("var<storage")) {
        let Some((before, kind)) = line.split_once(": array<") else { continue };
        let name = before.rsplit(' ').next().expect("a name").to_string();
        let (lanes, half) = match kind {
            _ if kind.starts_with("Cell") || kind.starts_with("vec4<f16>") => (4, true),
            _ if kind.starts_with("vec4<f32>") => (4, false),
            _ => continue,
        };
        found.push(Buffer { name, lanes, half });
    }
    found
}

fn access(buffers: &[Buffer], loaded: &[String], stored: &[String]) -> String {
    let mut text = "fn emulated_get(source: Operand, row: u32, column: u32) -> f32 {\n".to_string();
    text += "  let at = source.at + row * source.row + column * source.column;\n  switch (source.buffer) {\n";
    for (number, Buffer { name, .. }) in buffers.iter().enumerate().filter(|entry| loaded.contains(&entry.1.name)) {
        text += &format!("    case {number}u: {{ return f32({name}[at / 4u][at % 4u]); }}\n");
    }
    text += "    default: { return 0.0; }\n  }\n}\n";
    for Buffer { name, half, .. } in buffers.iter().filter(|buffer| stored.contains(&buffer.name)) {
        let kind = if *half { "f16" } else { "f32" };
        text += &format!(
            "fn emulated_put_{name}(sums: Sums, start: u32, stride: u32) {{\n  var s = sums;\n  for (var i = 0u; i < 8u; i++) \
             {{\n    let at = start + lane_of_32 / 2u * stride + lane_of_32 % 2u * 8u + i;\n    \
             {name}[at / 4u][at % 4u] = {kind}(s.part[i]);\n  }}\n}}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::adapter::Gpu;
    use super::super::lower::Choices;
    use super::super::session::WgpuSession;
    use super::super::tuning::{Measurement, Verdict};
    use super::super::{Options, adapters, target};
    use crate::backend::{EngineError, Session, Tensor, WeightSource};
    use crate::program::{
        AttentionShape, Columns, DType, Kind, Lora, Op, Projection, ProjectionBackward, Role, WorkloadBuilder, plan,
    };

    /// A weight of zeros, which trials fill with noise.
    struct Zeros;

    impl WeightSource for Zeros {
        fn tensor(&self, _: &str) -> Result<Tensor<'_>, EngineError> {
            static BYTES: [u8; 2 * SIZE * SIZE] = [0; 2 * SIZE * SIZE];
            Ok(Tensor { dtype: DType::BF16, shape: vec![SIZE, SIZE], bytes: &BYTES })
        }
    }

    const SIZE: usize = 128;

    /// A weight of this shape, uniform within one half of zero.
    struct Noise([usize; 2]);

    fn noise(i: usize) -> f32 {
        crate::program::random::uniform([1, 2, 3, 4], 5, i as u32, 0) - 0.5
    }

    impl WeightSource for Noise {
        fn tensor(&self, _: &str) -> Result<Tensor<'_>, EngineError> {
            static VALUES: std::sync::OnceLock<Vec<f32>> = std::sync::OnceLock::new();
            let values = VALUES.get_or_init(|| (0..1 << 16).map(noise).collect());
            let [rows, columns] = self.0;
            let bytes = bytemuck::cast_slice(&values[..rows * columns]);
            Ok(Tensor { dtype: DType::F32, shape: self.0.to_vec(), bytes })
        }
    }

    /// What is measured of every candidate for the operations of a program.
    fn candidates(write: impl Fn(&mut WorkloadBuilder) -> Vec<Op>) -> Vec<Measurement> {
        let software = adapters().iter().find(|adapter| adapter.software).map(|adapter| adapter.index);
        assert!(software.is_some(), "no software Vulkan adapter: run tests/mesa.sh");
        let options = Options { adapter: software, compute: Some(DType::F16), portable: false, narrow: None };
        let mut builder = WorkloadBuilder::new();
        builder.begin("emulated", Role::Evaluate, 0);
        for op in write(&mut builder) {
            builder.push("emulated", op);
        }
        builder.end();
        let plan = plan::plan(builder.finish(), target(&options).expect("a target")).expect("a plan");
        let mut gpu = Gpu::open(&options).expect("opens");
        (gpu.cooperative, gpu.emulates) = (true, true);
        let session = WgpuSession::open_on(Arc::new(gpu), plan, Arc::new(Zeros), Choices::new(), true);
        session.expect("opens").measurements().to_vec()
    }

    #[test]
    fn attention_on_cooperative_matrices_agrees_with_threads() {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, window: None, softcap: None };
        let begun = std::time::Instant::now();
        let found = candidates(|builder| {
            let tokens = 128;
            let mut buffer =
                |name: &str, columns, dtype| builder.persistent(name, &[tokens, columns], dtype, Kind::Output);
            let (qkv, grad_qkv) =
                (buffer("qkv", shape.columns(), DType::F16), buffer("grad_qkv", shape.columns(), DType::F16));
            let output = buffer("output", shape.query_columns(), DType::F16);
            let grad_output = buffer("grad_output", shape.query_columns(), DType::F16);
            let (log_sum_exp, delta) = (buffer("log_sum_exp", 4, DType::F32), buffer("delta", 4, DType::F32));
            let document_start = builder.persistent("document_start", &[tokens], DType::I32, Kind::Input);
            let document_end = builder.persistent("document_end", &[tokens], DType::I32, Kind::Input);
            vec![
                Op::Attention { qkv, document_start, document_end, output, log_sum_exp, shape },
                Op::AttentionBackward {
                    grad_output,
                    qkv,
                    output,
                    log_sum_exp,
                    document_start,
                    document_end,
                    delta,
                    grad_qkv,
                    shape,
                },
            ]
        });
        println!("{:.1} s {found:#?}", begun.elapsed().as_secs_f64());
        assert_eq!(found.len(), 5, "threads and subgroups, backward ahead too: {found:#?}");
        let fine = |found: &Measurement| !matches!(found.verdict, Verdict::Refused | Verdict::Differs(_));
        assert!(found.iter().all(fine), "{found:#?}");
    }

    #[test]
    fn products_on_cooperative_matrices_agree_with_threads() {
        let begun = std::time::Instant::now();
        let found = candidates(|builder| {
            let mut buffer =
                |name: &str, rows, columns, dtype| builder.persistent(name, &[rows, columns], dtype, Kind::Output);
            let input = buffer("input", SIZE, SIZE, DType::F16);
            let output = buffer("output", SIZE, SIZE, DType::F16);
            let grad_output = buffer("grad_output", SIZE, SIZE, DType::F16);
            let grad_input = buffer("grad_input", SIZE, SIZE, DType::F16);
            let (a, b) = (buffer("a", 16, SIZE, DType::F16), buffer("b", SIZE, 16, DType::F16));
            let grad_weight = Some(buffer("grad_weight", SIZE, SIZE, DType::F32));
            let middle = buffer("middle", SIZE, 16, DType::F16);
            let scale = builder.persistent("scale", &[1], DType::F32, Kind::Scalar);
            let weight = builder.persistent("weight", &[SIZE, SIZE], DType::BF16, Kind::Weight);
            let columns = |buffer, width| Columns { buffer, start: 0, width };
            let (output, grad_output, middle) =
                (columns(output, SIZE), columns(grad_output, SIZE), columns(middle, 16));
            let lora = Some(Lora { a, b, middle, scale, dropout: None });
            let backward = ProjectionBackward { weight, grad_output, grad_weight, grad_bias: None, lora: None };
            vec![
                Op::Linear { input, projections: vec![Projection { weight, bias: None, output, lora }] },
                Op::LinearBackward { input, grad_input: Some(grad_input), projections: vec![backward] },
            ]
        });
        println!("{} candidates in {:.1} s", found.len(), begun.elapsed().as_secs_f64());
        let fine = |found: &Measurement| !matches!(found.verdict, Verdict::Refused | Verdict::Differs(_));
        assert!(found.iter().all(fine), "{found:#?}");
        for part in ["NT", "NN", "TN", "second", "128x128x32", "Double Wide", "4x1 Ahead", "4x1 Plain"] {
            assert!(found.iter().any(|found| format!("{} {}", found.key, found.candidate).contains(part)), "no {part}");
        }
    }

    /// A quantized weight goes through cooperative matrices the other way round, with and without a branch beside it.
    #[test]
    fn an_unpacked_weight_is_worth_the_same_the_other_way_round() {
        let (tokens, n, k, rank) = (64, 192, 128, 16);
        for (dtype, branch) in [(DType::Nf4, true), (DType::Nf4, false), (DType::Int8, true)] {
            let mut outputs = Vec::new();
            for cooperative in [false, true] {
                let software = adapters().iter().find(|adapter| adapter.software).map(|adapter| adapter.index);
                let options = Options { adapter: software, compute: Some(DType::F16), portable: false, narrow: None };
                let mut builder = WorkloadBuilder::new();
                let mut buffer = |name: &str, shape: [usize; 2], dtype, kind| {
                    (builder.persistent(name, &shape, dtype, kind), shape[0] * shape[1])
                };
                let half = [("input", [tokens, k]), ("a", [rank, k]), ("b", [n, rank])];
                let filled = half.map(|(name, shape)| buffer(name, shape, DType::F16, Kind::Output));
                let (output, elements) = buffer("output", [tokens, n], DType::F16, Kind::Output);
                let (middle, _) = buffer("middle", [tokens, rank], DType::F16, Kind::Output);
                let (weight, _) = buffer("weight", [n, k], dtype, Kind::Weight);
                let scale = builder.persistent("scale", &[1], DType::F32, Kind::Scalar);
                let columns = |buffer, width| Columns { buffer, start: 0, width };
                let [(input, _), (a, _), (b, _)] = filled;
                let lora = branch.then_some(Lora { a, b, middle: columns(middle, rank), scale, dropout: None });
                let projection = Projection { weight, bias: None, output: columns(output, n), lora };
                builder.begin("linear", Role::Evaluate, 0);
                builder.push("linear", Op::Linear { input, projections: vec![projection] });
                builder.end();
                let plan = plan::plan(builder.finish(), target(&options).expect("a target")).expect("a plan");
                let mut gpu = Gpu::open(&options).expect("opens");
                (gpu.cooperative, gpu.emulates) = (cooperative, cooperative);
                let source = Arc::new(Noise([n, k]));
                let session = WgpuSession::open_on(Arc::new(gpu), plan, source, Choices::new(), false);
                let mut session = session.expect("opens");
                for (id, count) in filled {
                    let values: Vec<half::f16> =
                        (0..count).map(|i| half::f16::from_f32(noise(i + 1000 * id.0 as usize))).collect();
                    session.write(id, bytemuck::cast_slice(&values)).expect("written");
                }
                session.write(scale, bytemuck::cast_slice(&[2.0f32])).expect("written");
                session.run(0).expect("runs");
                let mut found = vec![half::f16::ZERO; elements];
                session.read(output, bytemuck::cast_slice_mut(&mut found)).expect("read");
                outputs.push(found.into_iter().map(half::f16::to_f32).collect::<Vec<f32>>());
            }
            let size = outputs[0].iter().fold(0.0f32, |size, value| size.max(value.abs()));
            assert!(size > 1.0, "{size}");
            let apart = outputs[0].iter().zip(&outputs[1]).fold(0.0f32, |apart, (a, b)| apart.max((a - b).abs()));
            assert!(apart < 4e-3 * size, "{} with a branch {branch}: {apart} of {size}", dtype.name());
        }
    }

    #[test]
    fn sums_by_subgroups_agree_with_those_by_halves() {
        let found = candidates(|builder| {
            let mut buffer = |name: &str, shape: &[usize], dtype| builder.persistent(name, shape, dtype, Kind::Output);
            // Columns that fill the last round of a workgroup in part.
            let (rows, columns) = (5, 328);
            let input = buffer("input", &[rows, columns], DType::F16);
            let output = buffer("output", &[rows, columns], DType::F16);
            let weight = buffer("weight", &[columns], DType::F32);
            let inverse_rms = buffer("inverse_rms", &[rows], DType::F32);
            let (residual, sum, epsilon, weight_offset) = (None, None, 1e-5, 0.0);
            vec![Op::RmsNorm { input, residual, sum, weight, output, inverse_rms, epsilon, weight_offset }]
        });
        let names: Vec<&str> = found.iter().map(|found| found.candidate.as_str()).collect();
        assert_eq!(names, ["halves", "subgroups"]);
        let fine = |found: &Measurement| !matches!(found.verdict, Verdict::Refused | Verdict::Differs(_));
        assert!(found.iter().all(fine), "{found:#?}");
    }
}
