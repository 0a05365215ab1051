//! NVIDIA GPUs through NVML.

use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};

use super::GpuSample;

/// An open NVML.
pub struct Gpus {
    nvml: Nvml,
}

/// Reasons that cost speed, in words. Idle clocks, a user's own clock limits and the display's do not count.
const REASONS: [(ThrottleReasons, &str); 5] = [
    (ThrottleReasons::SW_POWER_CAP, "power limit"),
    (ThrottleReasons::HW_SLOWDOWN, "hardware slowdown"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "temperature"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "temperature, by the hardware"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power brake"),
];

impl Gpus {
    /// None where there is no driver or no card.
    pub fn open() -> Option<Self> {
        let nvml = Nvml::init()
            // Some systems have the library under its full name only.
            .or_else(|_| Nvml::builder().lib_path(std::ffi::OsStr::new("libnvidia-ml.so.1")).init())
            .ok()?;
        (nvml.device_count().ok()? > 0).then_some(Self { nvml })
    }

    /// A look at every card that answers.
    pub fn sample(&self) -> Vec<GpuSample> {
        (0..self.nvml.device_count().unwrap_or(0)).filter_map(|index| self.device(index)).collect()
    }

    fn device(&self, index: u32) -> Option<GpuSample> {
        let device = self.nvml.device_by_index(index).ok()?;
        let memory = device.memory_info().ok()?;
        let watts = |milliwatts: u32| f64::from(milliwatts) / 1000.0;
        Some(GpuSample {
            index,
            name: device.name().unwrap_or_default(),
            memory_used: memory.used,
            memory_total: memory.total,
            utilization: device.utilization_rates().ok().map(|rates| rates.gpu),
            temperature: device.temperature(TemperatureSensor::Gpu).ok(),
            power: device.power_usage().ok().map(watts),
            power_limit: device.enforced_power_limit().ok().map(watts),
            clock: device.clock_info(Clock::SM).ok(),
            throttle_reasons: reasons(&device),
        })
    }

    /// What holds a device's clocks back, in words ([`crate::backend::Found::identity`]); nothing where it does not say.
    pub fn throttle_reasons(&self, identity: &str) -> Vec<&'static str> {
        self.named(identity).map(|device| reasons(&device)).unwrap_or_default()
    }

    /// Bytes of a device that nobody has.
    pub fn free_bytes(&self, identity: &str) -> Option<u64> {
        Some(self.named(identity)?.memory_info().ok()?.free)
    }

    /// Whether the device is one of NVIDIA's.
    pub fn has(&self, identity: &str) -> bool {
        self.named(identity).is_some()
    }

    fn named(&self, identity: &str) -> Option<nvml_wrapper::Device<'_>> {
        self.nvml.device_by_pci_bus_id(pci_place(identity)?).ok()
    }
}

/// The place in a device's name, as `0000:1b:00.0`; what follows it names a part of the card.
fn pci_place(identity: &str) -> Option<&str> {
    identity.strip_prefix("pci-")?.split('-').next()
}

fn reasons(device: &nvml_wrapper::Device) -> Vec<&'static str> {
    let reasons = device.current_throttle_reasons().unwrap_or(ThrottleReasons::empty());
    REASONS.iter().filter(|(bit, _)| reasons.contains(*bit)).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::pci_place;

    #[test]
    fn a_card_is_known_by_its_place() {
        assert_eq!(pci_place("pci-0000:1b:00.0"), Some("0000:1b:00.0"));
        assert_eq!(pci_place("pci-0000:1b:00.0-5a2f"), Some("0000:1b:00.0"));
        assert_eq!(pci_place("cpu"), None);
    }
}
