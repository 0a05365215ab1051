//! Where NVIDIA's libraries are: on the loader's path, in CUDA toolkit folders, in the `nvidia/*/lib` folders of
//! the active Python, and in the user's data folder, where `tune doctor --fix` puts them. Never in the working
//! directory.

use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::nvrtc::Nvrtc;

/// A library that the engine loads at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Comes with the driver.
    Driver,
    /// The kernel compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
}

/// What was found of a library.
#[derive(Clone, Debug)]
pub struct Found {
    pub library: Library,
    /// The name or path under which it was loaded; none when it was not found.
    pub path: Option<PathBuf>,
    pub(super) handle: Option<Handle>,
    /// One that was found and is of no use with this machine's card: which, and why.
    pub unfit: Option<String>,
}

/// A loaded library, never unloaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handle(*mut c_void);

// SAFETY: the loader's handles may be used from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub fn symbol(self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is the loader's, the name a C string.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    }
}

impl Library {
    pub const ALL: [Library; 3] = [Library::Driver, Library::Nvrtc, Library::CublasLt];

    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "the NVIDIA driver (libcuda)",
            Library::Nvrtc => "NVRTC",
            Library::CublasLt => "cuBLASLt",
        }
    }

    /// File names by which the loader may know it, newest first. Code that a newer major version of CUDA makes does not run
    /// on a driver of an older one: `driver` is the major version that the driver runs, where there is one.
    fn files(self, driver: Option<u32>) -> &'static [&'static str] {
        match (self, driver) {
            (Library::Driver, _) => &["libcuda.so.1", "libcuda.so"],
            (Library::Nvrtc, Some(..=12)) => &["libnvrtc.so.12"],
            (Library::Nvrtc, _) => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            (Library::CublasLt, Some(..=12)) => &["libcublasLt.so.12"],
            (Library::CublasLt, _) => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
        }
    }

    /// The package of NVIDIA's that holds it, for `pip` and `uv`, with the versions that a driver runs. Up to CUDA 12 the
    /// name has the major version in it. None for the driver itself.
    pub fn package(self, driver: Option<u32>) -> Option<&'static str> {
        match (self, driver) {
            (Library::Driver, _) => None,
            (Library::Nvrtc, Some(..=12)) => Some("nvidia-cuda-nvrtc-cu12"),
            (Library::Nvrtc, _) => Some("nvidia-cuda-nvrtc<14"),
            (Library::CublasLt, Some(..=12)) => Some("nvidia-cublas-cu12"),
            (Library::CublasLt, _) => Some("nvidia-cublas<14"),
        }
    }

    /// Megabytes to download for a driver: the wheels for x86-64 as they were at the end of 2026.
    pub fn megabytes(self, driver: Option<u32>) -> u32 {
        match (self, driver) {
            (Library::Driver, _) => 0,
            (Library::Nvrtc, Some(..=12)) => 90,
            (Library::Nvrtc, _) => 60,
            (Library::CublasLt, Some(..=12)) => 580,
            (Library::CublasLt, _) => 445,
        }
    }
}

/// Loads a library so that later look-ups by its plain name find it. Global, and never unloaded.
fn load(path: &Path) -> Option<Handle> {
    let name = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: the name is a C string; NVIDIA's libraries run no code of ours when they are loaded.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    (!handle.is_null()).then_some(Handle(handle))
}

/// Finds and loads all libraries, once a process.
pub fn find() -> &'static [Found] {
    static FOUND: OnceLock<Vec<Found>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let folders = folders();
        // The driver comes first: its version says which of the others to take.
        let mut driver = None;
        let find = |library| {
            let found = find_one(library, &folders, driver);
            if library == Library::Driver && found.path.is_some() {
                driver = driver_major();
            }
            found
        };
        Library::ALL.into_iter().map(find).collect()
    })
}

/// Major version of the newest CUDA that the driver runs, once it was found.
pub fn driver_major() -> Option<u32> {
    let mut version = 0;
    // SAFETY: callers have found the driver; the pointer is a live integer.
    let known = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result().is_ok();
    known.then_some(version.unsigned_abs() / 1000)
}

fn find_one(library: Library, folders: &[PathBuf], driver: Option<u32>) -> Found {
    let mut found = Found { library, path: None, handle: None, unfit: None };
    let names = library.files(driver).iter().map(PathBuf::from);
    let places: Vec<PathBuf> = match library {
        Library::Driver => ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64"].map(PathBuf::from).into(),
        _ => folders.to_vec(),
    };
    let within = |folder: &PathBuf| library.files(driver).iter().map(|file| folder.join(file)).collect::<Vec<_>>();
    // What was brought for this program comes before what happens to be there.
    let own = own_folders();
    let (brought, there): (Vec<_>, Vec<_>) = places.iter().partition(|folder| own.contains(folder));
    let brought = brought.into_iter().flat_map(within);
    for path in brought.chain(names).chain(there.into_iter().flat_map(within)) {
        if path.is_absolute() {
            if !path.exists() {
                continue;
            }
            // NVRTC opens its built-ins by name, where the loader would not look.
            if let Some(folder) = path.parent().filter(|_| library == Library::Nvrtc) {
                list(folder, "libnvrtc-builtins.so").iter().for_each(|path| {
                    load(path);
                });
            }
        }
        let Some(handle) = load(&path) else { continue };
        match unfit(library, handle, driver) {
            Some(why) => found.unfit = found.unfit.or(Some(format!("{}: {why}", path.display()))),
            None => {
                (found.path, found.handle) = (Some(path), Some(handle));
                break;
            }
        }
    }
    found
}

