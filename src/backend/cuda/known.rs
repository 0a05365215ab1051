//! Cards that can be planned for without having them, and how their names are read.

/// A card by name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnownCard {
    /// Words of its name, as the driver writes them; the memory is among them where a card came with more than one.
    pub name: &'static str,
    /// What the driver shows of it.
    pub memory_gib: f64,
    /// bf16 matrix products with f32 sums, TFLOP/s: measured on the H100; for the others the vendor's dense figure
    /// times the share that the H100 reaches of its own (0.76).
    pub matrix_tflops: f64,
    /// Memory, TB/s, by the same rule (0.89).
    pub bandwidth_tbs: f64,
    /// Whether it multiplies 8-bit floats: from Ada and Hopper on.
    pub fp8: bool,
    /// Whether it is of the kind that servers have (B200, Hopper, A100, A30), with more shared memory a block than the others.
    pub server: bool,
    /// Between card and host, GB/s: measured on the H100 (PCIe 5.0 with 16 lanes), half of it for PCIe 4.0.
    pub bus_gbs: f64,
}

const fn card(name: &'static str, memory_gib: f64, matrix_tflops: f64, bandwidth_tbs: f64) -> KnownCard {
    KnownCard { name, memory_gib, matrix_tflops, bandwidth_tbs, fp8: true, server: false, bus_gbs: 24.0 }
}

const fn fifth_bus(card: KnownCard) -> KnownCard {
    KnownCard { bus_gbs: 48.0, ..card }
}

const fn server(card: KnownCard) -> KnownCard {
    KnownCard { server: true, ..card }
}

const fn ampere(name: &'static str, memory_gib: f64, matrix_tflops: f64, bandwidth_tbs: f64) -> KnownCard {
    KnownCard { fp8: false, ..card(name, memory_gib, matrix_tflops, bandwidth_tbs) }
}

/// In the order in which they are listed. Of a card that came with more than one memory the plain name is the smaller.
pub const KNOWN_CARDS: &[KnownCard] = &[
    server(fifth_bus(card("B200", 179.0, 1700.0, 7.0))),
    server(fifth_bus(card("H200 NVL", 140.4, 630.0, 4.3))),
    server(fifth_bus(card("H200", 140.4, 750.0, 4.3))),
    server(fifth_bus(card("H100 NVL", 93.6, 630.0, 3.5))),
    server(fifth_bus(card("H100 PCIe", 79.6, 570.0, 1.8))),
    server(fifth_bus(card("H100", 79.6, 750.0, 2.99))),
    server(fifth_bus(card("H20", 95.6, 112.0, 3.6))),
    server(ampere("A100 80GB", 79.3, 240.0, 1.7)),
    server(ampere("A100", 39.6, 240.0, 1.4)),
    card("L40S", 44.5, 275.0, 0.77),
    card("L40", 44.5, 138.0, 0.77),
    card("L4", 22.0, 90.0, 0.27),
    ampere("A40", 44.5, 114.0, 0.62),
    server(ampere("A30", 23.6, 125.0, 0.83)),
    ampere("A10G", 22.1, 53.0, 0.54),
    ampere("A10", 22.1, 95.0, 0.54),
    fifth_bus(card("RTX PRO 6000 Blackwell", 94.5, 380.0, 1.6)),
    card("RTX 6000 Ada", 47.5, 277.0, 0.85),
    card("RTX 5000 Ada", 31.5, 198.0, 0.51),
    card("RTX 4500 Ada", 23.5, 120.0, 0.38),
    card("RTX 4000 Ada", 19.5, 81.0, 0.32),
    ampere("RTX A6000", 47.5, 120.0, 0.69),
    ampere("RTX A5000", 23.5, 84.0, 0.68),
    ampere("RTX A4500", 19.5, 72.0, 0.57),
    ampere("RTX A4000", 15.6, 58.0, 0.4),
    fifth_bus(card("RTX 5090", 31.4, 160.0, 1.6)),
    fifth_bus(card("RTX 5080", 15.5, 85.0, 0.86)),
    fifth_bus(card("RTX 5070 Ti", 15.5, 66.0, 0.8)),
    fifth_bus(card("RTX 5070", 11.6, 46.0, 0.6)),
    card("RTX 5060 Ti 16GB", 15.5, 36.0, 0.4),
    card("RTX 5060 Ti", 7.6, 36.0, 0.4),
    card("RTX 5060", 7.6, 29.0, 0.4),
    card("RTX 4090", 23.5, 125.0, 0.9),
    card("RTX 4080 Super", 15.6, 79.0, 0.66),
    card("RTX 4080", 15.6, 74.0, 0.65),
    card("RTX 4070 Ti Super", 15.6, 67.0, 0.6),
    card("RTX 4070 Ti", 11.6, 61.0, 0.45),
    card("RTX 4070 Super", 11.6, 54.0, 0.45),
    card("RTX 4070", 11.6, 44.0, 0.45),
    card("RTX 4060 Ti 16GB", 15.6, 33.0, 0.26),
    card("RTX 4060 Ti", 7.6, 33.0, 0.26),
    card("RTX 4060", 7.6, 23.0, 0.24),
    ampere("RTX 3090 Ti", 23.5, 61.0, 0.9),
    ampere("RTX 3090", 23.5, 54.0, 0.84),
    ampere("RTX 3080 Ti", 11.6, 52.0, 0.81),
    ampere("RTX 3080 12GB", 11.6, 47.0, 0.81),
    ampere("RTX 3080", 9.6, 45.0, 0.68),
    ampere("RTX 3070 Ti", 7.6, 33.0, 0.54),
    ampere("RTX 3070", 7.6, 31.0, 0.4),
    ampere("RTX 3060 Ti", 7.6, 25.0, 0.4),
    ampere("RTX 3060", 11.6, 19.0, 0.32),
];

