//! Makes the pictures of the README: drives the real program in a pseudo-terminal, reads its screen with a terminal
//! emulator, and writes what it shows as SVG. `cargo build --release && cargo run --release --example pictures`.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use portable_pty::{CommandBuilder, PtySize, native_pty_system};

const COLUMNS: u16 = 110;
const ROWS: u16 = 32;

/// The program on a terminal.
struct Session {
    parser: vt100::Parser,
    output: Receiver<Vec<u8>>,
    input: Box<dyn Write + Send>,
    child: Box<dyn portable_pty::Child + Send + Sync>,
}

impl Session {
    fn start(program: &Path, folder: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let size = PtySize { rows: ROWS, cols: COLUMNS, pixel_width: 0, pixel_height: 0 };
        let pair = native_pty_system().openpty(size)?;
        let mut command = CommandBuilder::new(program);
        command.args(arguments);
        command.cwd(folder);
        for (name, value) in
            [("TERM", "xterm-256color"), ("COLORTERM", "truecolor"), ("LANG", "C.UTF-8"), ("TUNE_THEME", "dark")]
        {
            command.env(name, value);
        }
        command.env("TUNE_HOME", folder.join("home"));
        command.env("HF_HOME", folder.join("hf"));
        command.env("TUNE_CONFIG", folder);
        command.env_remove("NO_COLOR");
        let child = pair.slave.spawn_command(command)?;
        let mut reader = pair.master.try_clone_reader()?;
        let input = pair.master.take_writer()?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            // The master lives as long as its output is read.
            let _master = pair.master;
            let mut buffer = vec![0; 65536];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let parser = vt100::Parser::new(ROWS.try_into()?, COLUMNS.try_into()?, 0);
        Ok(Self { parser, output, input, child })
    }

    /// Reads until the screen holds `text` and then is still for a moment.
    fn until(&mut self, text: &str, seconds: u64) -> anyhow::Result<()> {
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            let got = self.output.recv_timeout(Duration::from_millis(700));
            if let Ok(bytes) = &got {
                self.parser.process(bytes);
            }
            let there = self.parser.screen().contents().contains(text);
            if there && got.is_err() {
                return Ok(());
            }
            if Instant::now() > end {
                anyhow::ensure!(there, "no \"{text}\" on the screen:\n{}", self.parser.screen().contents());
                return Ok(());
            }
        }
    }

    fn press(&mut self, keys: &str) -> anyhow::Result<()> {
        self.input.write_all(keys.as_bytes())?;
        self.input.flush()?;
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() -> anyhow::Result<()> {
    let program = Path::new("target/release/tune").canonicalize()?;
    let docs = Path::new("docs").canonicalize()?;
    let folder = tempfile::tempdir()?;
    let save = |session: &Session, name: &str| -> anyhow::Result<()> {
        std::fs::write(docs.join(format!("{name}.svg")), svg(session.parser.screen())?)?;
        println!("docs/{name}.svg");
        Ok(())
    };
    let mut session = Session::start(&program, folder.path(), &[])?;
    session.until("fits", 60)?;
    save(&session, "model")?;
    session.press("\r")?;
    session.until("Files", 10)?;
    session.press("\r")?;
    session.until("trained", 30)?;
    save(&session, "data")?;
    session.press("\r")?;
    session.until("(estimates)", 60)?;
    // A rate that is too high, so that the picture shows a warning and its fix.
    session.press("/learning_rate\r\r\x151e-3\r")?;
    session.until("is high for lora", 20)?;
    session.press("/\x15\r")?;
    session.until("epochs", 10)?;
    save(&session, "tune")?;
    session.press("uu")?;
    session.press("s")?;
    session.until("smooth", 60)?;
    session.until("checkpoint", 90)?;
    save(&session, "train")?;
    session.until("finished", 300)?;
    session.press("\r")?;
    session.until("held-out loss", 10)?;
    save(&session, "result")?;
    session.press("cWhat is tune?\r")?;
    session.until("you:", 60)?;
    std::thread::sleep(Duration::from_secs(8));
    session.until("you:", 10)?;
    save(&session, "chat")?;
    Ok(())
}

/// What the screen shows, as a picture.
fn svg(screen: &vt100::Screen) -> anyhow::Result<String> {
    const WIDTH: f64 = 8.43;
    const HEIGHT: f64 = 17.0;
    const BACKGROUND: &str = "#12151c";
    const TEXT: &str = "#c8d0e0";
    let (width, height) = (f64::from(COLUMNS) * WIDTH + 24.0, f64::from(ROWS) * HEIGHT + 24.0);
    let mut svg = String::new();
    writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"'DejaVu Sans Mono', \
         Menlo, Consolas, monospace\" font-size=\"14\">\n<rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{BACKGROUND}\"/>"
    )?;
    for row in 0..ROWS {
        let mut column = 0;
        while column < COLUMNS {
            let Some(cell) = screen.cell(row, column) else { break };
            let style = look(cell);
            let start = column;
            let mut text = String::new();
            // Neighbours that look the same are one piece of text.
            while column < COLUMNS
                && let Some(cell) = screen.cell(row, column)
                && look(cell) == style
            {
                if !cell.is_wide_continuation() {
                    text.push_str(if cell.has_contents() { cell.contents() } else { " " });
                }
                column += 1;
            }
            let (x, y) = (12.0 + f64::from(start) * WIDTH, 12.0 + f64::from(row) * HEIGHT);
            let (mut fill, mut behind) = (color(style.0), color(style.1));
            if style.4 {
                (fill, behind) = (Some(behind.unwrap_or(BACKGROUND.into())), Some(fill.unwrap_or(TEXT.into())));
            }
            let length = f64::from(column - start) * WIDTH;
            if let Some(behind) = behind {
                writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{HEIGHT}\" fill=\"{behind}\"/>"
                )?;
            }
            if text.trim().is_empty() {
                continue;
            }
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            let bold = if style.2 { " font-weight=\"bold\"" } else { "" };
            let line = if style.3 { " text-decoration=\"underline\"" } else { "" };
            writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" fill=\"{}\" textLength=\"{length:.1}\" lengthAdjust=\"spacingAndGlyphs\" \
                 xml:space=\"preserve\"{bold}{line}>{escaped}</text>",
                y + 13.0,
                fill.unwrap_or(TEXT.into()),
            )?;
        }
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// Foreground, background, bold, underlined, reversed.
fn look(cell: &vt100::Cell) -> (vt100::Color, vt100::Color, bool, bool, bool) {
    (cell.fgcolor(), cell.bgcolor(), cell.bold(), cell.underline(), cell.inverse())
}

fn color(color: vt100::Color) -> Option<String> {
    const NAMED: [&str; 16] = [
        "#1b1f2a", "#f07f7f", "#9ad08b", "#f0c36d", "#6c9fe8", "#d59bf0", "#7fd1c7", "#c8d0e0", "#6b7489", "#ff9a9a",
        "#b4e6a5", "#ffd98a", "#8db7f5", "#e6b8ff", "#9ce8df", "#ffffff",
    ];
    match color {
        vt100::Color::Default => None,
        vt100::Color::Idx(index) => Some(NAMED[index as usize % 16].to_owned()),
        vt100::Color::Rgb(r, g, b) => Some(format!("#{r:02x}{g:02x}{b:02x}")),
    }
}
