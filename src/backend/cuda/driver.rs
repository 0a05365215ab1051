//! The driver API as owned values: the opened card, memory, events, graphs. Errors carry what was being done.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::ENGINE;
use crate::backend::EngineError;

/// A device error that says what was being done.
pub(super) fn failed(what: impl Into<String>) -> EngineError {
    EngineError::Device { engine: ENGINE, what: what.into() }
}

pub(super) fn unsupported(what: impl Into<String>) -> EngineError {
    EngineError::Unsupported { engine: ENGINE, what: what.into() }
}

/// Turns a driver's or library's error into the engine's.
pub(super) trait During<T> {
    fn during(self, what: &str) -> Result<T, EngineError>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, what: &str) -> Result<T, EngineError> {
        self.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return EngineError::OutOfMemory { engine: ENGINE, what: what.to_string() };
            }
            let text = error.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
            failed(format!("{what}: {:?} ({text})", error.0))
        })
    }
}

impl<T> During<T> for Result<T, cudarc::cublaslt::result::CublasError> {
    fn during(self, what: &str) -> Result<T, EngineError> {
        self.map_err(|error| failed(format!("{what}: {:?}", error.0)))
    }
}

/// A stream of the card. Everything starts on the first; copies run beside it between two marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Main,
    /// Copies between card and host.
    Copies,
}

/// An opened card: its context, and its streams.
pub(super) struct Card {
    pub name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// The main one.
    pub stream: sys::CUstream,
    copies: sys::CUstream,
    /// Compute capability.
    pub architecture: (i32, i32),
    /// The compute capability whose kernels are chosen ([`CAPABILITY`]).
    pub capability: (i32, i32),
    pub multiprocessors: u32,
    /// Most bytes of shared memory that a block may ask for.
    pub shared_bytes: usize,
}

// SAFETY: the driver's handles may be used from any thread; each call binds the context to its thread first.
unsafe impl Send for Card {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Card {}

/// Names in the environment an older compute capability, as 8.6: kernels are chosen and sized as for such a card, so that what
/// runs there can be tried on a newer one.
const CAPABILITY: &str = "TUNE_CUDA_CAPABILITY";

/// What [`CAPABILITY`] makes of a card's own.
fn chosen_capability(own: (i32, i32)) -> Result<(i32, i32), EngineError> {
    let Some(text) = std::env::var(CAPABILITY).ok().filter(|text| !text.is_empty()) else { return Ok(own) };
    let parsed = text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    match parsed {
        Some(older) if (8, 0) <= older && older <= own => Ok(older),
        _ => Err(unsupported(format!("{CAPABILITY}={text}: it takes 8.0 to {}.{}, the card's own", own.0, own.1))),
    }
}

/// Most bytes of shared memory that a block may ask for on cards of a compute capability (CUDA programming guide, compute
/// capabilities).
pub(super) fn shared_bytes(capability: (i32, i32)) -> usize {
    match capability {
        (8, 0 | 7) => 163 << 10,
        (9..=11, _) => 227 << 10,
        _ => 99 << 10,
    }
}

/// What can be said of a card without a context on it.
#[derive(Clone, Debug)]
pub struct CardFacts {
    pub ordinal: usize,
    pub name: String,
    /// Compute capability.
    pub architecture: (i32, i32),
    /// The compute capability whose kernels are chosen: its own, or an older one that was asked for.
    pub capability: (i32, i32),
    pub total_bytes: u64,
    pub multiprocessors: u32,
    /// Where it sits, `pci-0000:1b:00.0`; the driver numbers cards as each process asks for.
    pub identity: String,
}

impl CardFacts {
    /// Whether it multiplies 8-bit floats.
    pub fn has_fp8(&self) -> bool {
        self.capability >= (8, 9)
    }
}

/// [`CardFacts::identity`]. Parts of a divided card (MIG) sit in one place and are told apart by their own names.
fn identity(device: sys::CUdevice, name: &str) -> Result<String, EngineError> {
    let mut text = [0u8; 32];
    // SAFETY: the driver writes at most as many bytes as it is told, a C string.
    unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as i32, device) }
        .result()
        .during("asking where a card sits")?;
    let place = String::from_utf8_lossy(text.split(|&byte| byte == 0).next().unwrap_or_default()).to_lowercase();
    if !name.contains("MIG") {
        return Ok(format!("pci-{place}"));
    }
    let part = result::device::get_uuid(device).during("asking for the name of a part of a card")?;
    let part: String = part.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
    Ok(format!("pci-{place}-{part}"))
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, EngineError> {
    // SAFETY: the device handle came from the driver.
    unsafe { result::device::get_attribute(device, which) }.during("reading a device attribute")
}