/// Cards from before Ampere that people still have, with their compute capability: planned for by no name here.
const OLDER: &[(&str, (i32, i32))] = &[
    ("T4", (7, 5)),
    ("V100", (7, 0)),
    ("TITAN V", (7, 0)),
    ("TITAN RTX", (7, 5)),
    ("P100", (6, 0)),
    ("P40", (6, 1)),
    ("P4", (6, 1)),
    ("M40", (5, 2)),
    ("K80", (3, 7)),
    ("2080", (7, 5)),
    ("2070", (7, 5)),
    ("2060", (7, 5)),
    ("Quadro RTX", (7, 5)),
    ("1660", (7, 5)),
    ("1650", (7, 5)),
    ("1080", (6, 1)),
    ("1070", (6, 1)),
    ("1060", (6, 1)),
];

/// Words of a name that say nothing of the card's kind.
const PLAIN: &[&str] = &[
    "nvidia",
    "tesla",
    "geforce",
    "quadro",
    "rtx",
    "gpu",
    "graphics",
    "card",
    "generation",
    "edition",
    "pcie",
    "pci",
    "sxm",
    "sxm2",
    "sxm3",
    "sxm4",
    "sxm5",
    "hbm2",
    "hbm2e",
    "hbm3",
    "hbm3e",
    "gddr6",
    "gddr6x",
    "gddr7",
    "server",
    "workstation",
];

/// Why a name stands for no known card.
#[derive(Clone, Debug, PartialEq)]
pub enum NoCard {
    /// A card with this compute capability, which the CUDA engine does not run on.
    TooOld((i32, i32)),
    Unknown,
}

