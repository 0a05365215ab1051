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

/// Slices of so many columns, of heads of so many dimensions, in tiles of so many rows.
fn slices((head_dim, width): (usize, usize), rank: usize, rows: usize) -> Vec<Define> {
    let numbers =
        [("HEAD_DIM", head_dim), ("WIDTH", width), ("RANK", rank), ("TILE_ROWS", rows), ("BLOCK_WARPS", rows / 2)];
    numbers.map(|(name, value)| (name, value.to_string())).to_vec()
}

/// Both passes of norms with branches, in slices of few and of most columns.
fn norms() -> Vec<Vec<Define>> {
    let mut variants = Vec::new();
    for (width, slices, readers, rank, weight) in [
        (512, 8, 48, 16, "bf16"),
        (512, 8, 32, 16, "float"),
        (288, 2, 48, 16, "bf16"),
        (512, 4, 0, 16, "bf16"),
        (384, 8, 48, 0, "bf16"),
        (256, 1, 16, 16, "float"),
    ] {
        for (pass, rows) in [("FORWARD", 16), ("BACKWARD", 32)] {
            let numbers = [("WIDTH", width), ("SLICES", slices), ("READERS", readers), ("RANK", rank)];
            let numbers = numbers.into_iter().chain([(pass, 1), ("TILE_ROWS", rows), ("BLOCK_WARPS", rows / 2)]);
            let numbers = numbers.map(|(name, value)| (name, value.to_string()));
            if readers > 0 || pass == "BACKWARD" {
                variants.push(numbers.chain([("WEIGHT", weight.to_string())]).collect());
            }
        }
    }
    variants
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
            // Cards of people at home have shared memory for narrower slices.
            "lora_rope" | "lora_delta" => {
                let rows = if source.name == "lora_rope" { 16 } else { 32 };
                let shapes = [(64, 512), (80, 480), (96, 480), (128, 512), (128, 384), (128, 256), (256, 512)];
                return shapes.into_iter().flat_map(|shape| [16, 32].map(|rank| slices(shape, rank, rows))).collect();
            }
            // Older cards have no clusters.
            "lora_norm" => {
                let older = capability < (9, 0);
                return if older { Vec::new() } else { norms() };
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
