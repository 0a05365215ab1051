//! What was meant by a key that does not exist.

use super::keys::{ELSEWHERE, KEYS, SECTIONS};

/// What to do about an unknown key: its name here, the key of that name in another section, the nearest spelling.
pub fn unknown_key(section: &str, name: &str) -> Option<String> {
    let lower = name.to_ascii_lowercase().replace('-', "_");
    if let Some(key) = KEYS.iter().find(|key| key.section == section && key.name == lower) {
        return Some(format!("it is written {}", key.path()));
    }
    if let Some(key) = KEYS.iter().find(|key| key.name == lower) {
        return Some(format!("it belongs under [{}]: {}", key.section, key.path()));
    }
    // A synonym may fit two keys ("path"); the one of the same section is meant.
    let named = |key: &&super::keys::Key| key.synonyms.contains(&lower.as_str());
    let synonym = KEYS.iter().filter(|key| key.section == section).find(named).or_else(|| KEYS.iter().find(named));
    if let Some(key) = synonym {
        return Some(format!("here it is {}: {}", key.path(), key.help));
    }
    if let Some((_, advice)) = ELSEWHERE.iter().find(|(names, _)| names.contains(&lower.as_str())) {
        return Some((*advice).to_owned());
    }
    let nearest = KEYS
        .iter()
        .map(|key| {
            let names = std::iter::once(&key.name).chain(key.synonyms);
            let score = names.map(|known| strsim::jaro_winkler(&lower, known)).fold(0.0, f64::max);
            (score + if key.section == section { 0.02 } else { 0.0 }, key)
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))?;
    (nearest.0 >= 0.8).then(|| format!("did you mean {}?", nearest.1.path()))
}

/// The section that was meant.
pub fn unknown_section(name: &str) -> Option<String> {
    let lower = name.to_ascii_lowercase();
    let meant = match lower.as_str() {
        "lora" | "peft" | "adapter" | "lora_config" => Some("method"),
        "training" | "trainer" | "training_arguments" | "training_args" | "optimizer" | "args" => Some("train"),
        "dataset" | "datasets" => Some("data"),
        "hardware" | "device" | "system" => Some("engine"),
        _ => None,
    };
    if let Some(section) = meant {
        return Some(format!("here it is [{section}]"));
    }
    SECTIONS
        .iter()
        .map(|(section, _)| (strsim::jaro_winkler(&lower, section), *section))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score >= 0.8)
        .map(|(_, section)| format!("did you mean [{section}]?"))
}
