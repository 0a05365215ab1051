//! Rules about a run that has not started: the run file and what is known of its data.

use super::change::{Change, method_name, short};
use super::{Fix, Source, Warning};
use crate::spec::{EvalData, MethodKind, RunSpec};

/// What is known about the data and the machine. None: not known yet, and no rule that needs it speaks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Training rows, after those dropped and those held out.
    pub rows: Option<usize>,
    pub eval_rows: Option<usize>,
    /// Evaluation rows that are training rows too.
    pub shared_rows: usize,
    /// Training rows that repeat an earlier one.
    pub duplicate_rows: usize,
    /// Training rows longer than `max_length`.
    pub cut_rows: usize,
    /// 99th percentile of the rows' lengths before cutting, tokens.
    pub length_p99: Option<usize>,
    /// Columns named like a prompt which no role uses.
    pub unmapped_columns: Vec<String>,
    /// Whether the plan of the same run with plain LoRA fits the device.
    pub lora_fits: Option<bool>,
}

impl Facts {
    /// Updates of the whole run, where the rows are known or the run file counts in steps.
    pub fn updates(&self, spec: &RunSpec) -> Option<u64> {
        spec.train.steps.or_else(|| Some(updates(self.rows?, spec.train.batch, spec.train.epochs)))
    }

    /// Passes over the training rows.
    pub fn epochs(&self, spec: &RunSpec) -> f64 {
        match (spec.train.steps, self.rows) {
            (Some(steps), Some(rows)) if rows > 0 => steps as f64 * spec.train.batch as f64 / rows as f64,
            (Some(_), _) => 0.0,
            _ => spec.train.epochs,
        }
    }
}

fn updates(rows: usize, batch: usize, epochs: f64) -> u64 {
    (rows.div_ceil(batch.max(1)) as f64 * epochs).ceil() as u64
}

/// A rule: a name and a function that speaks or stays silent.
pub struct Rule {
    pub name: &'static str,
    pub check: fn(&RunSpec, &Facts) -> Option<Warning>,
}

/// Every rule, in the order that warnings are shown.
pub const RULES: &[Rule] = &[
    Rule { name: "epochs-many", check: epochs_many },
    Rule { name: "updates-few", check: updates_few },
    Rule { name: "evaluation-none", check: evaluation_none },
    Rule { name: "evaluation-small", check: evaluation_small },
    Rule { name: "evaluation-never", check: evaluation_never },
    Rule { name: "evaluation-shared", check: evaluation_shared },
    Rule { name: "learning-rate-high", check: learning_rate_high },
    Rule { name: "learning-rate-low", check: learning_rate_low },
    Rule { name: "learning-rate-full", check: learning_rate_full },
    Rule { name: "scale-low", check: scale_low },
    Rule { name: "scale-high", check: scale_high },
    Rule { name: "rank-high", check: rank_high },
    Rule { name: "rank-low", check: rank_low },
    Rule { name: "rows-few", check: rows_few },
    Rule { name: "full-few-rows", check: full_few_rows },
    Rule { name: "dropout-none", check: dropout_none },
    Rule { name: "warmup-long", check: warmup_long },
    Rule { name: "batch-small", check: batch_small },
    Rule { name: "batch-large", check: batch_large },
    Rule { name: "duplicates", check: duplicates },
    Rule { name: "cut-rows", check: cut_rows },
    Rule { name: "column-unmapped", check: column_unmapped },
    Rule { name: "qlora-unneeded", check: qlora_unneeded },
];

/// All warnings about a run file.
pub fn check(spec: &RunSpec, facts: &Facts) -> Vec<Warning> {
    RULES.iter().filter_map(|rule| (rule.check)(spec, facts)).collect()
}

/// The learning rate that counts: the run file's, or the method's default.
pub fn learning_rate(spec: &RunSpec) -> f64 {
    spec.train.learning_rate.unwrap_or(if spec.method.kind == MethodKind::Full { 2e-5 } else { 2e-4 })
}

/// What the adapter's output is multiplied with: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732).
pub fn adapter_scale(spec: &RunSpec) -> f64 {
    let rank = spec.method.rank.max(1) as f64;
    spec.method.alpha / if spec.method.rslora { rank.sqrt() } else { rank }
}

fn adapter(spec: &RunSpec) -> bool {
    spec.method.kind != MethodKind::Full
}

fn change(change: Change) -> Option<Fix> {
    Some(Fix::Change(vec![change]))
}

fn percent(part: usize, whole: usize) -> String {
    format!("{:.1}%", 100.0 * part as f64 / whole.max(1) as f64)
}

