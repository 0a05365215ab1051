//! Generation: the loop over a session, and greedy answers of a real model.

use std::cell::RefCell;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::Deserialize;
use tune::backend::{self, EngineError, Session};
use tune::generate::{Answer, Finish, GenerateError, Generator, Sampling};
use tune::model::{GenerationOptions, Model as RealModel, generation_workload};
use tune::program::{BufferId, DType, Kind, Plan, Rates, Role, Target, Workload, WorkloadBuilder, plan};

const VOCABULARY: usize = 32;

/// The runs a session was asked for: program size and start.
type Runs = Rc<RefCell<Vec<(usize, i32)>>>;

/// A "model" whose next token is the sum of all tokens so far, modulo the vocabulary. It keeps a cache as a real
/// session does, padding rows included.
struct Adder {
    plan: Plan,
    contents: Vec<Vec<u8>>,
    cache: Vec<i32>,
    runs: Runs,
}

fn workload(sizes: &[usize]) -> Workload {
    let mut builder = WorkloadBuilder::new();
    builder.persistent("logits", &[1, VOCABULARY], DType::F32, Kind::Output);
    for &size in sizes {
        for name in ["ids", "positions"] {
            builder.persistent(&format!("inputs.{size}.{name}"), &[size], DType::I32, Kind::Input);
        }
        for name in ["rows", "start"] {
            builder.persistent(&format!("inputs.{size}.{name}"), &[1], DType::I32, Kind::Input);
        }
        let (name, role) = match size {
            1 => ("decode".to_string(), Role::Decode),
            _ => (format!("prefill.{size}"), Role::Prefill),
        };
        builder.begin(&name, role, size);
        builder.end();
    }
    builder.finish()
}

/// A generator with its session.
struct Model {
    session: Adder,
    generator: Generator,
}

impl Model {
    fn generate(&mut self, prompt: &[u32], max_tokens: usize) -> Answer {
        self.generator.generate(&mut self.session, prompt, &Sampling::default(), max_tokens, go).unwrap()
    }
}

fn adder(sizes: &[usize], capacity: usize) -> (Model, Runs) {
    let target = Target {
        name: "test".into(),
        engine: "cpu",
        memory: None,
        largest_segment: 1 << 30,
        alignment: 64,
        compute: DType::F32,
        trainable: DType::F32,
        gradients: DType::F32,
        micro_sizes: vec![],
        rates: Rates { flops: 1e9, attention_flops: 1e9, bandwidth: 1e9, per_op: 0.0 },
        fp8_flops: None,
        library_workspace: 0,
        graph_bytes: 0,
        bus_bandwidth: 24e9,
        host_memory: None,
        logits_bytes: 1 << 20,
        mlp_tokens: usize::MAX,
        gated_rank: 0,
        norms: None,
    };
    let plan = plan::plan(workload(sizes), target).unwrap();
    let contents = plan.workload.buffers.iter().map(|buffer| vec![0; buffer.bytes() as usize]).collect();
    let runs = Runs::default();
    let session = Adder { plan, contents, cache: vec![-1000; capacity], runs: runs.clone() };
    let generator = Generator::new(&session.plan.workload, &[0], capacity).unwrap();
    (Model { session, generator }, runs)
}

impl Adder {
    fn integers(&self, name: &str) -> Vec<i32> {
        let id = self.plan.workload.find(name).unwrap();
        bytemuck::pod_collect_to_vec(&self.contents[id.index()])
    }
}

impl Session for Adder {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn write(&mut self, buffer: BufferId, bytes: &[u8]) -> Result<(), EngineError> {
        self.contents[buffer.index()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, buffer: BufferId, bytes: &mut [u8]) -> Result<(), EngineError> {
        bytes.copy_from_slice(&self.contents[buffer.index()]);
        Ok(())
    }

    fn run(&mut self, program: usize) -> Result<(), EngineError> {
        let size = self.plan.workload.programs[program].tokens;
        let ids = self.integers(&format!("inputs.{size}.ids"));
        let positions = self.integers(&format!("inputs.{size}.positions"));
        let start = self.integers(&format!("inputs.{size}.start"))[0];
        let row = self.integers(&format!("inputs.{size}.rows"))[0] as usize;
        self.runs.borrow_mut().push((size, start));
        for (offset, id) in ids.into_iter().enumerate() {
            assert_eq!(positions[offset], start + offset as i32);
            self.cache[start as usize + offset] = id;
        }
        let sum: i32 = self.cache[..=start as usize + row].iter().sum();
        let mut logits = [0f32; VOCABULARY];
        logits[sum.rem_euclid(VOCABULARY as i32) as usize] = 1.0;
        let id = self.plan.workload.find("logits").unwrap();
        self.contents[id.index()].copy_from_slice(bytemuck::cast_slice(&logits));
        Ok(())
    }

    fn run_steps(&mut self, program: usize, _: Range<usize>) -> Result<(), EngineError> {
        self.run(program)
    }

