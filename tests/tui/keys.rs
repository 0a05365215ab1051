//! Keys do what the table says, whatever their order.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use proptest::prelude::*;
use tune::tui::app::Step;
use tune::tui::keymap::BINDINGS;
use tune::tui::message::{Message, Request};

use crate::app;
use crate::bench::{answer, press, stocked, text, training, tuned};

#[test]
fn the_five_steps_by_keyboard_alone() {
    let mut app = stocked(app());
    press(&mut app, "down enter");
    assert_eq!((app.step, app.draft.spec.model.id.as_str()), (Step::Data, "HuggingFaceTB/SmolLM2-135M-Instruct"));
    answer(&mut app);
    press(&mut app, "enter");
    answer(&mut app);
    assert!(matches!(app.draft.preview, Some(Ok(_))));
    press(&mut app, "enter");
    assert_eq!(app.step, Step::Tune);
    press(&mut app, "/ learning_rate enter enter ctrl-u 1e-3 enter");
    assert_eq!(app.draft.spec.train.learning_rate, Some(1e-3));
    let first = app.draft.warnings.iter().position(|warning| warning.rule == "learning-rate-high").unwrap();
    (0..first).for_each(|_| press(&mut app, "w"));
    press(&mut app, "f");
    assert_eq!(app.draft.spec.train.learning_rate, Some(2e-4));
    answer(&mut app);
    press(&mut app, "s");
    assert!(app.take_requests().iter().any(|request| matches!(request, Request::Start(_))));
    app.handle(Message::Started(Ok("otter".into())));
    assert_eq!((app.step, app.train.run.as_deref()), (Step::Train, Some("otter")));
    answer(&mut app);
    press(&mut app, "p");
    press(&mut app, "r ctrl-u 5e-5 enter");
    press(&mut app, "x y");
    let sent: Vec<_> = app
        .take_requests()
        .into_iter()
        .filter_map(|request| match request {
            Request::Send { command, .. } => Some(command),
            _ => None,
        })
        .collect();
    use tune::run::Command::{Pause, SetLearningRate, Stop};
    assert_eq!(sent, [Pause, SetLearningRate(5e-5), Stop]);
    press(&mut app, "enter");
    assert_eq!(app.step, Step::Result);
    press(&mut app, "c Hello enter");
    assert!(app.take_requests().contains(&Request::Chat { run: "otter".into(), prompt: "Hello".into() }));
    press(&mut app, "esc e enter");
    assert!(app.take_requests().iter().any(|request| matches!(request, Request::Export { .. })));
}

#[test]
fn memory_and_time_follow_the_typing() {
    let mut app = tuned(app());
    app.take_requests();
    press(&mut app, "down enter ctrl-u 6");
    let asked = |requests: Vec<Request>| {
        requests.into_iter().find_map(|request| match request {
            Request::Forecast { spec, .. } => Some(spec.method.rank),
            _ => None,
        })
    };
    assert_eq!(asked(app.take_requests()), Some(6));
    press(&mut app, "4");
    assert_eq!(asked(app.take_requests()), Some(64));
    assert_eq!(app.draft.spec.method.rank, 16, "not before enter");
    press(&mut app, "esc");
    assert_eq!(asked(app.take_requests()), Some(16));
}

#[test]
fn a_wrong_value_stays_and_says_what_is_allowed() {
    let mut app = tuned(app());
    press(&mut app, "down enter ctrl-u 0 enter");
    assert!(app.editing.is_some());
    assert_eq!(app.draft.spec.method.rank, 16);
    assert!(text(&app, 80, 24).contains("a whole number from 1 to 4096"));
}

#[test]
fn the_filter_finds_a_key_by_its_own_name_first_and_by_the_names_of_others() {
    let mut app = tuned(app());
    press(&mut app, "/ epochs enter");
    assert_eq!(app.tune.fields()[0].path(), "train.epochs");
    press(&mut app, "/ ctrl-u lora_r enter");
    assert!(app.tune.fields().iter().any(|key| key.path() == "method.rank"));
}

