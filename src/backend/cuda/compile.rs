//! Kernels: sources compiled by NVRTC for a card, and the cache of what was compiled.
//!
//! A cached kernel is keyed by source, options, compiler version and architecture, carries a checksum, and is
//! written under a temporary name and renamed.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use cudarc::driver::{result as driver, sys as sys_driver};
use sha2::{Digest, Sha256};

use super::driver::{Card, During, failed, unsupported};
use super::nvrtc::Nvrtc;
use crate::backend::EngineError;

/// A file of kernels.
pub struct Source {
    pub name: &'static str,
    text: &'static str,
    /// What is put before it: file names and texts.
    headers: &'static [(&'static str, &'static str)],
}

macro_rules! header {
    ($name:literal) => {
        ($name, include_str!(concat!("../../../kernels/", $name)))
    };
}

macro_rules! source {
    ($name:literal $(, $header:literal)*) => {
        Source {
            name: $name,
            text: include_str!(concat!("../../../kernels/", $name, ".cu")),
            headers: &[header!("prelude.cuh") $(, header!($header))*],
        }
    };
}

/// A macro that a file is compiled with.
pub type Define = (&'static str, String);

/// Every file in `kernels/`.
#[rustfmt::skip]
pub const SOURCES: &[Source] = &[
    source!("adamw"),
    source!("attention", "tensor_core.cuh", "attention_shape.cuh"),
    source!("attention_hopper", "tensor_core.cuh", "hopper.cuh", "attention_shape.cuh", "attention_tiles.cuh"),
    source!("bias"),
    source!("cached_attention"),
    source!("cast", "checkpoint.cuh"),
    source!("column_sum"),
    source!("cross_entropy"),
    source!("dropout"),
    source!("embedding"),
    source!("fp8", "checkpoint.cuh"),
    source!("glu", "glu.cuh"),
    source!("int8", "checkpoint.cuh"),
    source!("lora", "tensor_core.cuh", "lora_sums.cuh", "lora.cuh"),
    source!("lora_delta", "tensor_core.cuh", "lora_sums.cuh", "lora_rows.cuh"),
    source!("lora_glu", "tensor_core.cuh", "glu.cuh", "lora_sums.cuh", "lora.cuh"),
    source!("lora_norm", "tensor_core.cuh", "hopper.cuh", "lora_sums.cuh", "lora_rows.cuh"),
    source!("lora_rope", "tensor_core.cuh", "lora_sums.cuh", "lora_rows.cuh"),
    source!("nf4", "checkpoint.cuh"),
    source!("rms_norm"),
    source!("rope"),
];

impl Source {
    pub fn named(name: &str) -> Option<&'static Source> {
        SOURCES.iter().find(|source| source.name == name)
    }

    /// The whole text that the compiler sees.
    fn text(&self) -> String {
        let headers: String = self.headers.iter().map(|(name, text)| format!("#line 1 \"{name}\"\n{text}\n")).collect();
        format!("{headers}#line 1 \"{}.cu\"\n{}", self.name, self.text)
    }
}

/// The architecture to compile for: `sm_90a` for Hopper, whose matrix instructions need the `a`.
///
/// # Errors
/// For cards before Ampere, which have no bf16 matrix products.
pub fn architecture((major, minor): (i32, i32)) -> Result<String, EngineError> {
    match (major, minor) {
        (..=7, _) => Err(unsupported(format!(
            "compute capability {major}.{minor} has no bf16 matrix products (8.0 and newer do); use --device wgpu"
        ))),
        (9, 0) => Ok("sm_90a".into()),
        _ => Ok(format!("sm_{major}{minor}")),
    }
}

/// Version of the compiler in use.
///
/// # Errors
/// When there is none.
pub fn compiler_version() -> Result<(i32, i32), EngineError> {
    Ok(Nvrtc::found()?.version())
}

/// What kernels are made with: the compiler, and a digest of all sources.
pub(super) fn made_with() -> Result<String, EngineError> {
    let (major, minor) = compiler_version()?;
    let mut digest = Sha256::new();
    SOURCES.iter().for_each(|source| digest.update(source.text()));
    let digest: String = digest.finalize().as_slice()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("NVRTC {major}.{minor}, kernels {digest}"))
}

