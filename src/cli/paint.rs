//! Colour in plain output: only on a terminal, and never the only sign of anything.

use std::io::IsTerminal;

/// The stream that text goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Out,
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Error,
    Warning,
    Hint,
    Strong,
    Quiet,
}

/// Whether the stream is a terminal that wants colour (<https://no-color.org>).
pub fn is_coloured(stream: Stream) -> bool {
    let terminal = match stream {
        Stream::Out => std::io::stdout().is_terminal(),
        Stream::Error => std::io::stderr().is_terminal(),
    };
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    terminal && !refused && std::env::var_os("TERM").is_none_or(|name| name != "dumb")
}

/// The text in a tone, or as it is where the stream takes no colour.
pub fn paint(stream: Stream, tone: Tone, text: &str) -> String {
    if !is_coloured(stream) {
        return text.to_owned();
    }
    let code = match tone {
        Tone::Error => "1;31",
        Tone::Warning => "1;33",
        Tone::Hint => "36",
        Tone::Strong => "1",
        Tone::Quiet => "2",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}