#[test]
fn older_answers_do_not_replace_newer_ones() {
    let mut app = tuned(app());
    press(&mut app, "down right");
    app.handle(Message::Forecast { generation: 1, result: Err("old".into()) });
    assert!(matches!(app.draft.forecast, Some(Ok(_))));
}

#[test]
fn removing_asks_first() {
    let mut app = stocked(app());
    press(&mut app, "6 down");
    app.take_requests();
    press(&mut app, "D n");
    assert_eq!(app.take_requests(), []);
    press(&mut app, "D y");
    assert_eq!(app.take_requests(), [Request::Remove("261122-091500-heron".into())]);
}

#[test]
fn a_column_is_given_a_role_by_hand() {
    let mut app = tuned(app());
    press(&mut app, "2 m ctrl-u fly=context enter");
    assert!(text(&app, 120, 40).contains("no role \"fly\""));
    press(&mut app, "ctrl-u system=context enter");
    let tune::spec::TrainData::Sources(sources) = &app.draft.spec.data.train else { panic!("a source") };
    assert_eq!(sources[0].columns.get("system").map(String::as_str), Some("context"));
    assert!(matches!(app.take_requests().last(), Some(Request::Preview { .. })), "the data is read again");
    press(&mut app, "m ctrl-u system= enter");
    let tune::spec::TrainData::Sources(sources) = &app.draft.spec.data.train else { panic!("a source") };
    assert!(sources[0].columns.is_empty());
}

#[test]
fn the_run_file_is_one_key_away_and_can_be_saved_loaded_and_copied() {
    let mut app = tuned(app());
    press(&mut app, "v");
    assert!(text(&app, 120, 40).contains("learning_rate"));
    app.take_requests();
    press(&mut app, "c y s ctrl-u mine.toml enter o theirs.toml enter");
    let requests = app.take_requests();
    let [Request::Copy(command), Request::Copy(file), Request::Save { path, text }, Request::Load(from)] =
        &requests[..]
    else {
        panic!("{requests:?}")
    };
    assert!(command.starts_with("tune train --model HuggingFaceTB/SmolLM2-135M-Instruct --data "), "{command}");
    assert!(file == text && text.contains("[train]"), "{text}");
    assert_eq!((path.to_str(), from.to_str()), (Some("mine.toml"), Some("theirs.toml")));
}

#[test]
fn presets_change_several_values_and_undo_takes_them_back() {
    let mut app = tuned(app());
    let before = app.draft.spec.clone();
    press(&mut app, "p");
    assert!(text(&app, 120, 40).contains("preset "));
    press(&mut app, "p");
    assert_ne!(app.draft.spec, before);
    press(&mut app, "u u");
    assert_eq!(app.draft.spec, before);
}

#[test]
fn two_runs_are_marked_and_compared() {
    let mut app = stocked(app());
    press(&mut app, "6 c down c");
    let pair = Request::Compare("261122-100000-otter".into(), "261122-091500-heron".into());
    assert!(app.take_requests().contains(&pair));
}

#[test]
fn a_live_warning_is_mended_by_one_key() {
    let mut app = training(app());
    app.take_requests();
    press(&mut app, "f");
    let sent = app.take_requests();
    let evaluate = tune::run::Command::Evaluate;
    assert!(matches!(&sent[..], [Request::Send { command, .. }] if *command == evaluate), "{sent:?}");
    press(&mut app, "e");
    assert!(matches!(&app.take_requests()[..], [Request::Send { command, .. }] if *command == evaluate));
}

