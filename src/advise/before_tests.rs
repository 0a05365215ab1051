use proptest::prelude::*;

use super::*;

fn facts(rows: usize, eval_rows: usize) -> Facts {
    Facts { rows: Some(rows), eval_rows: Some(eval_rows), ..Facts::default() }
}

fn spec(edit: impl FnOnce(&mut RunSpec)) -> RunSpec {
    let mut spec = RunSpec::default();
    edit(&mut spec);
    spec
}

fn apply(spec: &mut RunSpec, fix: &Fix) {
    if let Fix::Change(changes) = fix {
        changes.iter().for_each(|change| change.apply(spec));
    }
}

/// A case per rule: the value that speaks, one that is silent, and the facts of both.
fn cases() -> Vec<(&'static str, RunSpec, RunSpec, Facts, Facts)> {
    let same = |rule, speaks: RunSpec, silent: RunSpec, facts: Facts| (rule, speaks, silent, facts.clone(), facts);
    let plenty = facts(2000, 200);
    let with = |edit: fn(&mut Facts)| {
        let mut changed = facts(2000, 200);
        edit(&mut changed);
        changed
    };
    vec![
        same("epochs-many", spec(|s| s.train.epochs = 3.5), spec(|s| s.train.epochs = 3.0), plenty.clone()),
        same("updates-few", spec(|s| s.train.batch = 32), spec(|s| s.train.batch = 16), facts(800, 80)),
        same("evaluation-none", spec(|s| s.data.eval = EvalData::Fraction(0.0)), spec(|_| ()), plenty.clone()),
        ("evaluation-small", spec(|_| ()), spec(|_| ()), facts(2000, 19), facts(2000, 20)),
        same("evaluation-never", spec(|s| s.train.eval_every = 0.0), spec(|_| ()), plenty.clone()),
        ("evaluation-shared", spec(|_| ()), spec(|_| ()), with(|f| f.shared_rows = 1), plenty.clone()),
        same(
            "learning-rate-high",
            spec(|s| s.train.learning_rate = Some(6e-4)),
            spec(|s| s.train.learning_rate = Some(5e-4)),
            plenty.clone(),
        ),
        same(
            "learning-rate-low",
            spec(|s| s.train.learning_rate = Some(1e-5)),
            spec(|s| s.train.learning_rate = Some(2e-5)),
            plenty.clone(),
        ),
        same(
            "learning-rate-full",
            spec(|s| (s.method.kind, s.train.learning_rate) = (MethodKind::Full, Some(2e-4))),
            spec(|s| s.method.kind = MethodKind::Full),
            plenty.clone(),
        ),
        same("scale-low", spec(|s| s.method.alpha = 4.0), spec(|s| s.method.alpha = 8.0), plenty.clone()),
        same("scale-high", spec(|s| s.method.alpha = 65.0), spec(|s| s.method.alpha = 64.0), plenty.clone()),
        (
            "rank-high",
            spec(|s| (s.method.rank, s.method.alpha) = (64, 64.0)),
            spec(|s| (s.method.rank, s.method.alpha) = (64, 64.0)),
            facts(999, 100),
            facts(1000, 100),
        ),
        same(
            "rank-low",
            spec(|s| (s.method.rank, s.method.alpha) = (2, 2.0)),
            spec(|s| (s.method.rank, s.method.alpha) = (4, 4.0)),
            plenty.clone(),
        ),
        ("rows-few", spec(|s| s.train.batch = 1), spec(|s| s.train.batch = 1), facts(99, 20), facts(100, 20)),
        (
            "full-few-rows",
            spec(|s| s.method.kind = MethodKind::Full),
            spec(|s| s.method.kind = MethodKind::Full),
            facts(999, 100),
            facts(1000, 100),
        ),
        same(
            "dropout-none",
            spec(|s| s.train.epochs = 3.0),
            spec(|s| (s.train.epochs, s.method.dropout) = (3.0, 0.05)),
            plenty.clone(),
        ),
        same("warmup-long", spec(|s| s.train.warmup = 60.0), spec(|s| s.train.warmup = 50.0), plenty.clone()),
        same("batch-small", spec(|s| s.train.batch = 3), spec(|s| s.train.batch = 4), plenty.clone()),
        (
            "batch-large",
            spec(|s| s.train.batch = 65),
            spec(|s| s.train.batch = 64),
            facts(100_000, 100),
            facts(100_000, 100),
        ),
        ("duplicates", spec(|_| ()), spec(|_| ()), with(|f| f.duplicate_rows = 21), with(|f| f.duplicate_rows = 20)),
        (
            "cut-rows",
            spec(|s| s.data.max_length = 256),
            spec(|s| s.data.max_length = 256),
            with(|f| (f.cut_rows, f.length_p99) = (21, Some(400))),
            with(|f| (f.cut_rows, f.length_p99) = (20, Some(256))),
        ),
        (
            "column-unmapped",
            spec(|_| ()),
            spec(|_| ()),
            with(|f| f.unmapped_columns = vec!["question".into()]),
            plenty.clone(),
        ),
        (
            "qlora-unneeded",
            spec(|s| s.method.kind = MethodKind::Qlora),
            spec(|s| s.method.kind = MethodKind::Qlora),
            with(|f| f.lora_fits = Some(true)),
            with(|f| f.lora_fits = Some(false)),
        ),
    ]
}

