//! The loop: drain everything that has happened, then draw once; nothing is drawn when nothing changed.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use crossterm::event::Event;
use ratatui::Terminal;
use ratatui::layout::Size;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::app::App;
use super::message::{Message, Request};
use super::terminal::{Screen, Takeover, clipboard_code};
use super::widgets::Look;

/// Frames that no key caused come at most this often: figures that change faster are read by nobody, and every
/// frame costs bytes over SSH.
const CALM: Duration = Duration::from_millis(500);

/// Runs the workbench in this terminal until it is left. `perform` hands work to the background.
///
/// # Errors
/// When the terminal is gone.
pub fn run(
    app: &mut App,
    messages: &Receiver<Message>,
    sender: Sender<Message>,
    mut perform: impl FnMut(Request),
) -> io::Result<()> {
    watch_signals(sender.clone())?;
    let takeover = Takeover::new()?;
    let (width, height) = crossterm::terminal::size()?;
    let mut terminal = Terminal::new(Screen::new(io::stdout(), Size::new(width, height)))?;
    listen(sender)?;
    let mut drawn: Option<Instant> = None;
    let mut waiting = false;
    loop {
        for request in app.take_requests() {
            match request {
                Request::Copy(text) => terminal.backend_mut().send(&clipboard_code(&text))?,
                Request::Redraw => {
                    terminal.backend_mut().invalidate();
                    terminal.clear()?;
                    waiting = true;
                }
                Request::Suspend => {
                    takeover.suspend()?;
                    terminal.backend_mut().invalidate();
                    terminal.clear()?;
                    waiting = true;
                }
                other => perform(other),
            }
        }
        if app.quit {
            return Ok(());
        }
        let now = Instant::now();
        let due = drawn.map_or(now, |drawn| drawn + CALM);
        if waiting && now >= due || app.take_urgent() {
            draw(app, &mut terminal)?;
            (drawn, waiting) = (Some(Instant::now()), false);
        }
        let received = if waiting {
            messages.recv_timeout(due.saturating_duration_since(Instant::now()))
        } else {
            messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match received {
            Ok(message) => take(app, &mut terminal, message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        while let Ok(message) = messages.try_recv() {
            take(app, &mut terminal, message);
        }
        waiting |= app.take_dirty();
    }
}

fn take<W: Write>(app: &mut App, terminal: &mut Terminal<Screen<W>>, message: Message) {
    if let Message::Resize(width, height) = message {
        terminal.backend_mut().resize(Size::new(width, height));
    }
    app.handle(message);
}

/// Draws a frame into the terminal.
///
/// # Errors
/// When the terminal is gone.
pub fn draw<W: Write>(app: &App, terminal: &mut Terminal<Screen<W>>) -> io::Result<()> {
    let look = Look::new(&app.theme, &app.glyphs);
    terminal.draw(|frame| {
        app.draw(frame.buffer_mut(), &look);
        if let Some(cursor) = look.cursor.get() {
            frame.set_cursor_position(cursor);
        }
    })?;
    Ok(())
}

/// Reads keys in a thread of their own: nothing that the interface does can hold them up.
fn listen(sender: Sender<Message>) -> io::Result<()> {
    std::thread::Builder::new().name("keys".into()).spawn(move || {
        loop {
            let message = match crossterm::event::read() {
                Ok(Event::Key(key)) => Message::Key(key),
                Ok(Event::Paste(text)) => Message::Paste(text),
                Ok(Event::Resize(width, height)) => Message::Resize(width, height),
                Ok(_) => continue,
                // The terminal is gone.
                Err(_) => Message::Terminate,
            };
            let gone = matches!(message, Message::Terminate);
            if sender.send(message).is_err() || gone {
                return;
            }
        }
    })?;
    Ok(())
}

/// Signals that end a program, and can be caught: they leave in an orderly way, and the terminal is given back.
const ENDINGS: [i32; 4] = [SIGTERM, SIGHUP, SIGINT, SIGQUIT];

/// Hands endings on. They are caught from the moment this returns: before the terminal is taken over.
fn watch_signals(sender: Sender<Message>) -> io::Result<()> {
    let mut signals = Signals::new(ENDINGS)?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            if sender.send(Message::Terminate).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
