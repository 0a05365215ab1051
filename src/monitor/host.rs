//! Memory and CPU of the host.

use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::HostSample;

/// An open view of the host.
pub struct Host {
    system: Option<System>,
}

impl Host {
    pub fn open() -> Self {
        let kind = RefreshKind::nothing()
            .with_memory(MemoryRefreshKind::nothing().with_ram())
            .with_cpu(CpuRefreshKind::nothing().with_usage());
        Self { system: System::new_with_specifics(kind).ok() }
    }

    /// Memory now, CPU use since the last call.
    pub fn sample(&mut self) -> HostSample {
        let Some(system) = &mut self.system else { return HostSample::default() };
        system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        system.refresh_cpu_usage();
        HostSample {
            memory_used: system.used_memory(),
            memory_total: system.total_memory(),
            cpu: system.global_cpu_usage(),
            cores: system.cpus().len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_within_bounds() {
        let sample = Host::open().sample();
        assert!(sample.memory_total > 0 && sample.memory_used <= sample.memory_total);
        assert!(sample.cores > 0 && (0.0..=100.0).contains(&sample.cpu));
    }
}
