//! The escape codes, read by a terminal emulator.

use ratatui::Terminal;
use ratatui::layout::Size;
use tune::tui::app::App;
use tune::tui::message::Message;
use tune::tui::terminal::Screen;
use tune::tui::theme::Colors;
use tune::tui::widgets::Look;

use crate::bench::{buffer, events, press, text, training, tuned};
use crate::{app, settings};

struct Emulated {
    terminal: Terminal<Screen<Vec<u8>>>,
    parser: vt100::Parser,
}

impl Emulated {
    fn new(width: u16, height: u16) -> Self {
        let parser = vt100::Parser::new(height.try_into().unwrap(), width.try_into().unwrap(), 0);
        Self { terminal: Terminal::new(Screen::new(Vec::new(), Size::new(width, height))).unwrap(), parser }
    }

    /// Draws a frame; the bytes that it took.
    fn draw(&mut self, app: &App) -> usize {
        let look = Look::new(&app.theme, &app.glyphs);
        self.terminal
            .draw(|frame| {
                app.draw(frame.buffer_mut(), &look);
                if let Some(cursor) = look.cursor.get() {
                    frame.set_cursor_position(cursor);
                }
            })
            .unwrap();
        let bytes = std::mem::take(self.terminal.backend_mut().writer_mut());
        self.parser.process(&bytes);
        bytes.len()
    }

    fn contents(&self) -> String {
        let (_, columns) = self.parser.screen().size();
        self.parser.screen().rows(0, columns.into()).map(|row| row.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
    }
}

#[test]
fn a_terminal_shows_what_was_drawn_frame_after_frame() {
    let mut app = tuned(app());
    let mut emulated = Emulated::new(100, 30);
    for keys in ["", "down", "right right", "w", "?", "down", "esc", "v", "esc", "2", "n", "1", ": th", "esc", "6"] {
        press(&mut app, keys);
        emulated.draw(&app);
        assert_eq!(emulated.contents(), text(&app, 100, 30), "after {keys:?}");
    }
}

#[test]
fn nothing_is_written_when_nothing_changed() {
    let app = training(app());
    let mut emulated = Emulated::new(80, 24);
    assert!(emulated.draw(&app) > 0);
    assert_eq!(emulated.draw(&app), 0);
}

#[test]
fn without_colour_no_colour_code_is_written() {
    let mut app = training(settings("dark", Colors::None, true));
    let mut emulated = Emulated::new(80, 24);
    for key in ["1", "2", "3", "4", "5", "6"] {
        press(&mut app, key);
        emulated.draw(&app);
        let screen = emulated.parser.screen();
        let mut emphasis = 0;
        for y in 0..24 {
            for x in 0..80 {
                let cell = screen.cell(y, x).unwrap();
                assert_eq!((cell.fgcolor(), cell.bgcolor()), (vt100::Color::Default, vt100::Color::Default));
                emphasis += usize::from(cell.bold() || cell.inverse() || cell.underline());
            }
        }
        assert!(emphasis > 0, "screen {key} says everything by colour");
    }
}

#[test]
fn trained_tokens_stand_out_in_every_theme() {
    for (theme, colors) in
        [("default", Colors::Sixteen), ("dark", Colors::True), ("light", Colors::Indexed), ("default", Colors::None)]
    {
        let mut app = tuned(settings(theme, colors, true));
        press(&mut app, "2");
        let buffer = buffer(&app, 100, 30);
        let style_of = |word: &str| {
            let text = text(&app, 100, 30);
            let (y, line) = text.lines().enumerate().find(|(_, line)| line.contains(word)).unwrap();
            let x = line[..line.find(word).unwrap()].chars().count();
            buffer[(x as u16, y as u16)].style()
        };
        assert_ne!(style_of("Paris"), style_of("Name the capital"), "{theme}");
        assert_ne!(style_of("<|im_start|>user"), style_of("Name the capital"), "{theme}");
    }
}

#[test]
fn a_live_run_writes_little() {
    // A minute of a fast run: ten updates a second, drawn twice a second as the loop does.
    let mut app = training(app());
    let run = app.train.run.clone().unwrap();
    let all = events(6000, 1200);
    let (start, live) = all.split_at(602);
    app.handle(Message::Events { run: run.clone(), records: start.to_vec() });
    let mut emulated = Emulated::new(80, 24);
    emulated.draw(&app);
    let mut bytes = 0;
    let seconds = 60;
    for frame in live.chunks(5).take(seconds * 2) {
        app.handle(Message::Events { run: run.clone(), records: frame.to_vec() });
        bytes += emulated.draw(&app);
        assert_eq!(emulated.contents(), text(&app, 80, 24));
    }
    let rate = bytes / seconds;
    println!("{rate} bytes a second on the Train screen at 80x24");
    assert!(rate <= 1500, "{rate} bytes a second");
}
