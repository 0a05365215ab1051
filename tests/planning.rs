//! Plans for cards that are not here, from shapes alone: what must fit does, and what does not is refused with settings
//! that would.

use tune::backend::cuda::KnownCard;
use tune::model::{AdapterOptions, Method, ModelConfig, Recompute, TrainingOptions, names, training_workload};
use tune::program::plan::{PlanError, plan};
use tune::program::{BufferId, DType, Kind, Op, Plan, Role, Target};
use tune::train::checkpoint::PlanChoice;
use tune::train::planning::{PlanningError, Search};

const GIB: f64 = (1u64 << 30) as f64;

fn config(name: &str) -> ModelConfig {
    let path = format!("{}/tests/fixtures/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut config = ModelConfig::parse(&text).expect("a configuration");
    config.dtype = DType::BF16;
    config
}

fn adapter(rank: usize, weights: Option<DType>) -> Method {
    let targets = names::PROJECTIONS.iter().map(|name| name.to_string()).collect();
    Method::Lora { adapter: AdapterOptions { rank, targets, dropout: 0.0 }, weights }
}

fn lora() -> Method {
    adapter(16, None)
}

fn qlora(rank: usize) -> Method {
    adapter(rank, Some(DType::Nf4))
}

fn options(method: Method) -> TrainingOptions {
    TrainingOptions { eight_bit: true, ..TrainingOptions::new(method, Vec::new(), Vec::new()) }
}

fn card(name: &str) -> Target {
    KnownCard::named(name).unwrap_or_else(|none| panic!("{name}: {none:?}")).target()
}

/// A card of which a run may take this many bytes.
fn budget(card: Target, bytes: f64) -> Target {
    Target { memory: Some(bytes as u64), ..card }
}

/// An MLP that goes through in parts, for a part is all that an allocation takes, drops other elements in each of them, and
/// the same in the backward pass, which makes it again.
#[test]
fn parts_of_an_mlp_draw_masks_of_their_own() {
    let config = config("smollm2-135m");
    let Method::Lora { adapter, weights } = lora() else { unreachable!("it is") };
    let method = Method::Lora { adapter: AdapterOptions { dropout: 0.1, ..adapter }, weights };
    let row = 2 * 2 * config.intermediate_size as u64;
    let target = Target { largest_segment: 256 * row, ..card("H100") };
    for recompute in [Recompute::None, Recompute::All] {
        let sizes = vec![640];
        let options = TrainingOptions { sizes, recompute: vec![recompute; config.layers], ..options(method.clone()) };
        let workload = training_workload(&config, &options, &target).expect("a workload");
        let micro = workload.programs.iter().find(|program| program.role == Role::Micro).expect("a micro-batch");
        for module in ["gate_up", "down"] {
            let name = format!("layers.3.mlp.{module}");
            let (mut forward, mut backward) = (Vec::new(), Vec::new());
            for step in &micro.steps {
                match &step.op {
                    Op::Linear { projections, .. } if step.name == name => {
                        let lora = projections[0].lora.as_ref().expect("a branch");
                        forward.push(lora.dropout.expect("dropout").stream);
                    }
                    Op::LinearBackward { projections, .. } if step.name == format!("{name}.backward") => {
                        let lora = projections[0].lora.as_ref().expect("a branch");
                        backward.push(lora.dropout.expect("dropout").stream);
                    }
                    _ => {}
                }
            }
            forward.sort_unstable();
            forward.dedup();
            backward.sort_unstable();
            assert_eq!(forward.len(), 3, "{module}: 640 tokens in parts of 256");
            assert_eq!(forward, backward, "{module}");
        }
    }
}

fn search(
    config: &ModelConfig,
    method: Method,
    row: usize,
    batch: usize,
    target: &Target,
) -> Result<(Plan, PlanChoice), PlanningError> {
    let search = Search::new(config, options(method), target.clone(), row, row * batch);
    let (result, target) = (search.run(), &search.target);
    match &result {
        Ok((plan, choice)) => println!(
            "{} layers of {} on {}: {:.2} of {:.2} GiB, {:.2} on the host; {choice:?}",
            config.layers,
            config.hidden_size,
            target.name,
            plan.summary.peak_bytes as f64 / GIB,
            target.memory.unwrap_or(0) as f64 / GIB,
            plan.summary.host_bytes as f64 / GIB,
        ),
        Err(error) => println!("{} layers of {} on {}: {error}", config.layers, config.hidden_size, target.name),
    }
    result
}

#[test]
fn usual_runs_fit_the_cards_that_they_should() {
    let cases = [
        ("llama-3.2-3b", qlora(16), budget(card("RTX 3060"), 4e9)),
        ("mistral-7b-v0.3", lora(), card("RTX 4090")),
        ("llama-2-13b", qlora(16), card("RTX 4090")),
        ("llama-3.1-70b", qlora(16), card("A6000")),
    ];
    for (name, method, target) in cases {
        let (plan, _) =
            search(&config(name), method, 2048, 2, &target).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(plan.summary.peak_bytes <= target.memory.expect("a card's memory"));
    }
}

#[test]
fn the_longest_rows_fit() {
    let config = config("llama-3.1-8b");
    for (row, name) in [(2972, "RTX 4060"), (40_724, "RTX 4080"), (78_475, "RTX 4090"), (342_733, "H100")] {
        // The 8 GB card of that name is the smaller sibling of one with 16.
        let target = if name == "RTX 4060" { budget(card("RTX 3060"), 7.0 * GIB) } else { card(name) };
        search(&config, qlora(32), row, 1, &target).unwrap_or_else(|error| panic!("{row} tokens on {name}: {error}"));
    }
}

/// Full fine-tuning keeps weights and gradients on the card; the states of the optimizer lie on the host.
#[test]
fn full_fine_tuning_of_8b_fits_48_gb() {
    for host_optimizer in [Some(true), None] {
        let (config, target) = (config("llama-3.1-8b"), card("A6000"));
        let search = Search { host_optimizer, ..Search::new(&config, options(Method::Full), target, 2048, 4096) };
        let (plan, choice) = search.run().expect("8B in 48 GB");
        let target = &search.target;
        println!("{:.2} GiB, {choice:?}", plan.summary.peak_bytes as f64 / GIB);
        assert!(plan.summary.peak_bytes <= target.memory.expect("a card's memory"));
        let states = 2 * config.parameters();
        if host_optimizer == Some(true) {
            assert!(choice.host_optimizer && plan.summary.host_bytes >= states, "{choice:?}");
            assert_eq!(plan.summary.bytes.get("optimizer").copied().unwrap_or(0), 0);
        }
        // f32 gradients alone would take 30 GiB beside 15 of weights.
        assert!(choice.half_gradients);
    }
}

/// Budgets of the design's table, of which the rival's figures are the limits.
#[test]
fn the_budgets_of_the_table_are_met() {
    let cases = [
        ("llama-3.1-8b", lora(), 2048, 2, 16.5),
        ("llama-3.1-8b", qlora(16), 2048, 2, 6.8),
        ("llama-3.1-8b", qlora(16), 2048, 8, 9.9),
        ("llama-3.1-8b", qlora(16), 32_768, 1, 14.0),
        ("llama-3.2-1b", lora(), 2048, 4, 3.6),
        ("llama-3.2-1b", Method::Full, 2048, 4, 7.7),
        ("smollm2-135m", lora(), 512, 8, 0.6),
        ("smollm2-135m", Method::Full, 512, 8, 0.95),
    ];
    for (name, method, row, batch, gib) in cases {
        let mut target = budget(card("H100"), gib * GIB);
        // One size, as the measured rows have it.
        target.micro_sizes = vec![row * batch];
        search(&config(name), method, row, batch, &target).unwrap_or_else(|error| panic!("{name} in {gib}: {error}"));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_settings_that_would() {
    let config = config("llama-3.1-8b");
    let Err(PlanningError::Plan(PlanError::DoesNotFit { needed, available, fits, .. })) =
        search(&config, lora(), 2048, 2, &card("RTX 4070"))
    else {
        panic!("8B in bf16 fits no 12 GB card");
    };
    assert!(needed > available);
    assert_eq!(fits, ["engine.precision = \"fp8\"", "model.weights = \"int8\"", "method.kind = \"qlora\""]);
    // An Ampere card has no 8-bit products.
    let Err(PlanningError::Plan(PlanError::DoesNotFit { fits, .. })) =
        search(&config, lora(), 2048, 2, &card("RTX 3060"))
    else {
        panic!("8B in bf16 fits no 12 GB card");
    };
    assert_eq!(fits, ["model.weights = \"int8\"", "method.kind = \"qlora\""]);

    let Err(PlanningError::Plan(PlanError::DoesNotFit { fits, .. })) =
        search(&config, qlora(16), 65_536, 1, &budget(card("RTX 4070"), 9.0 * GIB))
    else {
        panic!("65,536 tokens fit no 9 GiB");
    };
    let lengths = fits.iter().filter_map(|setting| setting.strip_prefix("data.max_length = "));
    let longest: usize = lengths.map(|length| length.parse().expect("a length")).next().expect("shorter rows fit");
    let tight = budget(card("RTX 4070"), 9.0 * GIB);
    search(&config, qlora(16), longest, 1, &tight).expect("what was proposed fits");
    search(&config, qlora(16), longest + longest / 16, 1, &tight).expect_err("and is the longest, nearly");
}

/// Settings that are proposed contradict nothing that was asked for, and are there for every method.
#[test]
fn proposed_settings_fit_whatever_is_trained() {
    let config = config("llama-3.1-8b");
    let fits_rows = |method: Method, row: usize, target: &Target| match search(&config, method, row, 2, target) {
        Err(PlanningError::Plan(PlanError::DoesNotFit { fits, .. } | PlanError::HostTooSmall { fits, .. })) => fits,
        other => panic!("{other:?} where nothing fits"),
    };
    let fits = |method: Method, target: &Target| fits_rows(method, 2048, target);
    let settings = fits(Method::Full, &card("RTX 4090"));
    assert_eq!(settings, ["method.kind = \"lora\"", "method.kind = \"qlora\""]);
    let settings = fits(adapter(16, Some(DType::Fp8)), &budget(card("RTX 4070"), 7.0 * GIB));
    assert_eq!(settings, ["method.kind = \"qlora\" with engine.precision = \"bf16\" and model.weights = \"auto\""]);
    let settings = fits(qlora(512), &budget(card("RTX 4070"), 7.5 * GIB));
    assert!(settings.iter().any(|setting| setting.starts_with("method.rank = ")), "{settings:?}");
    // Nothing alone: smaller weights and shorter rows together.
    let settings = fits_rows(lora(), 32_768, &budget(card("RTX 4070"), 5.5 * GIB));
    assert!(settings.len() == 1 && settings[0].contains(" with data.max_length = "), "{settings:?}");
    assert_eq!(fits(lora(), &budget(card("RTX 4070"), 2.0 * GIB)), Vec::<String>::new());
}

/// What layers leave on the host is there once, for programs of all sizes run one after the other, and no plan keeps more
/// there than the machine has.
#[test]
fn the_host_holds_what_is_left_there() {
    let config = config("llama-3.1-8b");
    let target = card("RTX 4080");
    let (plan, choice) = search(&config, qlora(32), 40_724, 1, &target).expect("a plan");
    assert!(choice.sizes.len() > 4 && choice.offloaded_layers > 0, "{choice:?}");
    let host = target.host_memory.expect("a host's memory");
    assert!(plan.summary.host_bytes <= host, "{} of {host}", plan.summary.host_bytes);

    // Full fine-tuning with all states on the host, of which there is too little.
    let target = Target { host_memory: Some(4 << 30), ..budget(card("A6000"), 36.0 * GIB) };
    let Err(PlanningError::Plan(error)) = search(&config, Method::Full, 2048, 2, &target) else {
        panic!("states of 15 GiB fit no host with 4");
    };
    let (PlanError::DoesNotFit { fits, .. } | PlanError::HostTooSmall { fits, .. }) = &error else { panic!("{error}") };
    assert_eq!(fits[..], ["method.kind = \"lora\"", "method.kind = \"qlora\""], "{error}");
}

/// 8-bit weights take half of the memory and less time; a card without such products refuses them by name.
#[test]
fn fp8_halves_the_weights_where_the_card_has_it() {
    let config = config("llama-3.1-8b");
    let mut target = card("H100");
    target.micro_sizes = vec![4096];
    let fp8 = adapter(16, Some(DType::Fp8));
    let (plain, _) = search(&config, lora(), 2048, 2, &target).expect("a plan");
    let (small, _) = search(&config, fp8.clone(), 2048, 2, &target).expect("a plan");
    // Plain weights have room for LoRA branches at the end of their rows.
    let room: u64 = plain
        .workload
        .of_kind(Kind::Weight)
        .map(|(id, buffer)| plain.spare.bytes(&plain.workload, id, buffer.dtype) - buffer.bytes())
        .sum();
    let saved = plain.summary.bytes["weights"] - small.summary.bytes["weights"] - room;
    let matrices = config.parameters() - 2 * 128_256 * 4096 - (2 * 32 + 1) * 4096;
    assert!(saved.abs_diff(matrices) < 1 << 20, "{saved} of {matrices}");
    let seconds = |plan: &Plan| plan.summary.programs.iter().map(|program| program.estimated_seconds).sum::<f64>();
    assert!(seconds(&small) < 0.75 * seconds(&plain));
    for name in ["A100", "RTX 3090"] {
        let error = search(&config, fp8.clone(), 2048, 2, &card(name)).expect_err("no 8-bit products");
        assert!(error.to_string().contains(name) && error.to_string().contains("Hopper"), "{error}");
    }
}

/// What no gradient needs is not kept: inputs of linear layers that train nothing, and gated products of which the backward pass
/// does without.
#[test]
fn activations_are_kept_only_where_something_reads_them() {
    let config = config("llama-3.1-8b");
    let (tokens, layers) = (4096, config.layers as u64);
    let kept = |method: Method, target: &Target| {
        let mut options = options(method);
        (options.sizes, options.recompute) = (vec![tokens], vec![Recompute::None; config.layers]);
        let plan = plan(training_workload(&config, &options, target).expect("a workload"), target.clone());
        plan.expect("a plan").summary.bytes["activations"]
    };
    let named = |names: &[&str]| {
        let targets = names.iter().map(|name| name.to_string()).collect();
        Method::Lora { adapter: AdapterOptions { rank: 16, targets, dropout: 0.0 }, weights: None }
    };
    let h100 = card("H100");
    let keeps_norms = Target { norms: None, ..h100.clone() };
    let keeps_all = Target { gated_rank: 0, ..keeps_norms.clone() };
    let bytes = |columns: usize| layers * (tokens * columns * 2) as u64;
    let (product, hidden) = (bytes(config.intermediate_size), bytes(config.hidden_size));
    let about = |found: u64, expected: u64| found.abs_diff(expected) < expected / 20;
    let saved = kept(lora(), &keeps_all) - kept(lora(), &keeps_norms);
    assert!(about(saved, product), "{saved} of {product}");
    // The norms before attention, but for that of the first layer, and before the MLP.
    let saved = kept(lora(), &keeps_norms) - kept(lora(), &h100);
    assert!(about(saved, 2 * hidden), "{saved} of {}", 2 * hidden);
    // Branches of large ranks are too many sums.
    assert!(kept(qlora(32), &h100) > kept(qlora(16), &h100) + hidden);
    // Neither the product nor what gate and up read.
    let saved = kept(lora(), &keeps_all) - kept(named(&["q_proj", "v_proj"]), &keeps_all);
    assert!(about(saved, product + hidden), "{saved} of {}", product + hidden);
    // Branches that drop elements need it, and large ones on cards with little shared memory.
    let Method::Lora { adapter, .. } = lora() else { unreachable!() };
    let drops = Method::Lora { adapter: AdapterOptions { dropout: 0.1, ..adapter }, weights: None };
    assert!(kept(drops, &h100) > kept(lora(), &h100) + product / 2);
    let rtx = Target { memory: None, ..card("RTX 4090") };
    assert_eq!(kept(qlora(16), &rtx), kept(qlora(16), &keeps_norms));
    assert!(kept(qlora(32), &rtx) > kept(qlora(32), &keeps_norms) + product / 2);
}

/// What engines do without is counted as such: per layer a gated product and both norms, but for the first layer's first, whose
/// gradient nothing needs; what layers run again is needed for more, and so are norms that many ranks or few tokens read.
#[test]
fn products_and_norms_are_done_without_where_gradients_come_with_others() {
    let (config, h100) = (config("llama-3.2-1b"), card("H100"));
    let without = |method: Method, tokens: usize, recompute: Recompute, target: &Target| {
        let mut options = options(method);
        (options.sizes, options.recompute) = (vec![tokens], vec![recompute; config.layers]);
        let plan = plan(training_workload(&config, &options, target).expect("a workload"), target.clone());
        let workload = plan.expect("a plan").workload;
        let program = &workload.programs[workload.program(&format!("micro.{tokens}")).expect("a micro-batch")];
        (0..program.steps.len()).filter(|&at| program.does_without(&workload, at, target)).count()
    };
    let layers = config.layers;
    for recompute in [Recompute::None, Recompute::Cheap] {
        assert_eq!(without(lora(), 8192, recompute, &h100), 3 * layers - 1, "{recompute:?}");
        assert_eq!(without(qlora(32), 8192, recompute, &h100), layers, "{recompute:?}");
        assert_eq!(without(lora(), 2048, recompute, &h100), layers, "{recompute:?}");
        assert_eq!(without(lora(), 8192, recompute, &card("RTX 4090")), layers, "{recompute:?}");
    }
    assert_eq!(without(lora(), 8192, Recompute::All, &h100), layers);
}

/// Moves go from cheap to dear: nothing is given up while there is room, and the embedding leaves the card first.
#[test]
fn plans_give_up_no_more_than_they_must() {
    let config = config("llama-3.1-8b");
    let mut target = card("H100");
    target.micro_sizes = vec![4096];
    let (free, choice) = search(&config, lora(), 2048, 2, &target).expect("a plan");
    assert_eq!((choice.recomputed_layers, choice.cheap_layers, choice.host_embedding), (0, 0, false));
    assert_eq!(free.summary.host_bytes, 0);
    let slightly_less = budget(target.clone(), (free.summary.peak_bytes - 1) as f64);
    let (less, choice) = search(&config, lora(), 2048, 2, &slightly_less).expect("a plan");
    assert_eq!((choice.recomputed_layers, choice.cheap_layers, choice.host_embedding), (0, 0, true));
    let table = 128_256 * 4096 * 2;
    assert_eq!(less.summary.host_bytes, table);
    assert_eq!(less.summary.peak_bytes + table, free.summary.peak_bytes);
    // Tied to the head, it stays.
    let small = self::config("llama-3.2-1b");
    let (plan, _) = search(&small, lora(), 2048, 2, &budget(card("H100"), 4.0 * GIB)).expect("a plan");
    assert_eq!(plan.summary.host_bytes, 0);
}

/// Where computing everything again is not enough: inputs of layers go to the host, over long rows attention's output with
/// them; what the host cannot hold is won by working in chunks, each of which unpacks the weights anew.
#[test]
fn short_memory_takes_the_fastest_way() {
    let config = config("llama-3.1-8b");
    let table = 128_256 * 4096 * 2;
    let within = |gib: f64, tokens: usize| {
        let mut target = budget(card("H100"), gib * GIB);
        target.micro_sizes = vec![tokens];
        target
    };
    let target = within(9.85, 16_384);
    let (plan, choice) = search(&config, qlora(16), 2048, 8, &target).expect("a plan");
    assert_eq!((choice.mlp_chunks, choice.small_head, choice.kept_attention), (0, false, false));
    let input = 16_384 * 4096 * 2;
    assert_eq!(plan.summary.host_bytes, table + choice.offloaded_layers as u64 * input);

    let (_, long) = search(&config, qlora(16), 32_768, 1, &within(13.9, 32_768)).expect("a plan");
    assert!(long.kept_attention && long.offloaded_layers > 0, "{long:?}");

    let most = table + 4 * input;
    let host = Target { host_memory: Some(most), ..target };
    let (plan, choice) = search(&config, qlora(16), 2048, 8, &host).expect("a plan");
    assert!(choice.mlp_chunks > 1 && choice.offloaded_layers <= 4, "{choice:?}");
    assert!(plan.summary.host_bytes <= most);
}

/// A plan counts what captured programs take. Every micro-batch is captured where there is memory; where it is short, of many
/// sizes of a large model only those that the host could not keep up with, of a small one all.
#[test]
fn captured_programs_are_part_of_the_plan() {
    let short = budget(card("H100"), 5.7 * GIB);
    for (name, method, target, all) in [
        ("llama-3.1-8b", qlora(16), card("H100"), true),
        ("llama-3.1-8b", qlora(16), short, false),
        ("smollm2-135m", lora(), card("H100"), true),
        ("smollm2-135m", lora(), budget(card("H100"), 0.6 * GIB), true),
    ] {
        let (plan, choice) = search(&config(name), method, 2048, 1, &target).expect("a plan");
        let programs = &plan.summary.programs;
        assert_eq!(plan.summary.bytes["graphs"], programs.iter().map(|program| program.graph_bytes).sum::<u64>());
        let micro = programs.iter().filter(|program| program.role == Role::Micro);
        let captured = micro.filter(|program| program.graph_bytes > 0).count();
        assert!(captured > 0 && (captured == choice.sizes.len()) == all, "{name}: {captured} of {:?}", choice.sizes);
    }
}

/// Rows have room for LoRA branches where a product takes them from there, and nowhere else.
#[test]
fn rows_have_columns_to_spare_for_branches_only() {
    let config = config("smollm2-135m");
    let names = |method: Method, target: &Target| -> Vec<(String, usize)> {
        let options =
            TrainingOptions { sizes: vec![512], recompute: vec![Recompute::None; config.layers], ..options(method) };
        let plan =
            plan(training_workload(&config, &options, target).expect("a workload"), target.clone()).expect("a plan");
        let workload = &plan.workload;
        let spare = |index: usize| plan.spare.columns(workload, BufferId(index as u32));
        let named = workload.buffers.iter().enumerate().filter(|(_, buffer)| buffer.name.contains("layers.3."));
        named.map(|(index, buffer)| (buffer.name.clone(), spare(index))).filter(|(_, spare)| *spare > 0).collect()
    };
    let dropped = |rank| {
        let Method::Lora { mut adapter, weights } = adapter(rank, None) else { unreachable!() };
        adapter.dropout = 0.1;
        Method::Lora { adapter, weights }
    };
    let of = |pairs: &[(String, usize)], name: &str| {
        pairs.iter().find(|(found, _)| found.ends_with(name)).map(|(_, spare)| *spare)
    };
    let target = card("H100");
    let plain = names(lora(), &target);
    for name in [
        "micro.512:layers.3.norm1",
        "evaluate.512:layers.3.norm2",
        "micro.512:layers.3.mlp.glu",
        "micro.512:layers.3.attn",
        "layers.3.self_attn.o_proj.weight",
        // Gradients of outputs, and what one of them lies over.
        "micro.512:layers.3.mlp.gate_up",
        "micro.512:layers.3.mlp.grad_gate_up",
        "micro.512:layers.3.attn.grad_qkv",
        "micro.512:layers.3.norm2.grad_input",
        "layers.3.self_attn.k_proj.weight",
        "layers.3.mlp.up_proj.weight",
        "layers.3.mlp.down_proj.weight",
    ] {
        assert_eq!(of(&plain, name), Some(64), "{name} in {plain:?}");
    }
    for name in ["evaluate.512:layers.3.mlp.gate_up", "micro.512:layers.3.attn.qkv", "layers.3.mlp.gate_up.grad_input"]
    {
        assert_eq!(of(&plain, name), None, "{name} in {plain:?}");
    }
    let quantized = names(qlora(16), &target);
    assert!(
        quantized.len() < plain.len() && quantized.iter().all(|(name, _)| !name.ends_with("weight")),
        "{quantized:?}"
    );
    for (method, target) in [
        (Method::Full, &target),
        (dropped(16), &target),
        (adapter(4, None), &target),
        (adapter(16, Some(DType::Fp8)), &target),
        (lora(), &tune::backend::cpu::target().expect("a target")),
    ] {
        assert_eq!(names(method, target), []);
    }
}
