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

    /// File names by which the loader may know it, newest first.
    fn files(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1", "libcuda.so"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
        }
    }

    /// The package of NVIDIA's that holds it, for `pip` and `uv`.
    pub fn package(self) -> Option<&'static str> {
        match self {
            Library::Driver => None,
            Library::Nvrtc => Some("nvidia-cuda-nvrtc"),
            Library::CublasLt => Some("nvidia-cublas"),
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
        Library::ALL.into_iter().map(|library| Found { library, path: find_one(library, &folders) }).collect()
    })
}

fn find_one(library: Library, folders: &[PathBuf]) -> Option<PathBuf> {
    for file in library.files() {
        if load(Path::new(file)) {
            return Some(PathBuf::from(file));
        }
    }
    if library == Library::Driver {
        return ["/usr/lib/wsl/lib", "/usr/local/nvidia/lib64"]
            .iter()
            .flat_map(|folder| library.files().iter().map(move |file| Path::new(folder).join(file)))
            .find(|path| load(path));
    }
    for folder in folders {
        for file in library.files() {
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