/// The cards that the driver shows, in its order.
///
/// # Errors
/// When the driver is there but does not start.
pub(super) fn cards() -> Result<Vec<CardFacts>, EngineError> {
    result::init().during("starting the NVIDIA driver")?;
    let count = result::device::get_count().during("counting cards")?;
    (0..count).map(facts).collect()
}

fn facts(ordinal: i32) -> Result<CardFacts, EngineError> {
    use sys::CUdevice_attribute as A;
    let device = result::device::get(ordinal).during("opening a card")?;
    let name = result::device::get_name(device).during("reading a card's name")?;
    let architecture = (
        attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let capability = chosen_capability(architecture)?;
    Ok(CardFacts {
        ordinal: ordinal as usize,
        identity: identity(device, &name)?,
        // The name says it, so that a run goes on with the kernels it began with or says why not.
        name: match capability == architecture {
            true => name,
            false => format!("{name} as one of compute capability {}.{}", capability.0, capability.1),
        },
        architecture,
        capability,
        // SAFETY: the device handle came from the driver.
        total_bytes: unsafe { result::device::total_mem(device) }.during("reading a card's memory")? as u64,
        multiprocessors: attribute(device, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
    })
}

impl Card {
    pub fn open(ordinal: usize) -> Result<Arc<Self>, EngineError> {
        result::init().during("starting the NVIDIA driver")?;
        let count = result::device::get_count().during("counting cards")?;
        if ordinal as i64 >= i64::from(count) {
            return Err(unsupported(format!("there is no card {ordinal}; the driver shows {count}")));
        }
        let facts = facts(ordinal as i32)?;
        let device = result::device::get(ordinal as i32).during("opening the card")?;
        // SAFETY: the device handle came from the driver; released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.during("making a context on the card")?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.during("binding the context")?;
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking).during("making a stream");
        let CardFacts { name, architecture, capability, multiprocessors, .. } = facts;
        let most = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let mut shared_bytes = attribute(device, most)? as usize;
        if capability != architecture {
            shared_bytes = shared_bytes.min(self::shared_bytes(capability));
        }
        let (stream, copies) = (stream()?, stream()?);
        Ok(Arc::new(Self {
            name,
            device,
            context,
            stream,
            copies,
            architecture,
            capability,
            multiprocessors,
            shared_bytes,
        }))
    }

    pub fn lane(&self, lane: Lane) -> sys::CUstream {
        match lane {
            Lane::Main => self.stream,
            Lane::Copies => self.copies,
        }
    }

    /// Makes the context current on the calling thread.
    pub fn bind(&self) -> Result<(), EngineError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.during("binding the context")
    }

    /// Waits for all work, copies that run beside it too.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        [self.stream, self.copies].into_iter().try_for_each(|stream| {
            // SAFETY: the streams live as long as `self`.
            unsafe { result::stream::synchronize(stream) }.during("waiting for the card")
        })
    }

    /// Clusters of so many blocks that run at once where a block has a multiprocessor to itself, by any kernel: 0 where a part of a card
    /// has no room for one, none where the driver does not say.
    pub fn clusters(&self, kernel: sys::CUfunction, blocks: usize) -> Option<usize> {
        let shared_bytes = self.shared_bytes * 3 / 4;
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a loaded module.
        unsafe { result::function::set_function_attribute(kernel, most, shared_bytes as i32) }.ok()?;
        // SAFETY: plain words, of which all zeros are a value.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim.x = blocks as u32;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: blocks as u32,
            gridDimY: self.multiprocessors,
            gridDimZ: 1,
            blockDimX: 512,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: 1,
        };
        let mut clusters = 0;
        // SAFETY: all that is pointed to outlives the call.
        unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut clusters, kernel, &raw const config) }.result().ok()?;
        usize::try_from(clusters).ok()
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(u64, u64), EngineError> {
        self.bind()?;
        let (free, total) = result::mem_get_info().during("reading free memory")?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // SAFETY: stream and context were made in `open` and are given back only here; an error at this point
        // means that the context is already lost.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            for stream in [self.stream, self.copies] {
                let _ = result::stream::destroy(stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Device memory, freed when dropped.
pub(super) struct DeviceMemory {
    card: Arc<Card>,
    pub pointer: u64,
    pub bytes: u64,
}

impl DeviceMemory {
    /// Uninitialised memory, 256-byte aligned at least.
    pub fn new(card: &Arc<Card>, bytes: u64, what: &str) -> Result<Self, EngineError> {
        let bytes = bytes.max(16);
        // SAFETY: a context is current; freed in `drop`.
        let pointer = unsafe { result::malloc_sync(bytes as usize) }.during(&format!("{bytes} bytes for {what}"))?;
        Ok(Self { card: card.clone(), pointer, bytes })
    }

    /// Memory with these contents.
    pub fn with(card: &Arc<Card>, bytes: &[u8], what: &str) -> Result<Self, EngineError> {
        let memory = Self::new(card, bytes.len() as u64, what)?;
        write(card, memory.pointer, bytes)?;
        Ok(memory)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _ = self.card.bind();
        // SAFETY: allocated in `new`, freed only here.
        let _ = unsafe { result::free_sync(self.pointer) };
    }
}

/// Copies host bytes to the device, in the order of the stream; the bytes may change when the call returns.
pub(super) fn write(card: &Card, pointer: u64, bytes: &[u8]) -> Result<(), EngineError> {
    if bytes.is_empty() {
        return Ok(());
    }
    // SAFETY: callers pass a range of device memory that they own. The source is pageable memory, which the driver
    // copies aside before it returns.
    unsafe { result::memcpy_htod_async(pointer, bytes, card.stream) }.during("copying to the card")
}

/// Copies device bytes to the host after all work on the stream.
pub(super) fn read(card: &Card, pointer: u64, bytes: &mut [u8]) -> Result<(), EngineError> {
    if bytes.is_empty() {
        return Ok(());
    }
    // SAFETY: callers pass a range of device memory that they own; the stream is waited for before returning.
    unsafe { result::memcpy_dtoh_async(bytes, pointer, card.stream) }.during("copying from the card")?;
    card.synchronize()
}

/// Rows that lie apart on the device and end to end on the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// Bytes of one.
    pub bytes: usize,
    /// Bytes from one to the next on the device.
    pub stride: usize,
    pub count: usize,
}

impl Rows {
    /// From the host, in the order of the stream; the source must not change until it has passed.
    fn send(self, card: &Card, from: *const u8, to: u64) -> Result<(), EngineError> {
        use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_HOST};
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CU_MEMORYTYPE_HOST,
            srcHost: from.cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: self.bytes,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: self.stride,
            WidthInBytes: self.bytes,
            Height: self.count,
        };
        // SAFETY: callers pass memory of these sizes that they own.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, card.stream) }.result().during("copying rows to the card")
    }

    /// To the host, after all work on the stream.
    fn fetch(self, card: &Card, from: u64, to: *mut u8) -> Result<(), EngineError> {
        use sys::CUmemorytype::{CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_HOST};
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: self.stride,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CU_MEMORYTYPE_HOST,
            dstHost: to.cast(),
            dstDevice: 0,
            dstArray: std::ptr::null_mut(),
            dstPitch: self.bytes,
            WidthInBytes: self.bytes,
            Height: self.count,
        };
        // SAFETY: callers pass memory of these sizes that they own; the stream is waited for before returning.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, card.stream) }.result().during("copying rows from the card")?;
        card.synchronize()
    }
}

