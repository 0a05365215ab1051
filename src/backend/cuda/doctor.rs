//! What `tune doctor` says about this engine, and the command that brings what is missing.

use super::compile::{architecture, compiler_version};
use super::library::{self, Library};
use super::product;
use crate::backend::doctor::{Finding, Report};

/// Looks for driver, cards and libraries. Opens no context.
pub fn doctor() -> Report {
    let mut findings = Vec::new();
    let mut usable = true;
    let without_driver = library::missing() == Some(Library::Driver);
    let useless = useless();
    for found in library::find() {
        let name = found.library.name();
        match &found.path {
            Some(path) => findings.push(Finding::found(name, detail(found.library, &path.display().to_string()))),
            None if without_driver && found.library != Library::Driver => {
                findings.push(Finding::absent(name, "not found, and of no use without the driver", ""));
            }
            None if useless.is_some() && found.library != Library::Driver => {
                usable = false;
                findings.push(Finding::absent(name, "not found, and of no use here", ""));
            }
            None => {
                usable = false;
                let (what, mend): (&str, String) = match found.library {
                    Library::Driver => {
                        ("not on this machine", "install NVIDIA's driver if there is an NVIDIA card".into())
                    }
                    _ => (
                        found
                            .unfit
                            .as_deref()
                            .unwrap_or("not found on the loader's path, in CUDA folders or in the active Python"),
                        "tune doctor --fix".into(),
                    ),
                };
                findings.push(Finding::missing(name, what, mend));
            }
        }
    }
    match super::cards() {
        Ok(cards) => {
            let mut any = false;
            if !cards.is_empty()
                && let Some(what) = super::driver::too_old()
            {
                usable = false;
                findings.push(Finding::missing(
                    "driver's version",
                    what,
                    "update NVIDIA's driver, or use --device wgpu",
                ));
            }
            for card in cards {
                let name = format!("card {}", card.ordinal);
                let (major, minor) = card.architecture;
                let gib = card.total_bytes as f64 / f64::from(1 << 30);
                let detail = format!("{}, {gib:.1} GiB, compute capability {major}.{minor}", card.name);
                match architecture(card.architecture) {
                    Ok(_) => {
                        any = true;
                        findings.push(Finding::found(name, detail));
                    }
                    Err(error) => findings.push(Finding::absent(name, detail, error.reason())),
                }
            }
            usable &= any;
        }
        Err(error) => {
            usable = false;
            findings.push(Finding::missing("cards", error.to_string(), "restart or reinstall NVIDIA's driver"));
        }
    }
    Report { engine: super::ENGINE, usable, findings }
}

fn detail(library: Library, path: &str) -> String {
    match library {
        Library::Driver => path.to_string(),
        Library::Nvrtc => match compiler_version() {
            Ok((major, minor)) => format!("{major}.{minor}, {path}"),
            Err(_) => path.to_string(),
        },
        Library::CublasLt => {
            let version = product::version();
            format!("{}.{}.{}, {path}", version / 10000, version / 100 % 100, version % 100)
        }
    }
}

/// NVIDIA's libraries for a machine that has only the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fix {
    /// What will be brought, and how large it is, for the user to agree to.
    pub about: String,
    /// Programs and arguments, one a library; run as they are.
    pub commands: Vec<Vec<String>>,
    libraries: Vec<Library>,
    /// Whether the program is on this machine; if not, the command is for the user to run elsewhere.
    pub runnable: bool,
}

/// Why NVIDIA's libraries would be of no use on this machine, if so: nothing here runs what they make.
fn useless() -> Option<String> {
    if library::missing() == Some(Library::Driver) {
        return Some("there is no NVIDIA driver on this machine, and its libraries are of no use without one".into());
    }
    let cards = super::cards().ok()?;
    if cards.is_empty() {
        return Some("the NVIDIA driver shows no card".into());
    }
    if let Some(what) = super::driver::too_old() {
        return Some(format!("{what}: update NVIDIA's driver, or use --device wgpu"));
    }
    let words =
        |card: &super::CardFacts| Some(format!("{}: {}", card.name, architecture(card.architecture).err()?.reason()));
    let too_old: Option<Vec<String>> = cards.iter().map(words).collect();
    Some(too_old?.join("; "))
}

/// How to bring the libraries that are missing.
///
/// # Errors
/// Why there is nothing to bring.
pub fn fix() -> Result<Fix, String> {
    let missing: Vec<Library> =
        library::find().iter().filter(|found| found.path.is_none()).map(|found| found.library).collect();
    if let Some(why) = useless() {
        return Err(why);
    }
    if missing.is_empty() {
        return Err("NVIDIA's libraries are there".into());
    }
    let driver = library::driver_major();
    let own = library::own_folder().ok_or("this user has no data folder: set HOME or XDG_DATA_HOME")?;
    let program = ["uv", "pip3", "pip"].into_iter().find(|program| on_path(program));
    let start: &[&str] = match program {
        Some("uv") => &["uv", "pip", "install"],
        Some("pip3") => &["pip3", "install"],
        _ => &["pip", "install"],
    };
    let packages = missing.iter().filter_map(|library| library.package(driver));
    let commands = packages.clone().map(|package| {
        // Of its own: pip leaves a second package out where one has the same folder.
        let name = package.split('<').next().unwrap_or(package);
        let folder = own.join(name).display().to_string();
        // cuBLAS asks for NVRTC too, which would come twice: it uses the one that is loaded.
        let what = ["--target", &folder, package, "--no-deps"];
        start.iter().copied().chain(what).map(str::to_owned).collect()
    });
    let commands = commands.collect();
    let megabytes: u32 = missing.iter().map(|library| library.megabytes(driver)).sum();
    let names = packages.collect::<Vec<_>>().join(" and ");
    let about = format!("{names} from NVIDIA, about {megabytes} MB to download, into {}", own.display());
    Ok(Fix { about, commands, libraries: missing, runnable: program.is_some() })
}

impl Fix {
    /// A library that is not there though its command went well.
    pub fn still_missing(&self) -> Option<&'static str> {
        self.libraries.iter().find(|library| !library::was_brought(**library)).map(|library| library.name())
    }
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.is_absolute() && folder.join(program).is_file())
    })
}
