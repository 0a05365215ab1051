//! Every screen at four sizes, as text.

use tune::tui::app::App;
use tune::tui::theme::Colors;

use crate::bench::{answer, press, stocked, text, training, tuned};
use crate::{app, settings};

const SIZES: [(u16, u16); 4] = [(80, 24), (120, 40), (200, 60), (40, 12)];

fn snapshots(name: &str, app: &App) {
    for (width, height) in SIZES {
        insta::assert_snapshot!(format!("{name}_{width}x{height}"), text(app, width, height));
    }
}

#[test]
fn model() {
    snapshots("model", &stocked(app()));
}

#[test]
fn data() {
    let mut app = tuned(app());
    press(&mut app, "2");
    snapshots("data", &app);
}

#[test]
fn tune() {
    snapshots("tune", &tuned(app()));
}

#[test]
fn train() {
    snapshots("train", &training(app()));
}

#[test]
fn result() {
    let mut app = training(app());
    press(&mut app, "5");
    snapshots("result", &app);
}

#[test]
fn runs() {
    let mut app = stocked(app());
    press(&mut app, "6");
    answer(&mut app);
    snapshots("runs", &app);
}

#[test]
fn help() {
    let mut app = tuned(app());
    press(&mut app, "?");
    snapshots("help", &app);
}

#[test]
fn palette() {
    let mut app = tuned(app());
    press(&mut app, ": theme");
    snapshots("palette", &app);
}

#[test]
fn run_file() {
    let mut app = tuned(app());
    press(&mut app, "v");
    snapshots("run_file", &app);
}

#[test]
fn compare() {
    let mut app = stocked(app());
    press(&mut app, "6");
    answer(&mut app);
    press(&mut app, "c down c");
    answer(&mut app);
    snapshots("compare", &app);
}

#[test]
fn chat() {
    let mut app = training(app());
    press(&mut app, "5 c Capital? enter");
    answer(&mut app);
    snapshots("chat", &app);
}

#[test]
fn editing_a_field() {
    let mut app = tuned(app());
    press(&mut app, "down enter ctrl-u 12x");
    snapshots("editing", &app);
}

#[test]
fn empty() {
    let mut app = app();
    for (key, name) in [("1", "model"), ("2", "data"), ("3", "tune"), ("4", "train"), ("5", "result"), ("6", "runs")] {
        press(&mut app, key);
        insta::assert_snapshot!(format!("empty_{name}"), text(&app, 80, 24));
    }
}

#[test]
fn plain_characters_only_where_the_terminal_has_no_more() {
    let mut app = training(settings("default", Colors::None, false));
    for key in ["1", "2", "3", "4", "5", "6", "?"] {
        press(&mut app, key);
        for (width, height) in SIZES {
            let text = text(&app, width, height);
            let strange: Vec<char> = text.chars().filter(|c| !c.is_ascii()).collect();
            assert!(strange.is_empty(), "screen {key} at {width}x{height}: {strange:?}");
        }
    }
    press(&mut app, "esc 4");
    insta::assert_snapshot!("train_ascii", text(&app, 80, 24));
    press(&mut app, "3");
    insta::assert_snapshot!("tune_ascii", text(&app, 80, 24));
}

#[test]
fn a_screen_too_small_says_what_it_needs() {
    for (width, height) in [(39, 12), (40, 11), (10, 3), (1, 1), (200, 5)] {
        let text = text(&app(), width, height);
        assert!(width < 24 || text.contains("tune needs 40 x 12"), "{text}");
    }
}
