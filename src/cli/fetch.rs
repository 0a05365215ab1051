//! What a run names on the hub and this machine has not yet is fetched, with progress on standard error.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::data;
use crate::hub::fetch::{self, Repository};
use crate::hub::{self, HubError};
use crate::spec::{EvalData, RunSpec, TrainData};

/// Fetches the model and the datasets of a spec that are named by a hub id and are not here. With `HF_HUB_OFFLINE` set it
/// does nothing: whoever opens them says what is missing.
///
/// # Errors
/// When the hub cannot be reached or refuses.
pub fn missing(spec: &RunSpec) -> anyhow::Result<()> {
    if fetch::is_offline() {
        return Ok(());
    }
    let (id, revision) = (&spec.model.id, &spec.model.revision);
    if matches!(hub::locate_model(id, revision), Err(HubError::NotCached { .. } | HubError::NoRevision { .. })) {
        bring(Repository::Model, id, revision)?;
    }
    let mut datasets: Vec<&str> = match &spec.data.train {
        TrainData::Path(path) => vec![path],
        TrainData::Sources(sources) => sources.iter().map(|source| source.path.as_str()).collect(),
    };
    if let EvalData::Path(path) = &spec.data.eval {
        datasets.push(path);
    }
    for id in datasets {
        if hub::is_id(id) && data::locate(id).is_err() {
            bring(Repository::Dataset, id, "")?;
        }
    }
    Ok(())
}

fn bring(repository: Repository, id: &str, revision: &str) -> anyhow::Result<()> {
    let terminal = std::io::stderr().is_terminal();
    eprintln!("fetching {id} from the hub");
    let shown = Mutex::new(Instant::now());
    let tell = |done: u64, total: u64| {
        let Ok(mut shown) = shown.lock() else { return };
        if terminal && (done == total || shown.elapsed() > Duration::from_millis(200)) {
            *shown = Instant::now();
            let mut error = std::io::stderr().lock();
            let share = 100 * done / total.max(1);
            let size = crate::spec::size::format;
            let _ = write!(error, "\r\x1b[K  {} of {} ({share}%)", size(done), size(total));
            let _ = error.flush();
        }
    };
    let fetched = fetch::download(repository, id, revision, &tell);
    if terminal {
        eprintln!();
    }
    fetched?;
    Ok(())
}
