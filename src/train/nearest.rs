//! Settings near those asked for with which a plan fits.

use super::planning::{RecomputeChoice, Search};
use crate::model::{AdapterOptions, Method, TrainingOptions, names};
use crate::program::DType;
use crate::spec::{Capabilities, MethodSpec};

/// Lengths of rows that are tried differ by this many tokens.
const LENGTH_STEP: usize = 64;

/// The least rank worth proposing.
const LEAST_RANK: usize = 8;

/// A change of a run file, as the file spells it, and the search with it.
type Change<'a> = (String, Search<'a>);

/// Changes with which a plan fits, each by itself, from those that change the result least; where none does alone, the most
/// frugal together. None where no setting of this model fits.
pub(super) fn settings_that_fit(search: &Search<'_>) -> Vec<String> {
    let mut changes = of_memory(search);
    changes.extend(shorter_rows(search));
    changes.extend(smaller_rank(search));
    changes.extend(of_method(search));
    let alone: Vec<String> =
        changes.into_iter().filter(|change| change.1.fits_somehow()).map(|change| change.0).collect();
    if alone.is_empty() { together(search).into_iter().collect() } else { alone }
}

/// What changes memory and neither the rows nor what is trained.
fn of_memory<'a>(search: &Search<'a>) -> Vec<Change<'a>> {
    let mut changes = Vec::new();
    let mut change = |text: &str, search: Search<'a>| changes.push((text.to_string(), search));
    if let Some(memory) = search.device_memory.filter(|&all| search.target.memory.is_some_and(|less| less < all)) {
        let mut target = search.target.clone();
        target.memory = Some(memory);
        change("engine.vram = \"auto\"", Search { target, ..search.clone() });
    }
    if search.recompute != RecomputeChoice::Auto {
        change("engine.recompute = \"auto\"", Search { recompute: RecomputeChoice::Auto, ..search.clone() });
    }
    if search.host_optimizer == Some(false) && search.target.reaches_host() {
        change("train.optimizer_memory = \"auto\"", Search { host_optimizer: None, ..search.clone() });
    }
    if !search.options.eight_bit {
        let options = TrainingOptions { eight_bit: true, ..search.options.clone() };
        change("train.optimizer = \"adamw8bit\"", Search { options, ..search.clone() });
    }
    changes
}

/// The longest rows that fit.
fn shorter_rows<'a>(search: &Search<'a>) -> Option<Change<'a>> {
    let rows = |steps: usize| Search { longest_row: steps * LENGTH_STEP, ..search.clone() };
    // Fits, does not.
    let (mut low, mut high) = (1, search.longest_row.div_ceil(LENGTH_STEP));
    if high <= 1 || !rows(low).fits_somehow() {
        return None;
    }
    while low + 1 < high {
        let middle = usize::midpoint(low, high);
        if rows(middle).fits_somehow() { low = middle } else { high = middle }
    }
    let cut = if search.truncates { "" } else { " with data.too_long = \"truncate\"" };
    Some((format!("data.max_length = {}{cut}", low * LENGTH_STEP), rows(low)))
}

/// The largest of the halves of the rank that fits.
fn smaller_rank<'a>(search: &Search<'a>) -> Option<Change<'a>> {
    let Method::Lora { adapter, weights } = &search.options.method else { return None };
    let halves = std::iter::successors(Some(adapter.rank / 2), |rank| Some(rank / 2));
    halves.take_while(|&rank| rank >= LEAST_RANK).find_map(|rank| {
        let method = Method::Lora { adapter: AdapterOptions { rank, ..adapter.clone() }, weights: *weights };
        let smaller = with_method(search, method);
        smaller.fits_somehow().then(|| (format!("method.rank = {rank}"), smaller))
    })
}

fn with_method<'a>(search: &Search<'a>, method: Method) -> Search<'a> {
    Search { options: TrainingOptions { method, ..search.options.clone() }, ..search.clone() }
}

/// Smaller weights, and adapters in place of all weights.
fn of_method<'a>(search: &Search<'a>) -> Vec<Change<'a>> {
    let holds = |dtype: DType| {
        let engine = Capabilities::of(search.target.engine);
        engine.is_some_and(|engine| engine.weights.contains(&dtype.name()))
            && (dtype != DType::Fp8 || search.target.fp8_flops.is_some())
    };
    let lora = |adapter: &AdapterOptions, weights: Option<DType>| {
        with_method(search, Method::Lora { adapter: adapter.clone(), weights })
    };
    let mut changes = Vec::new();
    match &search.options.method {
        Method::Full => {
            changes.push(("method.kind = \"lora\"".to_string(), lora(&usual_adapter(), None)));
            if holds(DType::Nf4) {
                changes.push(("method.kind = \"qlora\"".to_string(), lora(&usual_adapter(), Some(DType::Nf4))));
            }
        }
        Method::Lora { adapter, weights } => {
            let smaller: &[(DType, &str)] = match weights {
                None => &[
                    (DType::Fp8, "engine.precision = \"fp8\""),
                    (DType::Int8, "model.weights = \"int8\""),
                    (DType::Nf4, "method.kind = \"qlora\""),
                ],
                // One key alone would contradict the other.
                Some(DType::Fp8) => &[(
                    DType::Nf4,
                    "method.kind = \"qlora\" with engine.precision = \"bf16\" and model.weights = \"auto\"",
                )],
                Some(DType::Int8) => &[(DType::Nf4, "method.kind = \"qlora\" with model.weights = \"auto\"")],
                Some(_) => &[],
            };
            let held = smaller.iter().filter(|(dtype, _)| holds(*dtype));
            changes.extend(held.map(|(dtype, text)| (text.to_string(), lora(adapter, Some(*dtype)))));
        }
    }
    changes
}

/// The adapter of a run file that says nothing of it.
fn usual_adapter() -> AdapterOptions {
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    AdapterOptions { rank: MethodSpec::default().rank, targets, dropout: 0.0 }
}

/// Every change of memory, the smallest weights, and the longest rows that then fit.
fn together(search: &Search<'_>) -> Option<String> {
    let (mut texts, mut all) = (Vec::new(), search.clone());
    while let Some((text, changed)) = of_memory(&all).into_iter().next() {
        texts.push(text);
        all = changed;
    }
    if let Some((text, changed)) = of_method(&all).pop() {
        texts.push(text);
        all = changed;
    }
    if !all.fits_somehow() {
        let (text, _) = shorter_rows(&all)?;
        texts.push(text);
    }
    (!texts.is_empty()).then(|| texts.join(" with "))
}
