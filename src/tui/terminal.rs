//! The terminal: taking it over, giving it back, and writing as few bytes to it as a frame needs.
//!
//! ratatui's own backend writes cursor and reset codes for every frame, changed or not, and does not synchronize
//! frames. [`Screen`] writes nothing when nothing changed, one write a frame, between the codes of a synchronized
//! update (ignored where unknown), and keeps the pen from frame to frame.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};

use ratatui::backend::{Backend, ClearType, WindowSize};
use ratatui::buffer::Cell;
use ratatui::layout::{Position, Size};
use ratatui::style::{Color, Modifier};

/// Takes over: alternate screen, no cursor, bracketed paste.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?2004h\x1b[?25l\x1b[2J\x1b[H";
/// Gives back what [`ENTER`] took, in the opposite order, and ends a synchronized update that was cut short.
const LEAVE: &[u8] = b"\x1b[?2026l\x1b[m\x1b[?25h\x1b[?2004l\x1b[?1049l";

/// Exit code after a panic, Rust's own.
const PANICKED: i32 = 101;

/// How the pen is set: what the next character will look like.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pen {
    foreground: Color,
    background: Color,
    modifier: Modifier,
}

const PLAIN: Pen = Pen { foreground: Color::Reset, background: Color::Reset, modifier: Modifier::empty() };

/// A ratatui backend over any writer.
pub struct Screen<W: Write> {
    writer: W,
    /// The frame being put together.
    frame: Vec<u8>,
    pen: Pen,
    cursor: Option<Position>,
    size: Size,
    /// Bytes written so far.
    pub written: u64,
}

impl<W: Write> Screen<W> {
    pub fn new(writer: W, size: Size) -> Self {
        Self { writer, frame: Vec::new(), pen: PLAIN, cursor: None, size, written: 0 }
    }

    /// The terminal's new size; ratatui asks for it at the next frame.
    pub fn resize(&mut self, size: Size) {
        self.size = size;
    }

    /// Writes something that is no cell, such as a clipboard code, at once.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.writer.write_all(bytes)?;
        self.writer.flush()
    }

    /// Forgets the state of the terminal, after something else wrote to it.
    pub fn invalidate(&mut self) {
        self.pen = PLAIN;
        self.cursor = None;
        self.frame.extend_from_slice(b"\x1b[m\x1b[?25l");
    }

    /// The writer, for tests that read what was written.
    pub fn writer_mut(&mut self) -> &mut W {
        &mut self.writer
    }

    fn set_pen(&mut self, pen: Pen) {
        if pen == self.pen {
            return;
        }
        self.pen = pen;
        let start = self.frame.len();
        self.frame.extend_from_slice(b"\x1b[");
        // A reset first: there is no code that takes one attribute away on every terminal. It also keeps bold and
        // reverse alive where colours are off.
        let mut codes: Vec<String> = Vec::new();
        for (modifier, code) in [
            (Modifier::BOLD, "1"),
            (Modifier::DIM, "2"),
            (Modifier::ITALIC, "3"),
            (Modifier::UNDERLINED, "4"),
            (Modifier::REVERSED, "7"),
            (Modifier::CROSSED_OUT, "9"),
        ] {
            if pen.modifier.contains(modifier) {
                codes.push(code.into());
            }
        }
        codes.extend(color_code(pen.foreground, false));
        codes.extend(color_code(pen.background, true));
        if codes.is_empty() {
            self.frame.truncate(start);
            self.frame.extend_from_slice(b"\x1b[m");
        } else {
            self.frame.extend_from_slice(b";");
            self.frame.extend_from_slice(codes.join(";").as_bytes());
            self.frame.push(b'm');
        }
    }

    fn move_to(&mut self, from: Option<Position>, to: Position) {
        let code = match from {
            Some(from) if from == to => return,
            Some(from) if from.y == to.y => format!("\x1b[{}G", to.x + 1),
            _ => format!("\x1b[{};{}H", to.y + 1, to.x + 1),
        };
        self.frame.extend_from_slice(code.as_bytes());
    }
}