fn options(architecture: &str, defines: &[Define]) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".into(), "-lineinfo".into()];
    options.extend(defines.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
    options
}

/// Compiles a file to machine code.
///
/// # Errors
/// With the compiler's log.
pub fn compile(source: &Source, defines: &[Define], architecture: &str) -> Result<Vec<u8>, EngineError> {
    let text = |text: String| CString::new(text).map_err(|_| failed("a kernel file or option holds a zero byte"));
    let (source_text, name) = (text(source.text())?, text(format!("{}.cu", source.name))?);
    let options = options(architecture, defines).into_iter().map(text).collect::<Result<Vec<_>, _>>()?;
    Nvrtc::found()?
        .machine_code(&source_text, &name, &options)
        .map_err(|error| failed(format!("compiling {}.cu for {architecture}: {error}", source.name)))
}

/// Compiled kernels in the user's private cache folder.
#[derive(Clone)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

impl KernelCache {
    /// The cache of this user; without a home folder nothing is kept.
    pub fn open() -> Self {
        Self { folder: super::cache_folder().map(|folder| folder.join("kernels")) }
    }

    /// The kernel file's machine code, compiled now when it is not in the cache.
    ///
    /// # Errors
    /// When it does not compile; trouble with the cache is none.
    pub fn load(&self, source: &Source, defines: &[Define], architecture: &str) -> Result<Vec<u8>, EngineError> {
        let (major, minor) = compiler_version()?;
        let mut hash = Sha256::new();
        hash.update(source.text());
        hash.update(options(architecture, defines).join(" "));
        hash.update(format!("nvrtc {major}.{minor}"));
        let key: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let path =
            self.folder.as_ref().map(|folder| folder.join(format!("{}-{architecture}-{key}.cubin", source.name)));
        if let Some(binary) = path.as_deref().and_then(read_checked) {
            return Ok(binary);
        }
        let binary = compile(source, defines, architecture)?;
        if let Some(path) = path
            && let Err(error) = write_checked(&path, &binary)
        {
            tracing::debug!("compiled kernels are not kept: {error}");
        }
        Ok(binary)
    }
}

/// Contents of a file that begins with their SHA-256; none when it is missing or damaged.
pub(super) fn read_checked(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (digest, contents) = bytes.split_at_checked(32)?;
    (Sha256::digest(contents).as_slice() == digest).then(|| contents.to_vec())
}

pub(super) fn write_checked(path: &Path, contents: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut bytes = Sha256::digest(contents).to_vec();
    bytes.extend_from_slice(contents);
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}

/// A kernel file with the macros that it is compiled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub file: &'static str,
    pub defines: Vec<Define>,
}

impl From<&'static str> for Variant {
    fn from(file: &'static str) -> Self {
        Self { file, defines: Vec::new() }
    }
}

/// Machine code of some files.
type Compiled = Result<Vec<(Variant, Vec<u8>)>, EngineError>;

/// Compiles files side by side, on the threads of the pool that this is called from.
fn compile_all(cache: &KernelCache, architecture: &str, variants: &[Variant]) -> Compiled {
    use rayon::prelude::*;
    let compile = |variant: &Variant| {
        let file = variant.file;
        let source = Source::named(file).ok_or_else(|| failed(format!("there is no kernel file {file}")))?;
        Ok((variant.clone(), cache.load(source, &variant.defines, architecture)?))
    };
    variants.par_iter().map(compile).collect()
}

fn no_threads(error: &dyn std::error::Error) -> EngineError {
    failed(format!("no threads to compile kernels on: {error}; end other programs, or raise the limit (ulimit -u)"))
}

/// Files on their way to machine code.
pub(super) struct Compiling(Option<JoinHandle<Compiled>>);

impl Compiling {
    /// On threads of their own, for those of the pool have other work meanwhile: as many as the host has cores.
    fn start(cache: KernelCache, architecture: String, variants: Vec<Variant>) -> Result<Self, EngineError> {
        let compile = move || {
            let pool = rayon::ThreadPoolBuilder::new().build();
            let pool = pool.map_err(|error| no_threads(&error))?;
            pool.install(|| compile_all(&cache, &architecture, &variants))
        };
        let thread = std::thread::Builder::new().name("compiling kernels".into()).spawn(compile);
        Ok(Self(Some(thread.map_err(|error| no_threads(&error))?)))
    }

