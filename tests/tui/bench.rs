//! What the tests share: an app with something in it, keys, and the buffer as text.

use std::collections::BTreeMap;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use tune::monitor::{GpuSample, HostSample, MachineSample};
use tune::run::{Event, Record};
use tune::tui::app::App;
use tune::tui::history::{History, State};
use tune::tui::message::*;
use tune::tui::widgets::Look;

/// Presses keys: words are named keys, anything else is typed character by character.
pub fn press(app: &mut App, keys: &str) {
    for word in keys.split(' ').filter(|word| !word.is_empty()) {
        let named = match word {
            "enter" => Some((KeyCode::Enter, KeyModifiers::NONE)),
            "esc" => Some((KeyCode::Esc, KeyModifiers::NONE)),
            "tab" => Some((KeyCode::Tab, KeyModifiers::NONE)),
            "up" => Some((KeyCode::Up, KeyModifiers::NONE)),
            "down" => Some((KeyCode::Down, KeyModifiers::NONE)),
            "right" => Some((KeyCode::Right, KeyModifiers::NONE)),
            "left" => Some((KeyCode::Left, KeyModifiers::NONE)),
            "space" => Some((KeyCode::Char(' '), KeyModifiers::NONE)),
            "backspace" => Some((KeyCode::Backspace, KeyModifiers::NONE)),
            "ctrl-u" => Some((KeyCode::Char('u'), KeyModifiers::CONTROL)),
            "ctrl-p" => Some((KeyCode::Char('p'), KeyModifiers::CONTROL)),
            _ => None,
        };
        match named {
            Some((code, modifiers)) => app.handle(Message::Key(KeyEvent::new(code, modifiers))),
            None => word.chars().for_each(|character| {
                app.handle(Message::Key(KeyEvent::new(KeyCode::Char(character), KeyModifiers::NONE)));
            }),
        }
    }
}

/// The screen as a buffer.
pub fn buffer(app: &App, width: u16, height: u16) -> Buffer {
    let mut buffer = Buffer::empty(Rect::new(0, 0, width, height));
    let look = Look::new(&app.theme, &app.glyphs);
    app.draw(&mut buffer, &look);
    buffer
}

/// The screen as text, line ends trimmed.
pub fn text(app: &App, width: u16, height: u16) -> String {
    let buffer = buffer(app, width, height);
    (0..height)
        .map(|y| {
            let mut line = String::new();
            let mut skip = 0;
            for x in 0..width {
                let symbol = buffer[(x, y)].symbol();
                if skip > 0 {
                    skip -= 1;
                    continue;
                }
                line.push_str(symbol);
                skip = ratatui::text::Span::raw(symbol).width().saturating_sub(1);
            }
            line.trim_end().to_owned()
        })
        .collect::<Vec<_>>()
        .join("\n")
}

const GIB: u64 = 1 << 30;

pub fn models() -> Vec<ModelEntry> {
    let entry = |id: &str, origin, parameters: u64, bytes: u64, context, license: &str| ModelEntry {
        id: id.into(),
        origin,
        family: "llama".into(),
        parameters: Some(parameters),
        bytes: Some(bytes),
        context: Some(context),
        license: license.into(),
        problem: None,
        fits: vec![("lora", Fit::Fits(2 * GIB)), ("qlora", Fit::Unsupported), ("full", Fit::Tight(22 * GIB))],
        downloads: None,
    };
    let mut models = vec![
        entry("demo", Origin::Embedded, 1_640_000, 3_300_000, 512, "MIT"),
        entry("HuggingFaceTB/SmolLM2-135M-Instruct", Origin::Cache, 134_515_008, 269_060_552, 8192, "apache-2.0"),
        entry(
            "/srv/models/meta-llama/Llama-3.1-8B-Instruct",
            Origin::Folder,
            8_030_261_248,
            16_060_522_496,
            131_072,
            "llama3.1",
        ),
    ];
    models[2].fits =
        vec![("lora", Fit::TooLarge(31 * GIB)), ("qlora", Fit::Unsupported), ("full", Fit::TooLarge(90 * GIB))];
    models.push(ModelEntry {
        id: "/srv/models/mamba-2.8b".into(),
        origin: Origin::Folder,
        family: "mamba".into(),
        parameters: None,
        bytes: Some(11 * GIB),
        context: None,
        license: String::new(),
        problem: Some("architecture MambaForCausalLM is not supported".into()),
        fits: Vec::new(),
        downloads: None,
    });
    models
}