/// The SGR parameters of a colour; none for the terminal's own.
fn color_code(color: Color, background: bool) -> Option<String> {
    let base = if background { 10 } else { 0 };
    let code = match color {
        Color::Reset => return None,
        Color::Black => base + 30,
        Color::Red => base + 31,
        Color::Green => base + 32,
        Color::Yellow => base + 33,
        Color::Blue => base + 34,
        Color::Magenta => base + 35,
        Color::Cyan => base + 36,
        Color::Gray => base + 37,
        Color::DarkGray => base + 90,
        Color::LightRed => base + 91,
        Color::LightGreen => base + 92,
        Color::LightYellow => base + 93,
        Color::LightBlue => base + 94,
        Color::LightMagenta => base + 95,
        Color::LightCyan => base + 96,
        Color::White => base + 97,
        Color::Indexed(index) => return Some(format!("{};5;{index}", base + 38)),
        Color::Rgb(r, g, b) => return Some(format!("{};2;{r};{g};{b}", base + 38)),
    };
    Some(code.to_string())
}

/// Whether the character is known to take exactly one column, so that the next needs no cursor move.
fn one_column(symbol: &str) -> bool {
    let mut characters = symbol.chars();
    let (Some(character), None) = (characters.next(), characters.next()) else { return false };
    matches!(character as u32, 0x20..=0x7e | 0xa1..=0x2ff | 0x370..=0x482 | 0x2500..=0x259f | 0x2800..=0x28ff)
}

impl<W: Write> Backend for Screen<W> {
    type Error = io::Error;

    fn draw<'a, I>(&mut self, content: I) -> io::Result<()>
    where
        I: Iterator<Item = (u16, u16, &'a Cell)>,
    {
        let mut at = None;
        for (x, y, cell) in content {
            self.move_to(at, Position { x, y });
            self.set_pen(Pen { foreground: cell.fg, background: cell.bg, modifier: cell.modifier });
            self.frame.extend_from_slice(cell.symbol().as_bytes());
            let next = x + 1;
            // At the right edge terminals differ in where the cursor is.
            at = (one_column(cell.symbol()) && next < self.size.width).then_some(Position { x: next, y });
        }
        Ok(())
    }

    fn hide_cursor(&mut self) -> io::Result<()> {
        if self.cursor.take().is_some() {
            self.frame.extend_from_slice(b"\x1b[?25l");
        }
        Ok(())
    }

    fn show_cursor(&mut self) -> io::Result<()> {
        if self.cursor.is_none() {
            self.frame.extend_from_slice(b"\x1b[?25h");
            self.cursor = Some(Position { x: u16::MAX, y: u16::MAX });
        }
        Ok(())
    }

    fn get_cursor_position(&mut self) -> io::Result<Position> {
        Ok(self.cursor.unwrap_or_default())
    }

    fn set_cursor_position<P: Into<Position>>(&mut self, position: P) -> io::Result<()> {
        let position = position.into();
        if self.cursor != Some(position) || !self.frame.is_empty() {
            self.move_to(None, position);
            self.cursor = self.cursor.map(|_| position);
        }
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.set_pen(PLAIN);
        self.frame.extend_from_slice(b"\x1b[2J");
        Ok(())
    }

    fn clear_region(&mut self, clear_type: ClearType) -> io::Result<()> {
        self.set_pen(PLAIN);
        let code: &[u8] = match clear_type {
            ClearType::All => b"\x1b[2J",
            ClearType::AfterCursor => b"\x1b[J",
            ClearType::BeforeCursor => b"\x1b[1J",
            ClearType::CurrentLine => b"\x1b[2K",
            ClearType::UntilNewLine => b"\x1b[K",
        };
        self.frame.extend_from_slice(code);
        Ok(())
    }

    fn size(&self) -> io::Result<Size> {
        Ok(self.size)
    }

    fn window_size(&mut self) -> io::Result<WindowSize> {
        Ok(WindowSize { columns_rows: self.size, pixels: Size::default() })
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(self.frame.len() + 16);
        bytes.extend_from_slice(b"\x1b[?2026h");
        bytes.append(&mut self.frame);
        bytes.extend_from_slice(b"\x1b[?2026l");
        self.send(&bytes)
    }
}

/// Raw mode and the alternate screen, for as long as it lives. Dropped, or on a panic, the terminal is as it was.
pub struct Takeover;

impl Takeover {
    /// Takes the terminal over and makes a panic, in any thread, give it back, print its message and end the process.
    ///
    /// # Errors
    /// When standard input is no terminal.
    pub fn new() -> io::Result<Self> {
        crossterm::terminal::enable_raw_mode()?;
        let taken = Self;
        silence_standard_error();
        write_out(ENTER)?;
        static HOOK: std::sync::Once = std::sync::Once::new();
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
                // In whatever thread it was: a screen that is half alive helps nobody, and runs go on by themselves.
                signal_hook::low_level::exit(PANICKED);
            }));
        });
        Ok(taken)
    }

    /// Gives the terminal back, stops this process until the shell continues it, and takes over again.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn suspend(&self) -> io::Result<()> {
        restore();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TSTP)?;
        crossterm::terminal::enable_raw_mode()?;
        silence_standard_error();
        write_out(ENTER)
    }
}

