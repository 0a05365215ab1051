//! A kernel: a shader file with its constants, bindings and parameters, turned into WGSL and a pipeline.
//!
//! Shaders do not declare their buffers. The engine writes, for each binding `x`, the declaration that fits the
//! buffer's storage type, and the functions through which the shader reads and writes it whatever that type is:
//!
//! ```text
//! x_get(i) -> f32              element i
//! x_get4(i) -> vec4<f32>       elements i..i+4; i is a multiple of 4 where the binding is a vector one
//! x_get4h(i) -> vec4<f16>      the same, for shaders with HALF set
//! x_put(i, value: f32)         where the buffer may be written
//! x_put4(i, value: vec4<f32>)
//! ```
//! i32 and u32 buffers have `x_get` and `x_put` of their own type. Parameters are members of the uniform `p`.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::template;
use crate::program::DType;

/// How the elements of a binding lie in memory, as the shader sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Element {
    F32,
    /// With the adapter's `f16` feature.
    F16,
    /// Eight halves at a time, as four words; the shader indexes it itself.
    F16Words,
    /// Two halves in a word, read only.
    PackedF16,
    /// Two bfloat16 in a word, read only.
    PackedBF16,
    I32,
    U32,
}

impl Element {
    /// The element type of a buffer; none for formats that must be unpacked first.
    pub fn of(dtype: DType, f16: bool) -> Option<Element> {
        match dtype {
            DType::F32 => Some(Element::F32),
            DType::F16 if f16 => Some(Element::F16),
            DType::F16 => Some(Element::PackedF16),
            DType::BF16 => Some(Element::PackedBF16),
            DType::I32 => Some(Element::I32),
            DType::U32 => Some(Element::U32),
            DType::Nf4 | DType::Int8 | DType::Fp8 | DType::Block8 => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Binding {
    pub name: &'static str,
    pub element: Element,
    /// Declared as an array of vec4: rows, offsets and counts are multiples of 4.
    pub vector: bool,
    /// Declared `read_write`. wgpu tracks usage by whole buffer, so that this follows the buffer, not the use.
    pub writable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
}

/// Everything that decides a pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kernel {
    /// File name in `shaders/` without `.wgsl`.
    pub file: &'static str,
    pub constants: BTreeMap<&'static str, u32>,
    pub bindings: Vec<Binding>,
    /// Name and whether it is an f32.
    pub parameters: Vec<(&'static str, bool)>,
}

macro_rules! shaders {
    ($($name:literal),* $(,)?) => {
        /// The text of a shader.
        pub fn source(name: &str) -> Option<&'static str> {
            match name {
                $($name => Some(include_str!(concat!("../../../shaders/", $name, ".wgsl"))),)*
                _ => None,
            }
        }
    };
}

shaders!(
    "adamw",
    "adamw_block8",
    "attention",
    "attention_backward_key_value",
    "attention_backward_key_value_cooperative",
    "attention_backward_query",
    "attention_backward_query_cooperative",
    "attention_backward_tiles",
    "attention_cooperative",
    "attention_delta",
    "attention_mask",
    "attention_tiles",
    "cache_store",
    "cached_attention",
    "cast",
    "column_sum",
    "cross_entropy",
    "dequantize",
    "embedding",
    "embedding_backward",
    "gather_rows",
    "glu",
    "glu_backward",
    "gradient_norm",
    "gradient_norm_total",
    "loss_sum",
    "matmul",
    "matmul_cooperative",
    "matmul_cooperative_load",
    "matmul_cooperative_multiply",
    "matmul_cooperative_stage",
    "noise",
    "partial_sum",
    "random",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "workgroup_reduce",
    "zero",
);

impl Kernel {
    /// The complete WGSL.
    ///
    /// # Errors
    /// A message naming the file and what is wrong with its directives.
    pub fn wgsl(&self) -> Result<String, String> {
        let body = source(self.file).ok_or_else(|| format!("no shader named {}", self.file))?;
        let mut text = String::new();
        let half = self.constants.get("HALF").is_some_and(|&value| value != 0);
        if half || self.bindings.iter().any(|binding| binding.element == Element::F16) {
            text.push_str("enable f16;\n");
        }
        if self.constants.get("COOPERATIVE").is_some_and(|&value| value != 0) {
            text.push_str("enable wgpu_cooperative_matrix;\n");
        }
        for (name, value) in &self.constants {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        text.push_str("struct Parameters {\n");
        for (name, float) in &self.parameters {
            let _ = writeln!(text, "  {name}: {},", if *float { "f32" } else { "u32" });
        }
        text.push_str("}\n@group(0) @binding(0) var<uniform> p: Parameters;\n");
        for (index, binding) in self.bindings.iter().enumerate() {
            declare(&mut text, index + 1, binding, half);
        }
        let include = |name: &str| source(name);
        text.push_str(
            &template::expand(body, &self.constants, &include).map_err(|what| format!("{}: {what}", self.file))?,
        );
        Ok(text)
    }
}

fn declare(text: &mut String, index: usize, binding: &Binding, half: bool) {
    let Binding { name, element, vector, writable } = binding;
    let access = if *writable { "read_write" } else { "read" };
    let item = match (element, vector) {
        (Element::F32, false) => "f32",
        (Element::F32, true) => "vec4<f32>",
        (Element::F16, false) => "f16",
        (Element::F16, true) => "vec4<f16>",
        (Element::F16Words, _) => "vec4<u32>",
        (Element::PackedF16 | Element::PackedBF16, false) => "u32",
        (Element::PackedF16 | Element::PackedBF16, true) => "vec2<u32>",
        (Element::I32, _) => "i32",
        (Element::U32, _) => "u32",
    };
    let _ = writeln!(text, "@group(0) @binding({index}) var<storage, {access}> {name}: array<{item}>;");
    if *element == Element::F16Words {
        return;
    }
    let get4_scalar = format!(
        "fn {name}_get4(i: u32) -> vec4<f32> {{ return vec4<f32>({name}_get(i), {name}_get(i + 1u), {name}_get(i + 2u), {name}_get(i + 3u)); }}\n"
    );
    let put4_scalar = format!(
        "fn {name}_put4(i: u32, v: vec4<f32>) {{ {name}_put(i, v.x); {name}_put(i + 1u, v.y); {name}_put(i + 2u, v.z); {name}_put(i + 3u, v.w); }}\n"
    );
    match (element, vector) {
        (Element::F32 | Element::F16, false) => {
            let _ = writeln!(text, "fn {name}_get(i: u32) -> f32 {{ return f32({name}[i]); }}");
            text.push_str(&get4_scalar);
            if *writable {
                let kind = if *element == Element::F32 { "f32" } else { "f16" };
                let _ = writeln!(text, "fn {name}_put(i: u32, v: f32) {{ {name}[i] = {kind}(v); }}");
                text.push_str(&put4_scalar);
            }
        }
        (Element::F32 | Element::F16, true) => {
            let kind = if *element == Element::F32 { "f32" } else { "f16" };
            let _ = writeln!(text, "fn {name}_get(i: u32) -> f32 {{ return f32({name}[i >> 2u][i & 3u]); }}");
            let _ = writeln!(text, "fn {name}_get4(i: u32) -> vec4<f32> {{ return vec4<f32>({name}[i >> 2u]); }}");
            if *writable {
                let _ = writeln!(
                    text,
                    "fn {name}_put(i: u32, v: f32) {{ {name}[i >> 2u][i & 3u] = {kind}(v); }}\n\
                     fn {name}_put4(i: u32, v: vec4<f32>) {{ {name}[i >> 2u] = vec4<{kind}>(v); }}"
                );
            }
        }
        (Element::PackedF16 | Element::PackedBF16, false) => {
            let value = if *element == Element::PackedF16 {
                format!("unpack2x16float({name}[i >> 1u])[i & 1u]")
            } else {
                format!("bitcast<f32>(({name}[i >> 1u] >> ((i & 1u) * 16u)) << 16u)")
            };
            let _ = writeln!(text, "fn {name}_get(i: u32) -> f32 {{ return {value}; }}");
            text.push_str(&get4_scalar);
        }
        (Element::PackedF16 | Element::PackedBF16, true) => {
            let value = if *element == Element::PackedF16 {
                "vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y))"
            } else {
                "bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u))"
            };
            let _ = writeln!(
                text,
                "fn {name}_get4(i: u32) -> vec4<f32> {{ let w = {name}[i >> 2u]; return {value}; }}\n\
                 fn {name}_get(i: u32) -> f32 {{ return {name}_get4(i & 0xfffffffcu)[i & 3u]; }}"
            );
        }
        (Element::F16Words, _) => {}
        (Element::I32 | Element::U32, _) => {
            let kind = if *element == Element::I32 { "i32" } else { "u32" };
            let _ = writeln!(text, "fn {name}_get(i: u32) -> {kind} {{ return {name}[i]; }}");
            if *writable {
                let _ = writeln!(text, "fn {name}_put(i: u32, v: {kind}) {{ {name}[i] = v; }}");
            }
        }
    }
    let float = !matches!(element, Element::I32 | Element::U32);
    if half && float {
        let value = match (element, vector) {
            (Element::F16, true) => format!("{name}[i >> 2u]"),
            (Element::F16, false) => format!("vec4<f16>({name}[i], {name}[i + 1u], {name}[i + 2u], {name}[i + 3u])"),
            _ => format!("vec4<f16>({name}_get4(i))"),
        };
        let _ = writeln!(text, "fn {name}_get4h(i: u32) -> vec4<f16> {{ return {value}; }}");
    }
}
