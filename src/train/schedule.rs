//! Learning-rate schedules, as Transformers computes them.

use crate::spec::Schedule;

/// The shape of the learning rate over a run; multiplied by the peak rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateSchedule {
    pub kind: Schedule,
    /// Updates of linear warmup, from rate 0.
    pub warmup: u64,
    /// Updates of the whole run.
    pub total: u64,
}

impl RateSchedule {
    /// `warmup`: a fraction of the run below 1, else updates; a fraction is rounded up.
    pub fn new(kind: Schedule, warmup: f64, total: u64) -> Self {
        let warmup = if warmup < 1.0 { (warmup * total as f64).ceil() } else { warmup };
        Self { kind, warmup: warmup as u64, total }
    }

    /// Factor of update `step`, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / rest).min(1.0);
        match self.kind {
            Schedule::Constant => 1.0,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

/// Turns "every": a fraction of the run below 1, updates from 1, 0 for never.
pub fn interval(every: f64, total: u64) -> Option<u64> {
    if every <= 0.0 {
        None
    } else if every < 1.0 {
        Some(((every * total as f64).round() as u64).max(1))
    } else {
        Some(every as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_starts_at_zero_and_cosine_ends_at_zero() {
        let schedule = RateSchedule::new(Schedule::Cosine, 3.0, 10);
        assert_eq!(schedule.factor(0), 0.0);
        assert_eq!(schedule.factor(3), 1.0);
        assert!(schedule.factor(10).abs() < 1e-12);
    }

    #[test]
    fn a_fraction_of_warmup_is_rounded_up() {
        assert_eq!(RateSchedule::new(Schedule::Linear, 0.05, 30).warmup, 2);
    }

    #[test]
    fn linear_falls_to_zero_at_the_end() {
        let schedule = RateSchedule::new(Schedule::Linear, 0.0, 4);
        let factors: Vec<f64> = (0..5).map(|step| schedule.factor(step)).collect();
        assert_eq!(factors, [1.0, 0.75, 0.5, 0.25, 0.0]);
    }

    #[test]
    fn intervals_are_fractions_or_updates() {
        assert_eq!(interval(0.1, 100), Some(10));
        assert_eq!(interval(0.1, 3), Some(1));
        assert_eq!(interval(25.0, 100), Some(25));
        assert_eq!(interval(0.0, 100), None);
    }
}