/// Copies host bytes to rows on the device, and waits.
pub(super) fn write_rows(card: &Card, pointer: u64, rows: Rows, bytes: &[u8]) -> Result<(), EngineError> {
    debug_assert_eq!(bytes.len(), rows.bytes * rows.count);
    rows.send(card, bytes.as_ptr(), pointer)?;
    card.synchronize()
}

/// Copies rows on the device to the host after all work on the stream.
pub(super) fn read_rows(card: &Card, pointer: u64, rows: Rows, bytes: &mut [u8]) -> Result<(), EngineError> {
    debug_assert_eq!(bytes.len(), rows.bytes * rows.count);
    rows.fetch(card, pointer, bytes.as_mut_ptr())
}

/// Copies between any memory that the card reaches, page-locked host memory included, in the order of a stream.
pub(super) fn copy(card: &Card, lane: Lane, from: u64, to: u64, bytes: u64) -> Result<(), EngineError> {
    // SAFETY: callers pass ranges of memory that they own, which live until the stream has passed.
    unsafe { sys::cuMemcpyAsync(to, from, bytes as usize, card.lane(lane)) }.result().during("copying on the card")
}

type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// `cuEventElapsedTime` as all drivers have it; the bindings know only the second one, which came with CUDA 12.8.
fn elapsed_time() -> Result<ElapsedTime, EngineError> {
    static FOUND: OnceLock<Option<ElapsedTime>> = OnceLock::new();
    let find = || {
        // SAFETY: the name is a C string; the driver is loaded, with its names for all to see.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"cuEventElapsedTime".as_ptr()) };
        // SAFETY: the driver's function of this name has this type.
        (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, ElapsedTime>(found) })
    };
    FOUND.get_or_init(find).ok_or_else(|| failed("the driver has no cuEventElapsedTime"))
}