impl KnownCard {
    /// The card that a name means, as the driver or a user writes it: all words of the card's name are in it, and no others
    /// that tell cards apart. Another memory is another card.
    ///
    /// # Errors
    /// Whether the name is that of an older card.
    pub fn named(name: &str) -> Result<&'static KnownCard, NoCard> {
        let given = words(name);
        // People leave this one out.
        let has_all = |name: &str| words(name).iter().all(|word| word == "rtx" || given.contains(word));
        let fits = |card: &&KnownCard| {
            let own = words(card.name);
            let other = |word: &&String| !own.contains(word) && !is_plain(word);
            has_all(card.name) && given.iter().filter(other).all(|word| memory(word).is_some_and(|gib| card.holds(gib)))
        };
        let told = |card: &&KnownCard| words(card.name).iter().filter(|word| given.contains(word)).count();
        // Of equals the first that is listed.
        if let Some(card) = KNOWN_CARDS.iter().rev().filter(fits).max_by_key(told) {
            return Ok(card);
        }
        let older = OLDER.iter().find(|(name, _)| words(name).iter().all(|word| given.contains(word)));
        Err(older.map_or(NoCard::Unknown, |&(_, capability)| NoCard::TooOld(capability)))
    }

    /// Whether so many gigabytes on a box are this card's memory.
    fn holds(&self, gib: f64) -> bool {
        (0.9..=1.02).contains(&(self.memory_gib / gib))
    }
}

/// Lower-case words of a name; a number and the unit after it are one, `rtx4090` is two.
fn words(name: &str) -> Vec<String> {
    let lower = name.to_lowercase().replace("rtx", " rtx ");
    let mut words: Vec<String> = Vec::new();
    for word in lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        let number = words.last_mut().filter(|last| last.chars().all(|c| c.is_ascii_digit()));
        match number {
            Some(number) if matches!(word, "gb" | "gib" | "g") => number.push_str("gb"),
            _ => words.push(word.replace("gib", "gb")),
        }
    }
    words
}

fn is_plain(word: &str) -> bool {
    PLAIN.contains(&word)
}

/// Gigabytes that a word names.
fn memory(word: &str) -> Option<f64> {
    word.strip_suffix("gb")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str) -> Result<&'static str, NoCard> {
        KnownCard::named(name).map(|card| card.name)
    }

    #[test]
    fn drivers_names_and_peoples_names_mean_the_card() {
        for (name, card) in [
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100 PCIe"),
            ("NVIDIA H100 NVL", "H100 NVL"),
            ("NVIDIA H200", "H200"),
            ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
            ("NVIDIA A100 80GB PCIe", "A100 80GB"),
            ("NVIDIA A100-PCIE-40GB", "A100"),
            ("A100 40GB", "A100"),
            ("A100", "A100"),
            ("a100 80 gb", "A100 80GB"),
            ("NVIDIA A10", "A10"),
            ("NVIDIA A10G", "A10G"),
            ("L4", "L4"),
            ("L40", "L40"),
            ("NVIDIA L40S", "L40S"),
            ("NVIDIA RTX A6000", "RTX A6000"),
            ("A6000", "RTX A6000"),
            ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell"),
            ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
            ("4060 Ti 8GB", "RTX 4060 Ti"),
            ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
            ("rtx 4090", "RTX 4090"),
            ("4090", "RTX 4090"),
            ("RTX4090", "RTX 4090"),
            ("RTX 3080 12GB", "RTX 3080 12GB"),
            ("RTX 3080 10GB", "RTX 3080"),
            ("RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ] {
            assert_eq!(found(name), Ok(card), "{name}");
        }
    }

    #[test]
    fn a_name_that_only_contains_a_cards_is_another() {
        for name in [
            "RTX A1000",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "A100 20GB",
            "RTX 4090 48GB",
            "H1000",
            "",
            "RTX",
            "banana",
        ] {
            assert_eq!(found(name), Err(NoCard::Unknown), "{name}");
        }
    }

    #[test]
    fn old_cards_are_known_as_such() {
        for (name, capability) in [
            ("Tesla T4", (7, 5)),
            ("V100", (7, 0)),
            ("Tesla V100-SXM2-16GB", (7, 0)),
            ("NVIDIA GeForce RTX 2080 Ti", (7, 5)),
            ("GTX 1080", (6, 1)),
        ] {
            assert_eq!(found(name), Err(NoCard::TooOld(capability)), "{name}");
        }
    }

    #[test]
    fn every_known_card_is_found_by_its_own_name() {
        for card in KNOWN_CARDS {
            assert_eq!(KnownCard::named(card.name), Ok(card));
        }
    }
}
