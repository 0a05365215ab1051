//! What `tune doctor` says about an engine.

use serde::Serialize;

/// One engine on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `cpu`, `wgpu`, `cuda`.
    pub engine: &'static str,
    /// Whether a run could use it now.
    pub usable: bool,
    /// Devices and adapters, libraries, features; in the order in which they depend on each other.
    pub findings: Vec<Finding>,
}

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `driver`, `cuBLASLt`, `adapter 0`.
    pub name: String,
    pub state: State,
    /// What was found, with version and place; or what is missing.
    pub detail: String,
    /// The one command, or the one thing, that mends it; empty when nothing has to be mended.
    pub mend: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Found,
    /// The engine does without it, more slowly or with less.
    Absent,
    /// The engine needs it.
    Missing,
}

impl Finding {
    pub fn found(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Found, detail: detail.into(), mend: String::new() }
    }

    pub fn absent(name: impl Into<String>, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Absent, detail: detail.into(), mend: mend.into() }
    }

    pub fn missing(name: impl Into<String>, detail: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Missing, detail: detail.into(), mend: mend.into() }
    }
}

/// Every engine's report, the fastest engine first.
pub fn reports() -> Vec<Report> {
    vec![super::cuda::doctor(), super::wgpu::report(), cpu()]
}

fn cpu() -> Report {
    let mut findings = Vec::new();
    match super::cpu::target() {
        Ok(target) => findings.push(Finding::found("processor", target.name)),
        Err(error) => findings.push(Finding::missing("processor", error.to_string(), "")),
    }
    let usable = findings.iter().all(|finding| finding.state == State::Found);
    let vectors = vector_units();
    findings.push(match vectors.is_empty() {
        false => Finding::found("vectors", vectors.join(", ")),
        true => Finding::absent("vectors", "no wide vector units are known on this processor: products are slow", ""),
    });
    Report { engine: "cpu", usable, findings }
}

/// Instruction sets that matrix products use, as the processor reports them.
fn vector_units() -> Vec<&'static str> {
    let mut units = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        for (name, there) in [
            ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
            ("FMA", std::arch::is_x86_feature_detected!("fma")),
            ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
        ] {
            if there {
                units.push(name);
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        units.push("NEON");
    }
    units
}
