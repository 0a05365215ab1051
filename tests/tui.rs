//! The workbench without a terminal: real keys in, the drawn buffer out.

use tune::tui::app::{App, Settings};
use tune::tui::glyphs::{ASCII, UNICODE};
use tune::tui::keymap::Keymap;
use tune::tui::theme::{Colors, Theme};

#[path = "tui/bench.rs"]
mod bench;
#[path = "tui/keys.rs"]
mod keys;
#[path = "tui/screens.rs"]
mod screens;
#[path = "tui/terminal.rs"]
mod terminal;

/// A workbench that has asked for nothing yet.
fn app() -> App {
    settings("default", Colors::Sixteen, true)
}

fn settings(theme: &str, colors: Colors, unicode: bool) -> App {
    let mut app = App::new(Settings {
        theme: Theme::built_in(theme, colors).unwrap(),
        colors,
        glyphs: if unicode { UNICODE } else { ASCII },
        keymap: Keymap::default(),
    });
    app.take_requests();
    app
}