pub fn preview() -> Preview {
    let piece = |text: &str, kind| Piece { text: text.into(), kind };
    use PieceKind::*;
    let row = RowView {
        tokens: 31,
        trained: 9,
        pieces: vec![
            piece("<|im_start|>", Special),
            piece("user\n", Masked),
            piece("Name the capital of France and say one thing it is known for.", Masked),
            piece("<|im_end|>", Special),
            piece("\n", Masked),
            piece("<|im_start|>", Special),
            piece("assistant\n", Masked),
            piece("Paris", Trained),
            piece(", known for the Eiffel Tower.", Trained),
            piece("<|im_end|>", TrainedSpecial),
            piece("\n", Masked),
        ],
    };
    Preview {
        format: "alpaca".into(),
        columns: vec![
            ("instruction".into(), Some("prompt".into())),
            ("output".into(), Some("response".into())),
            ("context".into(), None),
        ],
        rows: 899,
        eval_rows: 100,
        dropped: 0,
        empty: 1,
        duplicates: 12,
        shared: 2,
        cut: 17,
        label_tokens: 98_000,
        lengths: (0..999).map(|index: usize| 40 + (index * index) % 700 + (index % 7) * 30).collect(),
        lint: vec!["3 responses end without an end-of-turn token".into()],
        samples: vec![row; 5],
        unmapped: vec!["context".into()],
    }
}

pub fn forecast() -> Forecast {
    let bytes = [
        ("weights", 269_060_552u64),
        ("adapter", 19_537_920),
        ("gradients", 19_537_920),
        ("optimizer", 39_075_840),
        ("activations", 1_310_000_000),
        ("workspace", 201_326_592),
        ("inputs", 49_152),
    ];
    Forecast {
        device: "CPU, 2 threads".into(),
        reason: "no GPU was found".into(),
        bytes: bytes.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect::<BTreeMap<_, _>>(),
        capacity: Some(24 * GIB),
        micro_sizes: vec![512, 1024, 2048],
        step_seconds: 6.4,
        updates: Some(113),
        updates_per_epoch: Some(113),
        trainable_parameters: 4_884_480,
        parameters: 134_515_008,
        lora_fits: Some(true),
    }
}

pub fn record(second: u64, event: Event) -> Record {
    Record { time: format!("2026-11-22T10:{:02}:{:02}.000Z", second / 60 % 60, second % 60), event }
}

/// Events of a run up to an update.
pub fn events(steps: u64, until: u64) -> Vec<Record> {
    let mut events = vec![
        record(
            0,
            Event::Started {
                run: "261122-100000-otter".into(),
                model: "HuggingFaceTB/SmolLM2-135M-Instruct".into(),
                device: "CPU, 2 threads".into(),
                reason: "no GPU was found".into(),
                version: "0.1.0".into(),
                process: 4242,
                rows: 899,
                eval_rows: 100,
                steps,
                epochs: 1.0,
                trainable_parameters: 4_884_480,
                parameters: 134_515_008,
            },
        ),
        record(
            1,
            Event::Plan {
                peak_bytes: 1_858_587_976,
                bytes: forecast().bytes,
                micro_sizes: vec![512, 1024, 2048],
                estimated_step_seconds: 5.0,
                recompute: "none".into(),
            },
        ),
    ];
    for step in 1..=until {
        let share = step as f64 / steps as f64;
        let noise = (((step * 7919) % 101) as f64 / 101.0 - 0.5) * 0.3;
        events.push(record(
            step,
            Event::Step {
                step,
                epoch: share,
                loss: 0.9 + 1.4 * (-4.0 * share).exp() + noise,
                grad_norm: 0.8 + noise.abs() * 2.0,
                learning_rate: 2e-4 * (1.0 - share),
                tokens: 1434,
                label_tokens: 800,
                padding: 102,
                tokens_per_second: 224.0,
                seconds: 6.4,
                vram_bytes: 0,
            },
        ));
        if step % (steps / 5).max(1) == 0 {
            let loss = 1.0 + 1.2 * (-3.5 * share).exp();
            events.push(record(step, Event::Eval { step, loss, perplexity: loss.exp(), tokens: 12_000 }));
            events.push(record(
                step,
                Event::Checkpoint { step, path: format!("/runs/otter/checkpoints/step-{step}").into(), best: true },
            ));
            events.push(record(
                step,
                Event::Sample {
                    step,
                    prompt: "What is the capital of France?".into(),
                    text: "The capital of France is Paris, which is known for the Eiffel Tower.".into(),
                },
            ));
        }
    }
    events.push(record(
        until,
        Event::Warning {
            rule: "memorised".into(),
            message: "training loss 0.190: near memorised".into(),
            advice: "evaluate now, to see whether it still helps on rows it has not seen (evaluate now)".into(),
        },
    ));
    events
}

pub fn history(steps: u64, until: u64) -> History {
    let mut history = History::default();
    events(steps, until).into_iter().for_each(|record| history.take(record));
    history
}