/// Why a library is of no use with the cards of this machine, if it is: a compiler may be older than they are.
fn unfit(library: Library, handle: Handle, driver: Option<u32>) -> Option<String> {
    if library != Library::Nvrtc {
        return None;
    }
    let Some(nvrtc) = Nvrtc::of(handle) else { return Some("it is older than CUDA 11.2".into()) };
    // Without a driver nothing can be asked, and any compiler will do.
    let cards = driver.and_then(|_| super::driver::cards().ok()).unwrap_or_default();
    let usable = |card: &super::CardFacts| super::compile::architecture(card.architecture).is_ok();
    let unknown = cards.iter().filter(|card| usable(card)).find(|card| !nvrtc.knows(card.architecture))?;
    let ((major, minor), (of, of_minor)) = (nvrtc.version(), unknown.architecture);
    Some(format!("NVRTC {major}.{minor} does not know {} (compute capability {of}.{of_minor})", unknown.name))
}

/// Why cuBLASLt cannot be used though it was found, if so: the loader knows another by a name that comes first, which this
/// driver does not run.
pub fn conflict() -> Option<String> {
    let (driver, version) = (driver_major()?, super::product::version() as u32);
    let major = version / 10_000;
    (major > driver).then(|| {
        let minor = version / 100 % 100;
        format!(
            "the loader's own libcublasLt.so is of CUDA {major}.{minor}, and the driver runs CUDA {driver}: take its folder out \
             of LD_LIBRARY_PATH"
        )
    })
}

/// The first library that is missing, if any.
pub fn missing() -> Option<Library> {
    find().iter().find(|found| found.path.is_none()).map(|found| found.library)
}

/// Folder into which `tune doctor --fix` installs NVIDIA's packages.
pub fn own_folder() -> Option<PathBuf> {
    directories::ProjectDirs::from("", "", "tune").map(|folders| folders.data_dir().join("nvidia-libraries"))
}

/// Where `tune doctor --fix` has put libraries: each package has a folder of its own, for two that share one overwrite each other.
fn own_folders() -> Vec<PathBuf> {
    let Some(own) = own_folder() else { return Vec::new() };
    // Once they had one together.
    list(&own, "").iter().chain([&own]).flat_map(|package| package_folders(package)).collect()
}

/// Whether a library's file is where `tune doctor --fix` puts it.
pub(super) fn was_brought(library: Library) -> bool {
    let files = library.files(driver_major());
    own_folders().iter().any(|folder| files.iter().any(|file| folder.join(file).exists()))
}

/// Folders to search, in order; absolute ones only.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = std::env::var_os(name) {
            folders.push(PathBuf::from(&root).join("lib64"));
            folders.push(PathBuf::from(&root).join("targets/x86_64-linux/lib"));
        }
    }
    let mut toolkits = list("/usr/local", "cuda");
    toolkits.sort();
    toolkits.reverse();
    folders.extend(toolkits.into_iter().map(|toolkit| toolkit.join("lib64")));
    folders.extend(own_folders());
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(root) = std::env::var_os(environment) {
            folders.extend(python_folders(Path::new(&root)));
        }
    }
    // The Python on the path: its folder's parent is its prefix.
    if let Some(path) = std::env::var_os("PATH") {
        for folder in std::env::split_paths(&path).filter(|folder| folder.is_absolute()) {
            let python = folder.join("python3");
            if python.exists() {
                for python in [Some(python.clone()), python.canonicalize().ok()].into_iter().flatten() {
                    if let Some(prefix) = python.parent().and_then(Path::parent) {
                        folders.extend(python_folders(prefix));
                    }
                }
                break;
            }
        }
    }
    folders.retain(|folder| folder.is_absolute());
    folders
}

/// Entries of a folder whose name starts with `prefix`.
fn list(folder: impl AsRef<Path>, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

/// `nvidia/*/lib` below the site folders of a Python prefix.
fn python_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for version in list(prefix.join("lib"), "python3") {
        for site in ["site-packages", "dist-packages"] {
            found.extend(package_folders(&version.join(site)));
        }
    }
    found
}

/// `nvidia/*/lib` in one folder of packages.
fn package_folders(site: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = list(site.join("nvidia"), "").into_iter().map(|folder| folder.join("lib")).collect();
    // The packages for CUDA 13 share one folder; it comes before the older, separate ones.
    found.sort_by_key(|folder| !folder.parent().is_some_and(|parent| parent.ends_with("cu13")));
    found.retain(|folder| folder.is_dir());
    found
}

#[cfg(test)]
mod tests {
    use super::Library;

    #[test]
    fn an_older_driver_gets_the_libraries_that_run_on_it() {
        for library in [Library::Nvrtc, Library::CublasLt] {
            assert!(library.files(Some(12)).iter().all(|file| file.ends_with(".so.12")));
            assert!(library.package(Some(12)).is_some_and(|package| package.ends_with("-cu12")));
            assert!(library.files(Some(13))[0].ends_with(".so.13"));
            assert!(library.package(Some(13)).is_some_and(|package| package.ends_with("<14")));
        }
    }
}