#[test]
fn datasets_of_the_hub_come_after_the_files_and_are_fetched_when_chosen() {
    use tune::hub::fetch::Repository;
    use tune::tui::message::FileEntry;
    let mut app = stocked(app());
    press(&mut app, "2 h alpaca enter");
    assert!(app.take_requests().contains(&Request::SearchHub(Repository::Dataset, "alpaca".into())));
    let found = FileEntry { path: "yahma/alpaca-cleaned".into(), bytes: 0, downloads: Some(4321) };
    app.handle(Message::HubDatasets(Ok(vec![found])));
    assert!(text(&app, 120, 40).contains("hub 4321"));
    press(&mut app, "enter");
    assert!(app.take_requests().contains(&Request::Download(Repository::Dataset, "yahma/alpaca-cleaned".into())));
    assert_eq!(app.draft.data_name(), "yahma/alpaca-cleaned");
    let id = "yahma/alpaca-cleaned".to_owned();
    app.handle(Message::Progress { repository: Repository::Dataset, id, done: 512, total: 1024 });
    assert!(text(&app, 120, 40).contains("(50%)"));
}

#[test]
fn pasted_text_is_one_line() {
    let mut app = tuned(app());
    press(&mut app, "2 o ctrl-u");
    app.handle(Message::Paste("/data/rows.json\n".into()));
    press(&mut app, "enter");
    assert_eq!(app.draft.data_name(), "/data/rows.json");
}

fn any_key() -> impl Strategy<Value = KeyEvent> {
    let bound: Vec<KeyEvent> = BINDINGS.iter().flat_map(|binding| binding.keys).map(|key| event(key)).collect();
    prop_oneof![
        6 => proptest::sample::select(bound),
        1 => any::<char>().prop_map(|character| KeyEvent::new(KeyCode::Char(character), KeyModifiers::NONE)),
        1 => (1u8..=12).prop_map(|number| KeyEvent::new(KeyCode::F(number), KeyModifiers::NONE)),
    ]
}

/// The event of a key as the table writes it.
fn event(name: &str) -> KeyEvent {
    let mut modifiers = KeyModifiers::NONE;
    let mut rest = name;
    for (prefix, modifier) in [("ctrl-", KeyModifiers::CONTROL), ("shift-", KeyModifiers::SHIFT)] {
        if let Some(after) = rest.strip_prefix(prefix) {
            (rest, modifiers) = (after, modifiers | modifier);
        }
    }
    let code = match rest {
        "enter" => KeyCode::Enter,
        "esc" => KeyCode::Esc,
        "tab" => KeyCode::Tab,
        "space" => KeyCode::Char(' '),
        "backspace" => KeyCode::Backspace,
        "delete" => KeyCode::Delete,
        "up" => KeyCode::Up,
        "down" => KeyCode::Down,
        "left" => KeyCode::Left,
        "right" => KeyCode::Right,
        "home" => KeyCode::Home,
        "end" => KeyCode::End,
        "pageup" => KeyCode::PageUp,
        "pagedown" => KeyCode::PageDown,
        "f1" => KeyCode::F(1),
        other => KeyCode::Char(other.chars().next().unwrap()),
    };
    KeyEvent::new(code, modifiers)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// No keys panic, at any size, and every state has keys that its help or its bottom bar lists: among them a way
    /// out.
    #[test]
    fn no_keys_panic_or_lead_to_a_state_without_help(
        start in 0usize..3,
        keys in proptest::collection::vec((any_key(), any::<bool>()), 1..60),
        width in 1u16..140, height in 1u16..50,
    ) {
        let mut app = match start {
            0 => app(),
            1 => tuned(app()),
            _ => training(app()),
        };
        for (at, (key, answered)) in keys.into_iter().enumerate() {
            app.handle(Message::Key(key));
            app.quit = false;
            if answered {
                answer(&mut app);
            }
            let rows = app.keymap.rows(&app.layers());
            prop_assert!(!rows.is_empty());
            let ways_out = ["quit", "close", "cancel", "no", "leave"];
            prop_assert!(rows.iter().any(|(binding, _)| ways_out.contains(&binding.name)));
            if at % 5 == 0 {
                text(&app, width, height);
            }
        }
        text(&app, 80, 24);
        text(&app, 40, 12);
    }
}
