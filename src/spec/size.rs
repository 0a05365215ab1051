//! Sizes of memory as people write them.

/// Bytes of `22GiB`, `1.5 GB`, `512MiB`, `1024`; none when it is no size. Binary and decimal units differ.
pub fn parse(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * factor;
    (bytes.is_finite() && bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// `1.5 GiB`, with three digits that count.
pub fn format(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match (unit, value) {
        (0, _) => 0,
        (_, value) if value < 9.995 => 2,
        (_, value) if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_read_in_binary_and_decimal_units() {
        assert_eq!(super::parse("22GiB"), Some(22 << 30));
        assert_eq!(super::parse("1.5 GB"), Some(1_500_000_000));
        assert_eq!(super::parse("512"), Some(512));
        assert_eq!(super::parse("12 parsecs"), None);
        assert_eq!(super::parse("GiB"), None);
    }

    #[test]
    fn sizes_are_written_with_three_digits() {
        assert_eq!(super::format(0), "0 B");
        assert_eq!(super::format(1536), "1.50 KiB");
        assert_eq!(super::format(22 << 30), "22.0 GiB");
        assert_eq!(super::format(1000 << 20), "0.98 GiB");
    }
}