fn epochs_many(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let epochs = facts.epochs(spec);
    (epochs > 3.0).then(|| Warning {
        rule: "epochs-many",
        key: if spec.train.steps.is_some() { "train.steps" } else { "train.epochs" },
        message: format!("{} epochs: past 3 a model usually memorises its rows", short(round(epochs))),
        advice: "train for at most 3 epochs, and watch the evaluation loss".into(),
        sources: &[Source::Guide],
        fix: change(Change::Epochs(3.0)),
    })
}

fn updates_few(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    const ENOUGH: u64 = 50;
    let count = facts.updates(spec)?;
    if count >= ENOUGH {
        return None;
    }
    Some(Warning {
        rule: "updates-few",
        key: if spec.train.steps.is_some() { "train.steps" } else { "train.batch" },
        message: format!("only {count} updates: the model hardly moves"),
        advice: "use a smaller batch or more epochs".into(),
        sources: &[Source::Practice],
        fix: facts.rows.and_then(|rows| more_updates(spec, rows, count, ENOUGH)),
    })
}

/// The largest batch of at least 4 rows that gives enough updates; else more epochs as well, up to 3.
fn more_updates(spec: &RunSpec, rows: usize, now: u64, enough: u64) -> Option<Fix> {
    let epochs = if spec.train.steps.is_some() { 1.0 } else { spec.train.epochs };
    let smallest = spec.train.batch.min(4);
    let batch =
        (smallest..=spec.train.batch).rev().find(|&batch| updates(rows, batch, epochs) >= enough).unwrap_or(smallest);
    let per_epoch = updates(rows, batch, 1.0).max(1) as f64;
    let wanted = (enough as f64 / per_epoch).ceil().clamp(epochs.min(3.0), 3.0);
    let epochs_after = if updates(rows, batch, epochs) >= enough { epochs } else { wanted.max(epochs) };
    let mut changes = Vec::new();
    if batch != spec.train.batch {
        changes.push(Change::Batch(batch));
    }
    if epochs_after != epochs || spec.train.steps.is_some() {
        changes.push(Change::Epochs(epochs_after));
    }
    (!changes.is_empty() && updates(rows, batch, epochs_after) > now).then_some(Fix::Change(changes))
}

fn evaluation_none(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let none = match &spec.data.eval {
        EvalData::Fraction(fraction) => *fraction <= 0.0,
        EvalData::Path(path) => path.is_empty(),
    };
    (none || facts.eval_rows == Some(0)).then(|| Warning {
        rule: "evaluation-none",
        key: "data.eval",
        message: "no evaluation rows: overfitting will be invisible".into(),
        advice: "hold out 10% of the rows".into(),
        sources: &[Source::CraftRigs, Source::Guide],
        fix: none.then(|| Fix::Change(vec![Change::EvalFraction(0.1)])),
    })
}

fn evaluation_small(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let rows = facts.eval_rows.filter(|rows| (1..20).contains(rows))?;
    let held_out = matches!(spec.data.eval, EvalData::Fraction(fraction) if fraction >= 0.2);
    Some(Warning {
        rule: "evaluation-small",
        key: "data.eval",
        message: format!("{rows} evaluation rows are too few to trust"),
        advice: if held_out { "add rows".into() } else { "hold out 20% of the rows".into() },
        sources: &[Source::Guide],
        fix: (!held_out).then(|| Fix::Change(vec![Change::EvalFraction(0.2)])),
    })
}

fn evaluation_never(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let every = spec.train.eval_every;
    let updates = facts.updates(spec);
    let never = every <= 0.0 || (every >= 1.0 && updates.is_some_and(|updates| every >= updates as f64));
    (never && !matches!(spec.data.eval, EvalData::Fraction(fraction) if fraction <= 0.0)).then(|| Warning {
        rule: "evaluation-never",
        key: "train.eval_every",
        message: match updates {
            Some(updates) if every > 0.0 => {
                format!("every {every} updates of {updates}: evaluation never fires between start and end")
            }
            _ => "evaluation never fires between start and end".into(),
        },
        advice: "evaluate 10 times".into(),
        sources: &[Source::Practice],
        fix: change(Change::EvalEvery(0.1)),
    })
}

fn evaluation_shared(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let shared = facts.shared_rows;
    (shared > 0 && !spec.data.drop_shared).then(|| Warning {
        rule: "evaluation-shared",
        key: "data.drop_shared",
        message: format!("{shared} evaluation rows are trained on: the evaluation loss will flatter"),
        advice: "remove them from the training rows".into(),
        sources: &[Source::Practice],
        fix: change(Change::DropShared),
    })
}