#[test]
fn every_rule_speaks_at_its_bound_and_only_there() {
    let cases = cases();
    for rule in RULES {
        let (_, speaks, silent, facts, quiet) =
            cases.iter().find(|case| case.0 == rule.name).unwrap_or_else(|| panic!("no case for {}", rule.name));
        let warning = (rule.check)(speaks, facts).unwrap_or_else(|| panic!("{} is silent", rule.name));
        assert_eq!(warning.rule, rule.name);
        assert!(!warning.message.is_empty() && !warning.advice.is_empty() && !warning.sources.is_empty());
        assert!((rule.check)(silent, quiet).is_none(), "{} speaks when it should not", rule.name);
    }
}

/// Where each rule comes from; another source is another rule.
const SOURCES: [(&str, &[Source]); 23] = [
    ("epochs-many", &[Source::Guide]),
    ("updates-few", &[Source::Practice]),
    ("evaluation-none", &[Source::CraftRigs, Source::Guide]),
    ("evaluation-small", &[Source::Guide]),
    ("evaluation-never", &[Source::Practice]),
    ("evaluation-shared", &[Source::Practice]),
    ("learning-rate-high", &[Source::Guide]),
    ("learning-rate-low", &[Source::Guide]),
    ("learning-rate-full", &[Source::WithoutRegret]),
    ("scale-low", &[Source::Guide]),
    ("scale-high", &[Source::LoraGuide]),
    ("rank-high", &[Source::Practice]),
    ("rank-low", &[Source::Guide]),
    ("rows-few", &[Source::Nvidia]),
    ("full-few-rows", &[Source::Nvidia]),
    ("dropout-none", &[Source::CraftRigs]),
    ("warmup-long", &[Source::LoraGuide]),
    ("batch-small", &[Source::Guide]),
    ("batch-large", &[Source::WithoutRegret]),
    ("duplicates", &[Source::CraftRigs]),
    ("cut-rows", &[Source::Reports]),
    ("column-unmapped", &[Source::CraftRigs]),
    ("qlora-unneeded", &[Source::Guide]),
];

#[test]
fn every_warning_names_its_source_and_has_a_fix() {
    assert_eq!(RULES.iter().map(|rule| rule.name).collect::<Vec<_>>(), SOURCES.map(|(name, _)| name));
    for (name, spec, _, facts, _) in cases() {
        let rule = RULES.iter().find(|rule| rule.name == name).unwrap();
        let warning = (rule.check)(&spec, &facts).unwrap();
        let sources = SOURCES.iter().find(|(named, _)| *named == name).unwrap().1;
        assert_eq!(warning.sources, sources, "{name}");
        assert!(warning.fix.is_some(), "{name} has nothing that f could apply");
    }
}

#[test]
fn a_fix_silences_its_rule() {
    for (name, mut spec, _, facts, _) in cases() {
        let rule = RULES.iter().find(|rule| rule.name == name).unwrap();
        let warning = (rule.check)(&spec, &facts).unwrap();
        let Some(fix @ Fix::Change(_)) = &warning.fix else { continue };
        apply(&mut spec, fix);
        // These depend on what the loader finds once the file has changed.
        if !["evaluation-small", "cut-rows", "column-unmapped"].contains(&name) {
            assert_eq!((rule.check)(&spec, &facts).map(|warning| warning.message), None, "{name}");
        }
    }
}

#[test]
fn a_default_run_on_enough_rows_has_no_warnings() {
    assert_eq!(check(&RunSpec::default(), &facts(2000, 200)), vec![]);
}

#[test]
fn nothing_is_said_about_data_that_is_not_known() {
    assert_eq!(check(&RunSpec::default(), &Facts::default()), vec![]);
}

#[test]
fn too_few_updates_are_mended_by_a_smaller_batch_before_more_epochs() {
    let spec = spec(|s| s.train.batch = 64);
    let warning = updates_few(&spec, &facts(999, 100)).unwrap();
    let Some(Fix::Change(changes)) = warning.fix else { panic!("a fix") };
    assert_eq!(changes, vec![Change::Batch(20)]);
}

proptest! {
    /// Applying fixes comes to rest: no two rules push a value back and forth.
    #[test]
    fn fixes_come_to_rest(
        epochs in 0.1f64..20.0, steps in proptest::option::of(1u64..5000), batch in 1usize..200, rank in 1usize..300,
        alpha in 0.5f64..600.0, rate in 1e-7f64..1e-1, warmup in prop_oneof![0.0f64..1.0, 1.0f64..500.0],
        eval_every in 0.0f64..300.0, eval in 0.0f64..0.5, kind in 0usize..3, rslora: bool,
        rows in 1usize..5000, eval_rows in 0usize..300, duplicates in 0usize..100, shared in 0usize..5,
    ) {
        let mut spec = RunSpec::default();
        (spec.train.epochs, spec.train.steps, spec.train.batch) = (epochs, steps, batch);
        (spec.method.rank, spec.method.alpha, spec.method.rslora) = (rank, alpha, rslora);
        spec.method.kind = [MethodKind::Lora, MethodKind::Qlora, MethodKind::Full][kind];
        (spec.train.learning_rate, spec.train.warmup, spec.train.eval_every) = (Some(rate), warmup, eval_every);
        spec.data.eval = EvalData::Fraction(eval);
        let facts = Facts {
            rows: Some(rows), eval_rows: Some(eval_rows), duplicate_rows: duplicates, shared_rows: shared,
            lora_fits: Some(true), ..Facts::default()
        };
        for _ in 0..30 {
            let before = spec.clone();
            for warning in check(&spec.clone(), &facts) {
                if let Some(fix) = &warning.fix {
                    apply(&mut spec, fix);
                }
            }
            if spec == before {
                return Ok(());
            }
        }
        prop_assert!(false, "fixes go round in circles: {:?}", check(&spec, &facts));
    }
}
