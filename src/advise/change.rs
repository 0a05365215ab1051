//! Changes of a run file that a fix makes.

use crate::spec::{DataSource, EvalData, MethodKind, RunSpec, TrainData};

/// One change of one key of a run file.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Epochs(f64),
    Batch(usize),
    EvalFraction(f64),
    EvalEvery(f64),
    LearningRate(f64),
    Alpha(f64),
    Rank(usize),
    Dropout(f64),
    Warmup(f64),
    Method(MethodKind),
    MaxLength(usize),
    /// Gives a column of the data a role, in every source that has none for it.
    MapColumn {
        role: String,
        column: String,
    },
    DropDuplicates,
    /// Takes the rows that evaluation uses out of the training rows.
    DropShared,
}

impl Change {
    /// Writes the change into the run file.
    pub fn apply(&self, spec: &mut RunSpec) {
        match self {
            Change::Epochs(epochs) => {
                spec.train.epochs = *epochs;
                spec.train.steps = None;
            }
            Change::Batch(rows) => spec.train.batch = *rows,
            Change::EvalFraction(fraction) => spec.data.eval = EvalData::Fraction(*fraction),
            Change::EvalEvery(every) => spec.train.eval_every = *every,
            Change::LearningRate(rate) => spec.train.learning_rate = Some(*rate),
            Change::Alpha(alpha) => spec.method.alpha = *alpha,
            Change::Rank(rank) => {
                // The scale that the user chose is kept.
                let scale = super::before::adapter_scale(spec);
                spec.method.rank = *rank;
                let unit = if spec.method.rslora { (*rank as f64).sqrt() } else { *rank as f64 };
                spec.method.alpha = scale * unit;
            }
            Change::Dropout(rate) => spec.method.dropout = *rate,
            Change::Warmup(warmup) => spec.train.warmup = *warmup,
            Change::Method(kind) => {
                spec.method.kind = *kind;
                if *kind == MethodKind::Lora && spec.model.weights == "nf4" {
                    spec.model.weights = "auto".into();
                }
            }
            Change::MaxLength(tokens) => spec.data.max_length = *tokens,
            Change::MapColumn { role, column } => map_column(spec, role, column),
            Change::DropDuplicates => spec.data.drop_duplicates = true,
            Change::DropShared => spec.data.drop_shared = true,
        }
    }

    /// The change as a line of the run file.
    pub fn describe(&self) -> String {
        match self {
            Change::Epochs(epochs) => format!("train.epochs = {epochs}"),
            Change::Batch(rows) => format!("train.batch = {rows}"),
            Change::EvalFraction(fraction) => format!("data.eval = {fraction}"),
            Change::EvalEvery(every) => format!("train.eval_every = {every}"),
            Change::LearningRate(rate) => format!("train.learning_rate = {}", short(*rate)),
            Change::Alpha(alpha) => format!("method.alpha = {alpha}"),
            Change::Rank(rank) => format!("method.rank = {rank}"),
            Change::Dropout(rate) => format!("method.dropout = {rate}"),
            Change::Warmup(warmup) => format!("train.warmup = {warmup}"),
            Change::Method(kind) => format!("method.kind = \"{}\"", method_name(*kind)),
            Change::MaxLength(tokens) => format!("data.max_length = {tokens}"),
            Change::MapColumn { role, column } => format!("columns.{role} = \"{column}\""),
            Change::DropDuplicates => "data.drop_duplicates = true".into(),
            Change::DropShared => "data.drop_shared = true".into(),
        }
    }
}

/// The method's name as the run file writes it.
pub fn method_name(kind: MethodKind) -> &'static str {
    match kind {
        MethodKind::Lora => "lora",
        MethodKind::Qlora => "qlora",
        MethodKind::Full => "full",
    }
}

/// A rate as people write it: `2e-4`, `0.05`.
pub fn short(value: f64) -> String {
    if value == 0.0 || (1e-2..1e5).contains(&value.abs()) {
        return format!("{value}");
    }
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((digits, exponent)) if digits.contains('.') => {
            format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
}

fn map_column(spec: &mut RunSpec, role: &str, column: &str) {
    if let TrainData::Path(path) = &spec.data.train {
        spec.data.train = TrainData::Sources(vec![DataSource { path: path.clone(), ..DataSource::default() }]);
    }
    if let TrainData::Sources(sources) = &mut spec.data.train {
        for source in sources {
            source.columns.entry(role.to_owned()).or_insert_with(|| column.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_written_as_people_write_them() {
        assert_eq!(short(2e-4), "2e-4");
        assert_eq!(short(1.5e-5), "1.5e-5");
        assert_eq!(short(0.05), "0.05");
        assert_eq!(short(0.0), "0");
        assert_eq!(short(1.0), "1");
    }

    #[test]
    fn mapping_a_column_keeps_the_path() {
        let mut spec = RunSpec::default();
        spec.data.train = TrainData::Path("rows.json".into());
        Change::MapColumn { role: "prompt".into(), column: "context".into() }.apply(&mut spec);
        let TrainData::Sources(sources) = &spec.data.train else { panic!("sources") };
        assert_eq!(sources[0].path, "rows.json");
        assert_eq!(sources[0].columns["prompt"], "context");
    }

    #[test]
    fn a_smaller_rank_keeps_the_scale() {
        let mut spec = RunSpec::default();
        (spec.method.rank, spec.method.alpha) = (64, 128.0);
        Change::Rank(16).apply(&mut spec);
        assert_eq!((spec.method.rank, spec.method.alpha), (16, 32.0));
    }
}