fn learning_rate_high(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    let rate = learning_rate(spec);
    (adapter(spec) && rate > 5e-4).then(|| Warning {
        rule: "learning-rate-high",
        key: "train.learning_rate",
        message: format!("{} is high for {}: the loss may jump or diverge", short(rate), method_name(spec.method.kind)),
        advice: "2e-4 is the usual rate".into(),
        sources: &[Source::Guide],
        fix: change(Change::LearningRate(2e-4)),
    })
}

fn learning_rate_low(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    let rate = learning_rate(spec);
    (adapter(spec) && rate < 2e-5).then(|| Warning {
        rule: "learning-rate-low",
        key: "train.learning_rate",
        message: format!("{} is low for {}: it may not learn", short(rate), method_name(spec.method.kind)),
        advice: "2e-4 is the usual rate".into(),
        sources: &[Source::Guide],
        fix: change(Change::LearningRate(2e-4)),
    })
}

fn learning_rate_full(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    let rate = learning_rate(spec);
    (!adapter(spec) && rate > 5e-5).then(|| Warning {
        rule: "learning-rate-full",
        key: "train.learning_rate",
        message: format!("{} is a LoRA-sized rate: with full fine-tuning the model will forget", short(rate)),
        advice: "2e-5 is the usual rate; full fine-tuning wants about a tenth of LoRA's".into(),
        sources: &[Source::WithoutRegret],
        fix: change(Change::LearningRate(2e-5)),
    })
}

/// The fix of both rules about the scale: alpha = rank, that is a scale of 1.
fn alpha_of_rank(spec: &RunSpec) -> Option<Fix> {
    let rank = spec.method.rank as f64;
    change(Change::Alpha(if spec.method.rslora { rank.sqrt() } else { rank }))
}

fn scale_low(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    let scale = adapter_scale(spec);
    (adapter(spec) && scale < 0.5).then(|| Warning {
        rule: "scale-low",
        key: "method.alpha",
        message: format!("the adapter is muted: its scale is {}", short(round(scale))),
        advice: "a scale of 1: alpha equal to the rank".into(),
        sources: &[Source::Guide],
        fix: alpha_of_rank(spec),
    })
}

