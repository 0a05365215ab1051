//! Compiled pipelines and measured choices in the user's private cache folder, one file each an adapter and driver. A file is the SHA-256 of its
//! contents, then the contents; what does not agree with its checksum is left aside. Trouble with the cache is none.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::kernel::source;
use super::lower::Choices;
use super::tuning;

const CHECKSUM: usize = 32;

/// Shaders that are chosen between.
const CHOSEN: [&str; 16] = [
    "matmul",
    "matmul_cooperative",
    "matmul_cooperative_load",
    "matmul_cooperative_multiply",
    "matmul_cooperative_stage",
    "attention",
    "attention_mask",
    "attention_tiles",
    "attention_backward_query",
    "attention_backward_key_value",
    "attention_cooperative",
    "attention_backward_query_cooperative",
    "attention_backward_tiles",
    "attention_backward_key_value_cooperative",
    "rms_norm",
    "workgroup_reduce",
];

/// The file of choices.
fn choices_file(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    let folders = directories::ProjectDirs::from("", "", "tune")?;
    Some(folders.cache_dir().join("wgpu").join(format!("choices-{}", made_with(info))))
}

/// What choices are made with: adapter, driver and shaders, as a digest.
pub fn made_with(info: &wgpu::AdapterInfo) -> String {
    let adapter = format!("{} {} {:?} {} {}", info.vendor, info.device, info.backend, info.driver, info.driver_info);
    digest_of(&adapter, CHOSEN.iter().filter_map(|name| source(name)))
}

/// Of the adapter with its driver, and of the shaders: others are other candidates.
fn digest_of<'a>(adapter: &str, shaders: impl Iterator<Item = &'a str>) -> String {
    let mut digest = Sha256::new();
    digest.update(adapter.as_bytes());
    shaders.for_each(|text| digest.update(text.as_bytes()));
    digest.finalize().as_slice()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What was measured on this adapter before.
pub fn load_choices(info: &wgpu::AdapterInfo) -> Choices {
    let contents = choices_file(info).and_then(|path| fs::read(path).ok()).unwrap_or_default();
    let Some((digest, data)) = contents.split_at_checked(CHECKSUM) else { return Choices::new() };
    if Sha256::digest(data).as_slice() != digest {
        return Choices::new();
    }
    std::str::from_utf8(data).map(tuning::parse).unwrap_or_default()
}

/// Keeps all choices made so far.
pub fn save_choices(info: &wgpu::AdapterInfo, choices: &Choices) {
    if let Some(path) = choices_file(info) {
        // Without the file the next run measures again: nothing to tell anyone.
        let _ = write(&path, tuning::text(choices).as_bytes());
    }
}

/// The file for an adapter; none where the backend keeps no pipelines, or there is no home folder.
fn file(info: &wgpu::AdapterInfo) -> Option<PathBuf> {
    let key = wgpu::util::pipeline_cache_key(info)?;
    let folders = directories::ProjectDirs::from("", "", "tune")?;
    // The driver's version is not in the key.
    let driver = Sha256::digest(format!("{} {}", info.driver, info.driver_info).as_bytes());
    let driver: String = driver.as_slice()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    Some(folders.cache_dir().join("wgpu").join(format!("{key}-{driver}")))
}

/// What was kept from an earlier run.
pub fn load(info: &wgpu::AdapterInfo) -> Option<Vec<u8>> {
    let contents = fs::read(file(info)?).ok()?;
    let (digest, data) = contents.split_at_checked(CHECKSUM)?;
    (Sha256::digest(data).as_slice() == digest).then(|| data.to_vec())
}

/// Keeps the pipelines compiled so far; the file appears whole or not at all.
pub fn save(info: &wgpu::AdapterInfo, data: &[u8]) {
    if let Some(path) = file(info) {
        // Without the file the next run compiles again: nothing to tell anyone.
        let _ = write(&path, data);
    }
}

fn write(path: &Path, data: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    private_folder(folder)?;
    let temporary = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(Sha256::digest(data).as_slice())?;
    file.write_all(data)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(unix)]
fn private_folder(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

#[cfg(not(unix))]
fn private_folder(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_kept_for_an_adapter_its_driver_and_the_shaders() {
        let name = |adapter: &str, shaders: [&'static str; 2]| digest_of(adapter, shaders.into_iter());
        let known = name("4318 9008 Vulkan NVIDIA 580.159.04", ["a", "b"]);
        assert_eq!(known, name("4318 9008 Vulkan NVIDIA 580.159.04", ["a", "b"]));
        assert_ne!(known, name("4318 9008 Vulkan NVIDIA 590.1", ["a", "b"]));
        assert_ne!(known, name("4318 9009 Vulkan NVIDIA 580.159.04", ["a", "b"]));
        assert_ne!(known, name("4318 9008 Vulkan NVIDIA 580.159.04", ["a", "b2"]));
        assert!(CHOSEN.iter().all(|name| source(name).is_some()), "every shader that is chosen between is there");
    }
}
