//! Where NVIDIA's libraries are: on the loader's path, in CUDA toolkit folders, in the `nvidia/*/lib` folders of
//! the active Python, and in the user's data folder, where `tune doctor --fix` puts them. Never in the working
//! directory.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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
fn load(path: &Path) -> bool {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: the name is a C string; NVIDIA's libraries run no code of ours when they are loaded.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
}

/// Finds and loads all libraries, once a process.
pub fn find() -> &'static [Found] {
    static FOUND: OnceLock<Vec<Found>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let folders = folders();
        // The driver comes first: its version says which of the others to take.
        let mut driver = None;
        let find = |library| {
            let path = find_one(library, &folders, driver);
            if library == Library::Driver && path.is_some() {
                driver = driver_major();
            }
            Found { library, path }
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

fn find_one(library: Library, folders: &[PathBuf], driver: Option<u32>) -> Option<PathBuf> {
    for file in library.files(driver) {
        if load(Path::new(file)) {
            return Some(PathBuf::from(file));
        }
    }
    if library == Library::Driver {
        return ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64"]
            .iter()
            .flat_map(|folder| library.files(driver).iter().map(move |file| Path::new(folder).join(file)))
            .find(|path| load(path));
    }
    for folder in folders {
        for file in library.files(driver) {
            let path = folder.join(file);
            if !path.exists() {
                continue;
            }
            // NVRTC opens its built-ins by name, where the loader would not look.
            if library == Library::Nvrtc {
                list(folder, "libnvrtc-builtins.so").iter().for_each(|path| {
                    load(path);
                });
            }
            if load(&path) {
                return Some(path);
            }
        }
    }
    None
}

/// The first library that is missing, if any.
pub fn missing() -> Option<Library> {
    find().iter().find(|found| found.path.is_none()).map(|found| found.library)
}

/// Folder into which `tune doctor --fix` installs NVIDIA's packages.
pub fn own_folder() -> Option<PathBuf> {
    directories::ProjectDirs::from("", "", "tune").map(|folders| folders.data_dir().join("nvidia-libraries"))
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
    if let Some(own) = own_folder() {
        folders.extend(package_folders(&own));
    }
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