    fn synchronize(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    fn allocated_bytes(&self) -> u64 {
        0
    }
}

fn go(_: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn an_answer_ends_at_a_stop_token_which_is_not_part_of_it() {
    let (mut model, _) = adder(&[1, 8], 64);
    // 1 + 3 = 4, then 8, 16, 32 = 0: the stop token.
    let mut seen = Vec::new();
    let answer = model
        .generator
        .generate(&mut model.session, &[1, 3], &Sampling::default(), 20, |token| {
            seen.push(token);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(answer.tokens, [4, 8, 16]);
    assert_eq!(answer.finish, Finish::Stop(0));
    assert_eq!(seen, answer.tokens);
}

#[test]
fn padding_and_chunks_change_nothing() {
    let prompt: Vec<u32> = (1..=21).collect();
    let (mut reference, _) = adder(&[1], 64);
    let expected = reference.generate(&prompt, 9);
    for sizes in [&[1, 4][..], &[1, 16], &[1, 4, 8, 32]] {
        let (mut model, _) = adder(sizes, 64);
        assert_eq!(model.generate(&prompt, 9), expected, "{sizes:?}");
    }
}

#[test]
fn a_prefix_in_the_cache_is_not_run_again() {
    let (mut model, runs) = adder(&[1, 8], 64);
    let first = model.generate(&[5, 6, 7], 3);
    let mut second: Vec<u32> = [5, 6, 7].into_iter().chain(first.tokens).collect();
    second.extend([1, 2]);
    runs.borrow_mut().clear();
    let answer = model.generate(&second, 1);
    // The last token of the first answer was chosen but never run.
    assert_eq!(answer.reused, 5);
    assert_eq!(*runs.borrow(), [(8, 5)]);
    let (mut fresh, _) = adder(&[1, 8], 64);
    assert_eq!(fresh.generate(&second, 1).tokens, answer.tokens);
}

#[test]
fn a_changed_history_is_run_again_from_where_it_differs() {
    let (mut model, runs) = adder(&[1, 8], 64);
    model.generate(&[5, 6, 7, 8], 1);
    runs.borrow_mut().clear();
    let answer = model.generate(&[5, 6, 9], 1);
    assert_eq!((answer.tokens, answer.reused), (vec![20], 2));
    assert_eq!(*runs.borrow(), [(1, 2)]);
    model.generator.forget();
    assert_eq!(model.generate(&[5, 6, 9], 1).reused, 0);
}

#[test]
fn a_full_context_ends_the_answer() {
    let (mut model, _) = adder(&[1, 4], 6);
    let answer = model.generate(&[1, 1, 1], 100);
    // Six rows: three of the prompt and three of the answer; the fourth token was still chosen.
    assert_eq!(answer.finish, Finish::ContextFull);
    assert_eq!(answer.tokens, [3, 6, 12, 24]);
}

#[test]
fn length_and_interruption_are_told_apart() {
    let (mut model, _) = adder(&[1, 4], 64);
    let answer = model.generate(&[1], 2);
    assert_eq!((answer.tokens.len(), answer.finish), (2, Finish::Length));
    let stop = |_| ControlFlow::Break(());
    let answer = model.generator.generate(&mut model.session, &[1], &Sampling::default(), 9, stop).unwrap();
    assert_eq!((answer.tokens.len(), answer.finish), (1, Finish::Interrupted));
}

#[test]
fn prompts_that_cannot_be_run_are_refused_with_the_figures() {
    let (mut model, runs) = adder(&[1, 4], 8);
    let mut error =
        |prompt: &[u32]| model.generator.generate(&mut model.session, prompt, &Sampling::default(), 1, go).unwrap_err();
    assert!(matches!(error(&[]), GenerateError::EmptyPrompt));
    assert!(matches!(error(&[1; 9]), GenerateError::PromptTooLong { tokens: 9, capacity: 8 }));
    assert!(matches!(error(&[40]), GenerateError::UnknownToken { token: 40, vocabulary: VOCABULARY }));
    assert!(runs.borrow().is_empty());
}

/// `smollm2-135m-greedy.json`, made by `tests/reference/make_golden.py`: greedy answers of Transformers in f32.
#[derive(Deserialize)]
struct Golden {
    runs: Vec<GoldenAnswer>,
}

#[derive(Deserialize)]
struct GoldenAnswer {
    prompt: String,
    prompt_ids: Vec<u32>,
    /// The stop token included.
    generated_ids: Vec<u32>,
    finished: bool,
}

fn smollm2() -> Option<PathBuf> {
    let folder = std::env::var_os("TUNE_SMOLLM2")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m"), PathBuf::from);
    if folder.join("config.json").exists() {
        return Some(folder);
    }
    println!("left out: no SmolLM2 at {}; tests/run.sh makes it", folder.display());
    None
}

#[test]
fn greedy_answers_of_smollm2_equal_those_of_transformers() {
    let Some(folder) = smollm2() else { return };
    let golden: Golden = serde_json::from_str(include_str!("fixtures/smollm2-135m-greedy.json")).unwrap();
    let model = RealModel::open(&folder, 0).unwrap();
    let choice = backend::choose("cpu", "f32").unwrap();
    let options = GenerationOptions { capacity: 256, prefill_sizes: vec![16, 64] };
    let workload = generation_workload(&model.config, &options, None, None, &choice.target).unwrap();
    let plan = plan::plan(workload, choice.target).unwrap();
    let mut session = backend::open(plan, model.weights.clone(), &choice.device).unwrap();
    let mut generator = Generator::new(&session.plan().workload, &model.eos_token_ids, options.capacity).unwrap();
    for run in golden.runs {
        let max_tokens = run.generated_ids.len();
        let answer =
            generator.generate(session.as_mut(), &run.prompt_ids, &Sampling::default(), max_tokens, go).unwrap();
        let mut tokens = answer.tokens;
        if let Finish::Stop(token) = answer.finish {
            tokens.push(token);
        }
        assert_eq!(tokens, run.generated_ids, "{}", run.prompt);
        assert_eq!(matches!(answer.finish, Finish::Stop(_)), run.finished, "{}", run.prompt);
    }
}