/// The oldest driver that has every function called here (`cuTensorMapEncodeTiled` came with it), as [`version`] counts.
pub(super) const OLDEST: i32 = 12_000;

/// Why this machine's driver is too old, if it is.
pub(super) fn too_old() -> Option<String> {
    let version = version();
    let (major, minor) = (version / 1000, version % 1000 / 10);
    let needed = "12.0 (NVIDIA's driver 525) or newer";
    (version < OLDEST).then(|| format!("the driver runs CUDA {major}.{minor}; the CUDA engine needs {needed}"))
}

/// The newest CUDA version that the driver runs, times a thousand.
pub(super) fn version() -> i32 {
    let mut version = 0;
    // SAFETY: the driver is loaded; the pointer is a live integer.
    let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

/// Zeroes device memory, in the order of the stream.
pub(super) fn zero(card: &Card, pointer: u64, bytes: u64) -> Result<(), EngineError> {
    // SAFETY: callers pass a range of device memory that they own.
    unsafe { result::memset_d8_async(pointer, 0, bytes as usize, card.stream) }.during("zeroing memory")
}

/// Page-locked host memory, for copies that run beside other work, and for kernels to reach at its own address.
pub(super) struct PinnedMemory {
    card: Arc<Card>,
    start: *mut u8,
    bytes: usize,
}

impl PinnedMemory {
    pub fn new(card: &Arc<Card>, bytes: usize) -> Result<Self, EngineError> {
        // SAFETY: a context is current; freed in `drop`.
        let start = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP) }.during(&format!(
            "{bytes} bytes of page-locked memory on the host, which a larger engine.vram, shorter rows or \
                 train.optimizer_memory = \"device\" need less of; `ulimit -l` may limit it"
        ))?;
        Ok(Self { card: card.clone(), start: start.cast(), bytes })
    }

    /// Where kernels find it: with unified addressing, which every 64-bit system has, at the host's own address.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this length, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// Starts copying the first `bytes` to the device; they must not change until the stream has passed.
    pub fn send(&self, pointer: u64, bytes: usize) -> Result<(), EngineError> {
        debug_assert!(bytes <= self.bytes);
        // SAFETY: the source lives as long as `self`, whose owner waits before it drops or refills it.
        unsafe { sys::cuMemcpyHtoDAsync_v2(pointer, self.start.cast::<c_void>(), bytes, self.card.stream) }
            .result()
            .during("streaming weights to the card")
    }
}

