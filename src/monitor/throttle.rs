//! Whether the driver holds the card of a run back.

use std::time::{Duration, Instant};

use super::gpu::Gpus;
use crate::advise::{Warning, live};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(5);
/// Looks in a row with a reason: a peak of a moment is nothing to tell.
const LOOKS: u32 = 3;

/// Looks at a card now and then, and tells once a run what holds it back.
#[derive(Default)]
pub struct ThrottleWatch {
    card: Option<(Gpus, String)>,
    looked: Option<Instant>,
    /// Looks in a row that gave a reason.
    held: u32,
    told: bool,
}

impl ThrottleWatch {
    /// For the device that a run has ([`crate::backend::Found::identity`]); one that is no NVIDIA card is never looked at.
    pub fn of_device(identity: &str) -> Self {
        let card = Gpus::open().filter(|gpus| gpus.has(identity)).map(|gpus| (gpus, identity.to_owned()));
        Self { card, ..Self::default() }
    }

    /// Looks, if it is time to.
    pub fn look(&mut self) -> Option<Warning> {
        let (gpus, identity) = self.card.as_ref()?;
        if self.told || self.looked.is_some_and(|looked| looked.elapsed() < PERIOD) {
            return None;
        }
        self.looked = Some(Instant::now());
        let reasons = gpus.throttle_reasons(identity);
        self.judge(&reasons)
    }

    /// What the driver said at one look.
    fn judge(&mut self, reasons: &[&str]) -> Option<Warning> {
        self.held = if reasons.is_empty() { 0 } else { self.held + 1 };
        if self.told || self.held < LOOKS {
            return None;
        }
        self.told = true;
        live::throttled(reasons)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_the_card_back_for_three_looks_is_told_once() {
        let mut watch = ThrottleWatch::default();
        for reasons in [&["power limit"][..], &["power limit"], &[], &["temperature"], &["temperature"]] {
            assert_eq!(watch.judge(reasons), None);
        }
        let warning = watch.judge(&["temperature"]).unwrap();
        assert_eq!((warning.rule, warning.message.as_str()), ("throttled", "the GPU throttles: temperature"));
        assert_eq!(watch.judge(&["temperature"]), None);
    }

    #[test]
    fn a_device_that_is_no_card_is_not_looked_at() {
        assert_eq!(ThrottleWatch::of_device("cpu").look(), None);
    }
}
