//! NVRTC's functions, from the library that was chosen: the loader may know another by one of its names.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use super::driver::failed;
use super::library::{self, Handle, Library};
use crate::backend::EngineError;

type Program = *mut c_void;
type Status = c_int;

/// The functions used here, by their names.
macro_rules! functions {
    ($($field:ident: $name:literal, $type:ty;)*) => {
        pub(super) struct Nvrtc { $($field: $type,)* }

        impl Nvrtc {
            /// None where the library lacks one.
            pub fn of(handle: Handle) -> Option<Self> {
                Some(Self {
                    $($field: {
                        let symbol = handle.symbol($name)?;
                        // SAFETY: NVRTC's function of this name has this type (nvrtc.h).
                        unsafe { std::mem::transmute::<*mut c_void, $type>(symbol) }
                    },)*
                })
            }
        }
    };
}

functions! {
    version: c"nvrtcVersion", unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status;
    error_string: c"nvrtcGetErrorString", unsafe extern "C" fn(Status) -> *const c_char;
    architecture_count: c"nvrtcGetNumSupportedArchs", unsafe extern "C" fn(*mut c_int) -> Status;
    architectures: c"nvrtcGetSupportedArchs", unsafe extern "C" fn(*mut c_int) -> Status;
    create: c"nvrtcCreateProgram",
        unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> Status;
    destroy: c"nvrtcDestroyProgram", unsafe extern "C" fn(*mut Program) -> Status;
    compile: c"nvrtcCompileProgram", unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status;
    binary_size: c"nvrtcGetCUBINSize", unsafe extern "C" fn(Program, *mut usize) -> Status;
    binary: c"nvrtcGetCUBIN", unsafe extern "C" fn(Program, *mut c_char) -> Status;
    log_size: c"nvrtcGetProgramLogSize", unsafe extern "C" fn(Program, *mut usize) -> Status;
    log: c"nvrtcGetProgramLog", unsafe extern "C" fn(Program, *mut c_char) -> Status;
}

impl Nvrtc {
    /// That of the library found on this machine.
    pub fn found() -> Result<Self, EngineError> {
        let found = library::find().iter().find(|found| found.library == Library::Nvrtc);
        let nvrtc = found.and_then(|found| found.handle).and_then(Self::of);
        nvrtc.ok_or_else(|| failed("NVRTC was not found, or is not one"))
    }

    pub fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to live integers.
        unsafe { (self.version)(&mut major, &mut minor) };
        (major, minor)
    }

    /// Whether it compiles for a compute capability.
    pub fn knows(&self, (major, minor): (i32, i32)) -> bool {
        let mut count = 0;
        // SAFETY: points to a live integer.
        unsafe { (self.architecture_count)(&mut count) };
        let mut known = vec![0; count.max(0) as usize];
        // SAFETY: the vector has the size that NVRTC asks for.
        count > 0 && unsafe { (self.architectures)(known.as_mut_ptr()) } == 0 && known.contains(&(10 * major + minor))
    }

    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NVRTC gives a C string that lives as long as the library.
        Err(unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy().into_owned())
    }

    /// Machine code of a source.
    ///
    /// # Errors
    /// With the compiler's log.
    pub fn machine_code(&self, text: &CStr, name: &CStr, options: &[CString]) -> Result<Vec<u8>, String> {
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the strings outlive the call; there are no headers.
        self.check(unsafe { (self.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, none, none) })?;
        let binary = self.compiled(program, options);
        // SAFETY: created above, destroyed only here.
        unsafe { (self.destroy)(&mut program) };
        binary
    }

    fn compiled(&self, program: Program, options: &[CString]) -> Result<Vec<u8>, String> {
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive until the caller destroys it, the options until the end.
        let status = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        self.check(status).map_err(|error| {
            let mut bytes = 0;
            // SAFETY: as above.
            unsafe { (self.log_size)(program, &mut bytes) };
            let mut log = vec![0u8; bytes];
            // SAFETY: the vector has the size that NVRTC asks for.
            unsafe { (self.log)(program, log.as_mut_ptr().cast()) };
            let log: Vec<u8> = log.into_iter().take_while(|&byte| byte != 0).collect();
            format!("{error}\n{}", String::from_utf8_lossy(&log))
        })?;
        let mut bytes = 0;
        // SAFETY: the program was compiled.
        self.check(unsafe { (self.binary_size)(program, &mut bytes) })?;
        let mut binary = vec![0u8; bytes];
        // SAFETY: the vector has the size that NVRTC asks for.
        self.check(unsafe { (self.binary)(program, binary.as_mut_ptr().cast()) })?;
        Ok(binary)
    }
}