fn scale_high(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    let scale = adapter_scale(spec);
    (adapter(spec) && scale > 4.0).then(|| Warning {
        rule: "scale-high",
        key: "method.alpha",
        message: format!("the adapter is amplified: its scale is {}", short(round(scale))),
        advice: "a scale of 1: alpha equal to the rank".into(),
        sources: &[Source::LoraGuide],
        fix: alpha_of_rank(spec),
    })
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn rank_high(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let rows = facts.rows?;
    (adapter(spec) && spec.method.rank > 32 && rows < 1000).then(|| Warning {
        rule: "rank-high",
        key: "method.rank",
        message: format!("rank {} with {rows} rows: room to memorise", spec.method.rank),
        advice: "rank 16 is plenty for so few rows".into(),
        sources: &[Source::Practice],
        fix: change(Change::Rank(16)),
    })
}

fn rank_low(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    (adapter(spec) && spec.method.rank < 4).then(|| Warning {
        rule: "rank-low",
        key: "method.rank",
        message: format!("rank {} may underfit", spec.method.rank),
        advice: "rank 16 is the usual start".into(),
        sources: &[Source::Guide],
        fix: change(Change::Rank(16)),
    })
}

fn rows_few(_: &RunSpec, facts: &Facts) -> Option<Warning> {
    let rows = facts.rows.filter(|&rows| rows < 100)?;
    Some(Warning {
        rule: "rows-few",
        key: "data.train",
        message: format!("{rows} rows is very little data"),
        advice: "100 to 1,000 good rows are the least for LoRA".into(),
        sources: &[Source::Nvidia],
        fix: Some(Fix::OpenData),
    })
}

fn full_few_rows(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let rows = facts.rows?;
    (!adapter(spec) && rows < 1000).then(|| Warning {
        rule: "full-few-rows",
        key: "method.kind",
        message: format!("{rows} rows are too few for full fine-tuning"),
        advice: "LoRA; full fine-tuning wants 1,000 rows or more".into(),
        sources: &[Source::Nvidia],
        fix: Some(Fix::Change(vec![Change::Method(MethodKind::Lora), Change::LearningRate(2e-4)])),
    })
}

fn dropout_none(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let epochs = facts.epochs(spec);
    (adapter(spec) && spec.method.dropout == 0.0 && epochs >= 3.0).then(|| Warning {
        rule: "dropout-none",
        key: "method.dropout",
        message: format!("no dropout with {} epochs: nothing holds memorising back", short(round(epochs))),
        advice: "a dropout of 0.05".into(),
        sources: &[Source::CraftRigs],
        fix: change(Change::Dropout(0.05)),
    })
}

fn warmup_long(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let warmup = spec.train.warmup;
    let share = if warmup < 1.0 { warmup } else { warmup / facts.updates(spec)?.max(1) as f64 };
    (share > 0.2).then(|| Warning {
        rule: "warmup-long",
        key: "train.warmup",
        message: format!("warm-up takes {:.0}% of the run: the full rate is hardly used", 100.0 * share.min(1.0)),
        advice: "5% is usual".into(),
        sources: &[Source::LoraGuide],
        fix: change(Change::Warmup(0.05)),
    })
}

fn batch_small(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let batch = spec.train.batch;
    // With little data a batch of 8 would leave too few updates, which is worse.
    let enough = |batch| facts.rows.is_none_or(|rows| updates(rows, batch, spec.train.epochs) >= 50);
    (batch < 4).then(|| Warning {
        rule: "batch-small",
        key: "train.batch",
        message: format!("{batch} rows an update: noisy"),
        advice: "8 rows an update".into(),
        sources: &[Source::Guide],
        fix: change(Change::Batch(if spec.train.steps.is_some() || enough(8) { 8 } else { 4 })),
    })
}

fn batch_large(spec: &RunSpec, _: &Facts) -> Option<Warning> {
    let batch = spec.train.batch;
    (adapter(spec) && batch > 64).then(|| Warning {
        rule: "batch-large",
        key: "train.batch",
        message: format!("{batch} rows an update is large for LoRA, which tolerates large batches worse"),
        advice: "16 rows an update".into(),
        sources: &[Source::WithoutRegret],
        fix: change(Change::Batch(16)),
    })
}

fn duplicates(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let rows = facts.rows?;
    let repeats = facts.duplicate_rows;
    (!spec.data.drop_duplicates && repeats * 100 > rows).then(|| Warning {
        rule: "duplicates",
        key: "data.drop_duplicates",
        message: format!("{repeats} rows repeat another ({}): repeats overfit", percent(repeats, rows)),
        advice: "drop them".into(),
        sources: &[Source::CraftRigs],
        fix: change(Change::DropDuplicates),
    })
}

fn cut_rows(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    let rows = facts.rows?;
    let cut = facts.cut_rows;
    let longer = facts.length_p99.filter(|&tokens| tokens > spec.data.max_length);
    (cut * 100 > rows).then(|| Warning {
        rule: "cut-rows",
        key: "data.max_length",
        message: format!(
            "{cut} rows ({}) are longer than {} tokens: answers lose their endings",
            percent(cut, rows),
            spec.data.max_length
        ),
        advice: "raise max_length to the 99th percentile of the lengths".into(),
        sources: &[Source::Reports],
        fix: longer.map(|tokens| Fix::Change(vec![Change::MaxLength(tokens)])),
    })
}

fn column_unmapped(_: &RunSpec, facts: &Facts) -> Option<Warning> {
    let column = facts.unmapped_columns.first()?;
    Some(Warning {
        rule: "column-unmapped",
        key: "data.train",
        message: format!("column \"{column}\" has no role: it never reaches the model"),
        advice: "give it one, or leave it on purpose".into(),
        sources: &[Source::CraftRigs],
        fix: change(Change::MapColumn { role: role_of(column).into(), column: column.clone() }),
    })
}

/// The role that a column's name suggests.
fn role_of(column: &str) -> &'static str {
    match column.to_ascii_lowercase().as_str() {
        "system" | "system_prompt" => "system",
        "input" | "context" => "input",
        _ => "prompt",
    }
}

fn qlora_unneeded(spec: &RunSpec, facts: &Facts) -> Option<Warning> {
    (spec.method.kind == MethodKind::Qlora && facts.lora_fits == Some(true)).then(|| Warning {
        rule: "qlora-unneeded",
        key: "method.kind",
        message: "LoRA on the unquantized weights fits: 4 bits cost 1 to 2% of quality".into(),
        advice: "LoRA".into(),
        sources: &[Source::Guide],
        fix: change(Change::Method(MethodKind::Lora)),
    })
}

#[cfg(test)]
#[path = "before_tests.rs"]
mod tests;
