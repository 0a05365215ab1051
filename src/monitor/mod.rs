//! What the machine is doing: GPU figures from NVML, host figures from the operating system.

pub mod gpu;
pub mod host;
pub mod throttle;

/// One look at the machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MachineSample {
    /// Every NVIDIA GPU; empty where there is no driver.
    pub gpus: Vec<GpuSample>,
    pub host: HostSample,
}

/// An NVIDIA GPU as NVML reports it. None: the card does not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuSample {
    pub index: u32,
    pub name: String,
    /// Bytes.
    pub memory_used: u64,
    /// Bytes.
    pub memory_total: u64,
    /// Percent of the last sample period in which a kernel ran.
    pub utilization: Option<u32>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Watts.
    pub power: Option<f64>,
    /// Watts.
    pub power_limit: Option<f64>,
    /// Streaming multiprocessor clock, MHz.
    pub clock: Option<u32>,
    /// What holds the clocks back, in words; not the idle state.
    pub throttle_reasons: Vec<&'static str>,
}

/// The host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostSample {
    /// Bytes.
    pub memory_used: u64,
    /// Bytes.
    pub memory_total: u64,
    /// Percent of all cores.
    pub cpu: f32,
    pub cores: usize,
}

/// Takes samples. Opened once: loading NVML takes time.
pub struct Monitor {
    gpus: Option<gpu::Gpus>,
    host: host::Host,
}

impl Monitor {
    /// Opens NVML where there is one.
    pub fn open() -> Self {
        Self { gpus: gpu::Gpus::open(), host: host::Host::open() }
    }

    /// Looks at the machine. CPU use is that since the last look.
    pub fn sample(&mut self) -> MachineSample {
        MachineSample { gpus: self.gpus.as_ref().map(gpu::Gpus::sample).unwrap_or_default(), host: self.host.sample() }
    }
}