impl PinnedMemory {
    /// As [`Self::send`], to rows that lie apart.
    pub fn send_rows(&self, pointer: u64, rows: Rows) -> Result<(), EngineError> {
        debug_assert!(rows.bytes * rows.count <= self.bytes);
        rows.send(&self.card, self.start, pointer)
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let _ = self.card.bind();
        // SAFETY: allocated in `new`, freed only here.
        let _ = unsafe { result::free_host(self.start.cast()) };
    }
}

/// A point in the stream, with a time.
pub(super) struct Event {
    card: Arc<Card>,
    event: sys::CUevent,
}

impl Event {
    pub fn new(card: &Arc<Card>) -> Result<Self, EngineError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).during("making an event")?;
        Ok(Self { card: card.clone(), event })
    }

    /// An event that orders streams and has no time.
    pub fn mark(card: &Arc<Card>) -> Result<Self, EngineError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).during("making an event")?;
        Ok(Self { card: card.clone(), event })
    }

    /// Marks this point of a stream.
    pub fn record_on(&self, lane: Lane) -> Result<(), EngineError> {
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(self.event, self.card.lane(lane)) }.during("recording an event")
    }

    /// Lets a stream go on only when the marked point is reached.
    pub fn hold(&self, lane: Lane) -> Result<(), EngineError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive.
        unsafe { result::stream::wait_event(self.card.lane(lane), self.event, flags) }.during("ordering streams")
    }

    pub fn record(&self) -> Result<(), EngineError> {
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(self.event, self.card.stream) }.during("recording an event")
    }

    pub fn wait(&self) -> Result<(), EngineError> {
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.event) }.during("waiting for an event")
    }

    /// Milliseconds from this event to a later one; both have passed.
    pub fn milliseconds_until(&self, later: &Event) -> Result<f32, EngineError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive, and the pointer is a live number.
        unsafe { elapsed_time()?(&mut milliseconds, self.event, later.event) }.result().during("reading a time")?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.card.bind();
        // SAFETY: created in `new`, destroyed only here.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

/// A captured sequence of launches.
pub(super) struct Graph {
    card: Arc<Card>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

impl Graph {
    /// Records what `launch` puts on the stream, without running it.
    pub fn capture(card: &Arc<Card>, launch: impl FnOnce() -> Result<(), EngineError>) -> Result<Self, EngineError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not capturing.
        unsafe { result::stream::begin_capture(card.stream, mode) }.during("starting a graph")?;
        let launched = launch();
        // SAFETY: capture was begun above; it is ended even where a launch failed.
        let graph = unsafe { result::stream::end_capture(card.stream) }.during("ending a graph");
        launched?;
        let graph = graph?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was just captured.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }.result();
        if let Err(error) = made.during("instantiating a graph") {
            // SAFETY: the graph is destroyed only here.
            let _ = unsafe { result::graph::destroy(graph) };
            return Err(error);
        }
        // SAFETY: both handles are alive.
        unsafe { result::graph::upload(executable, card.stream) }.during("uploading a graph")?;
        Ok(Self { card: card.clone(), graph, executable })
    }

    pub fn launch(&self) -> Result<(), EngineError> {
        // SAFETY: graph and stream are alive.
        unsafe { result::graph::launch(self.executable, self.card.stream) }.during("replaying a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.card.bind();
        // SAFETY: made in `capture`, destroyed only here.
        unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        }
    }
}