pub fn machine() -> MachineSample {
    MachineSample {
        gpus: vec![GpuSample {
            index: 0,
            name: "NVIDIA H100 80GB HBM3".into(),
            memory_used: 17 * GIB,
            memory_total: 80 * GIB,
            utilization: Some(97),
            temperature: Some(61),
            power: Some(612.0),
            power_limit: Some(700.0),
            clock: Some(1755),
            throttle_reasons: vec!["power limit"],
        }],
        host: HostSample { memory_used: 9 * GIB, memory_total: 128 * GIB, cpu: 43.0, cores: 16 },
    }
}

pub fn runs() -> Vec<RunEntry> {
    let entry = |id: &str, state, step, loss: Option<f64>| RunEntry {
        id: id.into(),
        state,
        model: "HuggingFaceTB/SmolLM2-135M-Instruct".into(),
        method: "lora, rank 16".into(),
        data: "alpaca_en_demo.json".into(),
        step,
        steps: 113,
        loss,
        eval_loss: loss.map(|loss| loss + 0.1),
        losses: history(113, step.max(1)).losses(),
        started: "2026-11-22T10:00:00.000Z".into(),
    };
    vec![
        entry("261122-100000-otter", State::Running, 60, Some(1.2345)),
        entry("261122-091500-heron", State::Finished, 113, Some(1.1034)),
        entry("261121-220100-maple", State::Dead, 31, Some(1.5021)),
        entry(
            "261121-200000-flint",
            State::Failed { error: "not enough memory".into(), hint: "a smaller max_length".into() },
            0,
            None,
        ),
        entry("261121-190000-wren", State::Queued { behind: "261122-100000-otter".into() }, 0, None),
    ]
}

/// Answers to everything that the app asks, as if work were instant.
pub fn answer(app: &mut App) {
    for _ in 0..10 {
        let requests = app.take_requests();
        if requests.is_empty() {
            return;
        }
        for request in requests {
            match request {
                Request::ListModels => app.handle(Message::Models(models())),
                Request::ListFiles => app.handle(Message::Files(vec![
                    FileEntry { path: "demo".into(), bytes: 0, downloads: None },
                    FileEntry { path: "data/alpaca_en_demo.json".into(), bytes: 859_893, downloads: None },
                    FileEntry { path: "data/glaive_toolcall_en_demo.json".into(), bytes: 738_925, downloads: None },
                    FileEntry { path: "notes.jsonl".into(), bytes: 12_000, downloads: None },
                ])),
                Request::ListRuns => app.handle(Message::Runs(runs())),
                Request::Preview { generation, .. } => {
                    app.handle(Message::Preview { generation, result: Ok(Box::new(preview())) });
                }
                Request::Forecast { generation, .. } => {
                    app.handle(Message::Forecast { generation, result: Ok(Box::new(forecast())) });
                }
                Request::Start(_) => app.handle(Message::Started(Ok("261122-100000-otter".into()))),
                Request::Open(run) => {
                    let history = Box::new(history(113, 60));
                    app.handle(Message::History { run, history, spec: None, whole: true });
                    app.handle(Message::Machine(Box::new(machine())));
                }
                Request::Compare(first, second) => {
                    app.handle(Message::Compared(Box::new(Comparison {
                        names: [first, second],
                        histories: [history(113, 60), history(113, 113)],
                        differences: vec![("method.rank".into(), "16".into(), "64".into())],
                    })));
                }
                Request::Chat { .. } => {
                    for side in [Side::Base, Side::Tuned] {
                        app.handle(Message::ChatPiece { side, text: "Paris is the capital of France.".into() });
                        app.handle(Message::ChatEnd { side, error: None });
                    }
                }
                _ => {}
            }
        }
    }
}

/// An app that knows the machine: models, files and runs are listed.
pub fn stocked(mut app: App) -> App {
    app.handle(Message::Models(models()));
    app.handle(Message::Runs(runs()));
    app.handle(Message::Files(Vec::new()));
    app.take_requests();
    press(&mut app, "R");
    app.handle(Message::Files(vec![
        FileEntry { path: "data/alpaca_en_demo.json".into(), bytes: 859_893, downloads: None },
        FileEntry { path: "notes.jsonl".into(), bytes: 12_000, downloads: None },
    ]));
    answer(&mut app);
    app
}

/// Model and data chosen, on the Tune screen.
pub fn tuned(app: App) -> App {
    let mut app = stocked(app);
    press(&mut app, "down enter");
    answer(&mut app);
    press(&mut app, "enter");
    answer(&mut app);
    press(&mut app, "enter");
    answer(&mut app);
    app
}

/// A run in the middle of its training.
pub fn training(app: App) -> App {
    let mut app = tuned(app);
    press(&mut app, "s");
    answer(&mut app);
    press(&mut app, "R");
    app
}
