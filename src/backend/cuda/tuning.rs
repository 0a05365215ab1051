//! The algorithm of each matrix product, chosen once by timing and then kept: in the process, in a checksummed file of
//! the user's cache folder, and by runs, which save the table and open with it again. Another algorithm adds in another
//! order: bits repeat only where the table does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::compile::{read_checked, write_checked};

/// What was chosen for a product.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Algorithm {
    /// cuBLASLt's own description.
    pub data: [u64; 8],
    /// How long it took when it was chosen.
    pub milliseconds: f32,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Table {
    /// Card, driver and library that it was made with; of no use for others.
    made_with: String,
    /// Kernels and compiler of the session that saved it: others give other last digits. Not in the file of choices, which does not
    /// depend on them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    kernels: String,
    /// By shape.
    products: BTreeMap<String, Algorithm>,
    /// Clusters that run at once, by their blocks: among so many sums are shared. Cards of one name may have room for different ones.
    /// Not in the file of choices, which is of no one card.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    clusters: BTreeMap<usize, usize>,
}

/// What sessions of this process have chosen, by what it was made with.
static CHOSEN: Mutex<Option<HashMap<String, BTreeMap<String, Algorithm>>>> = Mutex::new(None);

pub(super) struct Tuning {
    table: Table,
    /// Shapes that this session has asked for.
    used: BTreeSet<String>,
    /// Whether something was chosen that no file has yet.
    fresh: bool,
}

impl Tuning {
    /// The table for a card, driver and library: what is known, and over it what `given` (a table saved earlier) says.
    /// A given table for others is left aside.
    pub fn new(made_with: String, kernels: String, given: Option<&str>) -> Self {
        let mut products = kept(&made_with);
        let mut clusters = BTreeMap::new();
        let chosen = CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(known) = chosen.as_ref().and_then(|chosen| chosen.get(&made_with)) {
            products.extend(known.clone());
        }
        drop(chosen);
        if let Some(given) = given.and_then(|text| serde_json::from_str::<Table>(text).ok())
            && given.made_with == made_with
        {
            products.extend(given.products);
            clusters = given.clusters;
        }
        Self { table: Table { made_with, kernels, products, clusters }, used: BTreeSet::new(), fresh: false }
    }

    pub fn get(&mut self, shape: &str) -> Option<Algorithm> {
        let found = self.table.products.get(shape).copied();
        if found.is_some() {
            self.used.insert(shape.to_string());
        }
        found
    }

    /// Clusters of so many blocks: as many as the given table says, or as are found.
    pub fn clusters(&mut self, blocks: usize, find: impl FnOnce() -> usize) -> usize {
        *self.table.clusters.entry(blocks).or_insert_with(find)
    }

    pub fn insert(&mut self, shape: String, algorithm: Algorithm) {
        self.used.insert(shape.clone());
        self.table.products.insert(shape, algorithm);
        self.fresh = true;
    }

    /// The entries that this session uses, for a later one to repeat.
    pub fn text(&self) -> String {
        let used = |(shape, _): &(&String, &Algorithm)| self.used.contains(*shape);
        let products = self.table.products.iter().filter(used).map(|(shape, data)| (shape.clone(), *data)).collect();
        let table = Table { products, ..self.table.clone() };
        serde_json::to_string(&table).unwrap_or_default()
    }

    /// Keeps what was chosen for later sessions and processes. What others have chosen meanwhile stays.
    pub fn keep(&mut self) {
        let mut guard = CHOSEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = guard.get_or_insert_default().entry(self.table.made_with.clone()).or_default();
        for (shape, algorithm) in &self.table.products {
            known.entry(shape.clone()).or_insert(*algorithm);
        }
        if !std::mem::take(&mut self.fresh) {
            return;
        }
        let mut products = kept(&self.table.made_with);
        for (shape, algorithm) in &self.table.products {
            products.entry(shape.clone()).or_insert(*algorithm);
        }
        let table = Table {
            made_with: self.table.made_with.clone(),
            kernels: String::new(),
            products,
            clusters: BTreeMap::new(),
        };
        let written = path(&table.made_with).map(|path| {
            let text = serde_json::to_vec(&table).map_err(std::io::Error::other)?;
            write_checked(&path, &text)
        });
        if let Some(Err(error)) = written {
            tracing::debug!("the tuning table is not kept: {error}");
        }
    }
}

fn path(made_with: &str) -> Option<PathBuf> {
    let key: String = Sha256::digest(made_with).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    super::cache_folder().map(|folder| folder.join("tuning").join(format!("{key}.json")))
}

/// What the file of the cache folder has; nothing where it is missing or damaged.
fn kept(made_with: &str) -> BTreeMap<String, Algorithm> {
    let bytes = path(made_with).as_deref().and_then(read_checked);
    let table = bytes.and_then(|bytes| serde_json::from_slice::<Table>(&bytes).ok());
    table.filter(|table| table.made_with == made_with).map(|table| table.products).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{Algorithm, Tuning};

    fn algorithm(number: u64) -> Algorithm {
        Algorithm { data: [number; 8], milliseconds: 0.1 + number as f32 }
    }

    #[test]
    fn a_saved_table_has_what_was_used_and_counts_only_for_the_same_card() {
        let made_with = "a card of the tests".to_string();
        let mut first = Tuning::new(made_with.clone(), String::new(), None);
        assert_eq!(first.get("2x3"), None);
        first.insert("2x3".into(), algorithm(7));
        first.insert("4x5".into(), algorithm(8));
        let table = first.text();

        let mut again = Tuning::new(made_with, String::new(), Some(&table));
        assert_eq!(again.get("4x5"), Some(algorithm(8)));
        assert!(again.text().contains("4x5") && !again.text().contains("2x3"), "{}", again.text());
        assert_eq!(again.get("2x3"), Some(algorithm(7)));
        assert_eq!(again.text(), table);

        let mut other = Tuning::new("another card of the tests".into(), String::new(), Some(&table));
        assert_eq!(other.get("2x3"), None);
        let third = |given| Tuning::new("a third".into(), String::new(), given).text();
        assert_eq!(third(Some("{")), third(None));
    }
}
