//! Every kernel compiles for every architecture it has to run on, on a machine without a card.
//!
//! NVRTC is found as the engine finds it; `tests/run.sh` installs it for the Python of its virtual environment.

use tune::backend::cuda::compile::{Define, SOURCES, Source, compile, compiler_version};
use tune::backend::cuda::library::{self, Library};
use tune::backend::cuda::{backward_sizes, forward_sizes};

/// With the compute capability of each.
const ARCHITECTURES: [(&str, (i32, i32)); 6] = [
    ("sm_80", (8, 0)),
    ("sm_86", (8, 6)),
    ("sm_89", (8, 9)),
    ("sm_90a", (9, 0)),
    ("sm_100", (10, 0)),
    ("sm_120", (12, 0)),
];

fn attention(head_dim: usize, window: usize, softcap: f32, sizes: &[(&'static str, usize)]) -> Vec<Define> {
    let mut defines: Vec<Define> = vec![
        ("HEADS", "8".into()),
        ("KV_HEADS", "2".into()),
        ("HEAD_DIM", head_dim.to_string()),
        ("SCALE", "0.125f".into()),
        ("WINDOW", window.to_string()),
        ("SOFTCAP", format!("{softcap:?}f")),
    ];
    defines.extend(sizes.iter().map(|(name, value)| (*name, value.to_string())));
    defines
}

/// With sums for a branch of the largest rank that is taken.
fn with_branch(sizes: &[(&'static str, usize)]) -> Vec<(&'static str, usize)> {
    sizes.iter().copied().chain([("MIDDLE_RANK", 32)]).collect()
}

/// What a file is compiled with: attention for each size of head.
fn variants(source: &Source, (architecture, capability): (&str, (i32, i32))) -> Vec<Vec<Define>> {
    let mut variants = Vec::new();
    for (d, window, softcap) in [(64, 0, 0.0), (80, 100, 30.0), (128, 0, 0.0), (192, 0, 0.0), (256, 0, 0.0)] {
        match source.name {
            "attention" => {
                variants.push(attention(d, window, softcap, &forward_sizes(d)));
                variants.push(attention(d, window, softcap, &with_branch(&forward_sizes(d))));
                variants.push(attention(d, window, softcap, &backward_sizes(d, capability)));
            }
            "attention_hopper" => {
                if architecture == "sm_90a" && matches!(d, 64 | 128) {
                    let pass = |name| attention(d, window, softcap, &[(name, 1)]);
                    variants.extend(["FORWARD", "BACKWARD"].map(pass));
                    variants.push(attention(d, window, softcap, &with_branch(&[("FORWARD", 1)])));
                }
            }
            "lora" => {
                return ["16", "32", "64"].into_iter().map(|rank| vec![("RANK", rank.to_string())]).collect();
            }
            "lora_glu" => {
                let shapes = [("16", "0"), ("16", "1"), ("32", "0"), ("32", "1")];
                let passes = ["FORWARD", "BACKWARD", "BACKWARD_READER"];
                let variant = |((rank, gelu), pass): ((&str, &str), &'static str)| {
                    vec![("RANK", rank.into()), ("GELU_GATE", gelu.into()), (pass, "1".into())]
                };
                return shapes.into_iter().flat_map(|shape| passes.map(|pass| variant((shape, pass)))).collect();
            }
            // Older cards have no 8-bit floats.
            "fp8" if matches!(architecture, "sm_80" | "sm_86") => return Vec::new(),
            _ => return vec![Vec::new()],
        }
    }
    variants
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let found =
        library::find().iter().find(|found| found.library == Library::Nvrtc).and_then(|found| found.path.clone());
    let Some(path) = found else {
        panic!("NVRTC was not found; `pip install nvidia-cuda-nvrtc` in the active Python, as tests/run.sh does");
    };
    let (major, minor) = compiler_version().expect("a version");
    println!("NVRTC {major}.{minor}, {}", path.display());
    let mut failures = Vec::new();
    let mut compiled = 0;
    for source in SOURCES {
        for (architecture, capability) in ARCHITECTURES {
            for defines in variants(source, (architecture, capability)) {
                match compile(source, &defines, architecture) {
                    Ok(binary) => assert!(!binary.is_empty(), "{} for {architecture} is empty", source.name),
                    Err(error) => failures.push(error.to_string()),
                }
                compiled += 1;
            }
        }
    }
    assert!(failures.is_empty(), "{} of {compiled} did not compile:\n{}", failures.len(), failures.join("\n"));
    println!("{compiled} kernel files compiled");
}