    fn wait(mut self) -> Compiled {
        let ended = self.0.take().map(JoinHandle::join);
        ended.unwrap_or(Ok(Ok(Vec::new()))).unwrap_or_else(|_| Err(failed("compiling kernels ended early".to_string())))
    }
}

impl Drop for Compiling {
    fn drop(&mut self) {
        // The process must not end under a running compiler.
        self.0.take().map(JoinHandle::join);
    }
}

/// Kernels loaded on a card, by file and entry.
pub(super) struct Kernels {
    architecture: String,
    cache: KernelCache,
    modules: HashMap<Variant, sys_driver::CUmodule>,
    card: Arc<Card>,
}

impl Kernels {
    pub fn new(card: &Arc<Card>) -> Result<Self, EngineError> {
        let architecture = architecture(card.architecture)?;
        Ok(Self { architecture, cache: KernelCache::open(), modules: HashMap::new(), card: card.clone() })
    }

    /// Compiles files and loads them.
    pub fn prepare(&mut self, variants: &[Variant]) -> Result<(), EngineError> {
        let missing: Vec<Variant> =
            variants.iter().filter(|variant| !self.modules.contains_key(*variant)).cloned().collect();
        let compiled = compile_all(&self.cache, &self.architecture, &missing)?;
        self.load(compiled)
    }

    /// Starts compiling files.
    pub fn start(&self, variants: Vec<Variant>) -> Result<Compiling, EngineError> {
        Compiling::start(self.cache.clone(), self.architecture.clone(), variants)
    }

    /// Waits for files that are being compiled, and loads them.
    pub fn finish(&mut self, compiling: Compiling) -> Result<(), EngineError> {
        self.load(compiling.wait()?)
    }

    fn load(&mut self, compiled: Vec<(Variant, Vec<u8>)>) -> Result<(), EngineError> {
        self.card.bind()?;
        for (variant, binary) in compiled {
            // SAFETY: the bytes are a whole CUBIN, from the compiler or from a checked file.
            let module = unsafe { driver::module::load_data(binary.as_ptr().cast()) }
                .during(&format!("loading the kernels of {}", variant.file))?;
            self.modules.insert(variant, module);
        }
        Ok(())
    }

    /// A kernel of a file.
    pub fn function(&mut self, variant: &Variant, entry: &str) -> Result<sys_driver::CUfunction, EngineError> {
        if !self.modules.contains_key(variant) {
            self.prepare(std::slice::from_ref(variant))?;
        }
        let name = CString::new(entry).map_err(|_| failed("a kernel name holds a zero byte"))?;
        // SAFETY: the module is loaded and lives as long as `self`.
        unsafe { driver::module::get_function(self.modules[variant], name) }
            .during(&format!("finding kernel {entry} of {}.cu", variant.file))
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let _ = self.card.bind();
        for module in self.modules.values() {
            // SAFETY: loaded in `prepare`, unloaded only here, after the session's work has ended.
            let _ = unsafe { driver::module::unload(*module) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_compile_beside_other_work() {
        if compiler_version().is_err() {
            println!("left out: NVRTC was not found");
            return;
        }
        let start = |files: &[&'static str]| {
            let variants = files.iter().map(|&file| Variant::from(file)).collect();
            Compiling::start(KernelCache { folder: None }, "sm_80".into(), variants).expect("it starts")
        };
        let compiled = start(&["cast", "rope", "glu", "bias"]).wait().expect("they compile");
        assert_eq!(
            compiled.iter().map(|(variant, _)| variant.file).collect::<Vec<_>>(),
            ["cast", "rope", "glu", "bias"]
        );
        assert!(compiled.iter().all(|(_, binary)| !binary.is_empty()));
        assert!(start(&[]).wait().expect("nothing to do").is_empty());
        // What is given up comes to its end first.
        drop(start(&["rope", "column_sum"]));
        let error = start(&["cast", "no such file"]).wait().expect_err("there is none");
        assert!(error.to_string().contains("no such file"), "{error}");
    }
}