impl Drop for Takeover {
    fn drop(&mut self) {
        restore();
    }
}

/// Standard error as it was before the terminal was taken over.
static STANDARD_ERROR: std::sync::OnceLock<OwnedFd> = std::sync::OnceLock::new();

/// Graphics drivers print to standard error when they are asked for adapters, in the middle of a frame. While the
/// terminal is taken over, that goes nowhere; where standard error is a file it stays as it is.
fn silence_standard_error() {
    let stderr = io::stderr();
    let Ok(nothing) = std::fs::OpenOptions::new().write(true).open("/dev/null") else { return };
    if !stderr.is_terminal() {
        return;
    }
    if let Ok(copy) = stderr.as_fd().try_clone_to_owned() {
        let _ = STANDARD_ERROR.set(copy);
        let _ = rustix::stdio::dup2_stderr(nothing);
    }
}

fn restore() {
    if let Some(file) = STANDARD_ERROR.get() {
        let _ = rustix::stdio::dup2_stderr(file);
    }
    let _ = write_out(LEAVE);
    let _ = crossterm::terminal::disable_raw_mode();
}

fn write_out(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// The code that puts text on the clipboard of the terminal's own machine, also over SSH (OSC 52).
pub fn clipboard_code(text: &str) -> Vec<u8> {
    let mut code = Vec::new();
    // Writing into a Vec does not fail.
    let _ = crossterm::queue!(code, crossterm::clipboard::CopyToClipboard::to_clipboard_from(text));
    code
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::style::{Style, Stylize};
    use ratatui::text::Line;

    use super::*;

    fn terminal() -> Terminal<Screen<Vec<u8>>> {
        Terminal::new(Screen::new(Vec::new(), Size::new(20, 3))).unwrap()
    }

    #[test]
    fn a_frame_like_the_last_writes_nothing() {
        let mut terminal = terminal();
        for _ in 0..2 {
            terminal.draw(|frame| frame.render_widget(Line::from("hello".bold()), frame.area())).unwrap();
        }
        let once = terminal.backend().written;
        terminal.draw(|frame| frame.render_widget(Line::from("hello".bold()), frame.area())).unwrap();
        assert_eq!(terminal.backend().written, once);
    }

    #[test]
    fn what_is_written_is_what_a_terminal_shows() {
        let mut terminal = terminal();
        terminal
            .draw(|frame| {
                let line = Line::from(vec!["a".red(), "b".into(), "世界".bold(), "c".on_blue()]);
                frame.render_widget(line.style(Style::new()), frame.area());
            })
            .unwrap();
        let mut parser = vt100::Parser::new(3.try_into().unwrap(), 20.try_into().unwrap(), 0);
        parser.process(terminal.backend_mut().writer_mut());
        let screen = parser.screen();
        assert_eq!(screen.contents(), "ab世界c");
        assert_eq!(screen.cell(0, 0).unwrap().fgcolor(), vt100::Color::Idx(1));
        assert_eq!(screen.cell(0, 1).unwrap().fgcolor(), vt100::Color::Default);
        assert!(screen.cell(0, 2).unwrap().bold());
        assert_eq!(screen.cell(0, 6).unwrap().bgcolor(), vt100::Color::Idx(4));
        assert!(!screen.cell(0, 6).unwrap().bold());
    }

    #[test]
    fn the_clipboard_code_is_osc_52() {
        assert_eq!(clipboard_code("hi"), b"\x1b]52;c;aGk=\x1b\\");
    }
}
