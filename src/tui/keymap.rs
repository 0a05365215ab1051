//! Keys: one table drives what a key does, the bottom bar, the help and the command palette.
//!
//! The user's `keymap.toml` overrides keys by layer and command name: `[train]` `pause = ["p", "f5"]`.

use std::collections::BTreeMap;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// Where a key counts. The top layer is asked first, then those under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layer {
    Global,
    List,
    Model,
    Data,
    Tune,
    Train,
    Result,
    Runs,
    Text,
    Chat,
    Help,
    Palette,
    Confirm,
    RunFile,
    Compare,
}

impl Layer {
    /// The heading in the help, and the table's name in the user's file.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Global => "everywhere",
            Layer::List => "list",
            Layer::Model => "model",
            Layer::Data => "data",
            Layer::Tune => "tune",
            Layer::Train => "train",
            Layer::Result => "result",
            Layer::Runs => "runs",
            Layer::Text => "text",
            Layer::Chat => "chat",
            Layer::Help => "help",
            Layer::Palette => "palette",
            Layer::Confirm => "confirm",
            Layer::RunFile => "run-file",
            Layer::Compare => "compare",
        }
    }

    /// Whether unbound characters are text here: nothing under this layer is asked.
    pub fn takes_text(self) -> bool {
        self == Layer::Text
    }

    /// Whether the layers under it are covered.
    pub fn is_modal(self) -> bool {
        self.takes_text() || matches!(self, Layer::Help | Layer::Confirm | Layer::RunFile | Layer::Compare)
    }
}

/// A row of the table.
pub struct Binding {
    pub layer: Layer,
    /// The command's name in the user's file.
    pub name: &'static str,
    pub action: Action,
    pub keys: &'static [&'static str],
    /// One or two words for the bottom bar.
    pub short: &'static str,
    /// What it does, for help and palette.
    pub help: &'static str,
    /// Place in the bottom bar, lowest first; 0: not shown there.
    pub bar: u8,
}

macro_rules! keymap {
    ($($layer:ident { $($action:ident $name:literal [$($key:literal)*] $bar:literal $short:literal $help:literal)* })*) => {
        /// What a key can do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Action { $($($action),*),* }

        /// Every command with its default keys.
        pub static BINDINGS: &[Binding] = &[$($(Binding {
            layer: Layer::$layer, name: $name, action: Action::$action, keys: &[$($key),*],
            short: $short, help: $help, bar: $bar,
        }),*),*];
    };
}

keymap! {
    Global {
        Quit          "quit"           ["q" "ctrl-c"]        90 "quit"     "Leave; runs go on without this window"
        Help          "help"           ["?" "f1"]            91 "help"     "All keys of this screen"
        Palette       "palette"        [":" "ctrl-p"]        92 "commands" "Find a command by name"
        NextStep      "next-step"      ["tab" "ctrl-right"]   0 "next"     "To the next step"
        PreviousStep  "previous-step"  ["shift-tab" "ctrl-left"] 0 "back"  "To the step before"
        GoModel       "go-model"       ["1"]                  0 "model"    "Model: choose what to fine-tune"
        GoData        "go-data"        ["2"]                  0 "data"     "Data: choose and look at the rows"
        GoTune        "go-tune"        ["3"]                  0 "tune"     "Tune: hyperparameters, memory, warnings"
        GoTrain       "go-train"       ["4"]                  0 "train"    "Train: the run, live"
        GoResult      "go-result"      ["5"]                  0 "result"   "Result: summary, chat, export"
        GoRuns        "go-runs"        ["6"]                  0 "runs"     "Runs: all of them"
        RunFile       "run-file"       ["v"]                  0 "run file" "The run file: view, save, load, copy"
        NextTheme     "next-theme"     ["ctrl-t"]             0 "theme"    "The next theme"
        Redraw        "redraw"         ["ctrl-l"]             0 "redraw"   "Draw the whole screen again"
        Suspend       "suspend"        ["ctrl-z"]             0 "suspend"  "Back to the shell; fg returns"
    }
    List {
        Up            "up"             ["up" "k"]             0 "up"       "One up"
        Down          "down"           ["down" "j"]           0 "down"     "One down"
        PageUp        "page-up"        ["pageup" "ctrl-b"]    0 "page up"  "Ten up"
        PageDown      "page-down"      ["pagedown" "ctrl-f"]  0 "page down" "Ten down"
        First         "first"          ["home" "g"]           0 "first"    "To the first"
        Last          "last"           ["end" "G"]            0 "last"     "To the last"
        Filter        "filter"         ["/"]                 20 "filter"   "Narrow the list down"
    }
    Model {
        ChooseModel   "choose"         ["enter"]              1 "choose"   "Fine-tune this model; on to the data"
        OpenFolder    "open-folder"    ["o"]                  2 "folder"   "Type the path of a model folder"
        SearchHub     "search-hub"     ["h"]                  3 "hub"      "Search the Hugging Face hub"
        RefreshModels "refresh"        ["R"]                  0 "refresh"  "Look for models again"
    }
    Data {
        ChooseData    "choose"         ["enter"]              1 "choose"   "Use this file; press again to go on to Tune"
        OpenData      "open"           ["o"]                  2 "path"     "Type a path or a hub dataset"
        SearchData    "search-hub"     ["h"]                  4 "hub"      "Search the datasets of the Hugging Face hub"
        NextRow       "next-row"       ["n" "right" "l"]      3 "row"      "The next row"
        PreviousRow   "previous-row"   ["p" "left"]           0 "row back" "The row before"
        MapColumns    "map-columns"    ["m"]                  5 "columns"  "Give a column a role: prompt=question"
        NextFormat    "next-format"    ["F"]                  0 "format"   "Read the file as the next format"
        ScrollDown    "scroll-down"    ["J" "shift-down"]     0 "scroll"   "Scroll the row down"
        ScrollUp      "scroll-up"      ["K" "shift-up"]       0 "scroll"   "Scroll the row up"
    }
    Tune {
        EditField     "edit"           ["enter" "i"]          1 "edit"     "Change the value"
        Increase      "increase"       ["right" "l" "+"]      2 "more"     "The next sensible value up"
        Decrease      "decrease"       ["left" "h" "-"]       3 "less"     "The next sensible value down"
        ResetField    "reset"          ["d" "backspace"]      0 "default"  "Back to the default"
        ApplyFix      "fix"            ["f"]                  5 "fix"      "Apply the fix of the marked warning"
        NextWarning   "next-warning"   ["w"]                  6 "warning"  "Mark the next warning"
        NextPreset    "preset"         ["p"]                  7 "preset"   "The next preset"
        UndoEdit      "undo"           ["u"]                  0 "undo"     "Take the last change back"
        StartRun      "start"          ["s" "ctrl-s"]         4 "start"    "Start the run"
    }
    Train {
        PauseRun      "pause"          ["p" "space"]          1 "pause"    "Pause or continue at a safe step"
        SaveNow       "save"           ["s"]                  2 "save"     "Write a checkpoint now"
        EvaluateNow   "evaluate"       ["e"]                  3 "eval"     "Evaluate now"
        SetRate       "set-rate"       ["r"]                  4 "rate"     "Change the learning rate"
        StopRun       "stop"           ["x"]                  5 "stop"     "Save and stop"
        ApplyLiveFix  "fix"            ["f"]                  6 "fix"      "Apply the fix of the latest warning"
        ToggleLog     "log-scale"      ["L"]                  7 "log"      "Logarithmic or linear loss"
        ToggleWindow  "window"         ["w"]                  8 "window"   "The whole run, or the latest steps"
        NextPanel     "panel"          ["t"]                  9 "panel"    "Events, samples, warnings"
        NextCurve     "curve"          ["c"]                  0 "curve"    "Loss, learning rate, grad norm, speed"
        PanelUp       "up"             ["up" "k" "pageup"]    0 "up"       "Scroll the panel up"
        PanelDown     "down"           ["down" "j" "pagedown"] 0 "down"    "Scroll the panel down"
        SeeResult     "result"         ["enter"]              0 "result"   "On to the result"
    }
    Result {
        ChatWith      "chat"           ["c" "enter"]          1 "chat"     "Chat with base and tuned, side by side"
        Export        "export"         ["e"]                  2 "export"   "Copy the adapter or model to a folder"
        TrainAgain    "again"          ["a"]                  3 "again"    "Take its run file back to Tune"
    }
    Runs {
        AttachRun     "attach"         ["enter"]              1 "open"     "Open the run"
        MarkCompare   "compare"        ["c"]                  2 "compare"  "Mark, then compare with a second run"
        ResumeRun     "resume"         ["r"]                  3 "resume"   "Start again from the last checkpoint"
        RemoveRun     "remove"         ["D" "delete"]         5 "remove"   "Remove the run's folder"
        LoadRunFile   "load"           ["a"]                  0 "reuse"    "Take its run file to Tune"
        RefreshRuns   "refresh"        ["R"]                  0 "refresh"  "Look for runs again"
    }
    Text {
        Accept        "accept"         ["enter"]              1 "accept"   "Take the text"
        Cancel        "cancel"         ["esc" "ctrl-c"]       2 "cancel"   "Leave it as it was"
        CursorLeft    "left"           ["left" "ctrl-b"]      0 "left"     "Cursor left"
        CursorRight   "right"          ["right" "ctrl-f"]     0 "right"    "Cursor right"
        CursorStart   "start"          ["home" "ctrl-a"]      0 "start"    "Cursor to the start"
        CursorEnd     "end"            ["end" "ctrl-e"]       0 "end"      "Cursor to the end"
        DeleteBack    "delete-back"    ["backspace" "ctrl-h"] 0 "delete"   "Delete the character before"
        DeleteForward "delete"         ["delete" "ctrl-d"]    0 "delete"   "Delete the character after"
        DeleteWord    "delete-word"    ["ctrl-w"]             0 "word"     "Delete the word before"
        DeleteLine    "delete-line"    ["ctrl-u"]             3 "clear"    "Delete everything"
    }
    Chat {
        SendChat      "send"           ["enter"]              1 "send"     "Send"
        LeaveChat     "leave"          ["esc" "ctrl-c"]       2 "leave"    "Back to the result"
        ChatUp        "up"             ["up" "pageup"]        3 "scroll"   "Scroll up"
        ChatDown      "down"           ["down" "pagedown"]    0 "scroll"   "Scroll down"
    }
    Help {
        CloseHelp     "close"          ["esc" "q" "?" "enter" "ctrl-c"] 1 "close" "Close"
        HelpUp        "up"             ["up" "k" "pageup"]    2 "up"       "Scroll up"
        HelpDown      "down"           ["down" "j" "pagedown" "space"] 3 "down" "Scroll down"
    }
    Palette {
        RunCommand    "run"            ["enter"]              1 "run"      "Run the marked command"
        ClosePalette  "close"          ["esc" "ctrl-c"]       2 "close"    "Close"
        PaletteUp     "up"             ["up" "ctrl-p"]        3 "up"       "One up"
        PaletteDown   "down"           ["down" "ctrl-n"]      4 "down"     "One down"
    }
    Confirm {
        Yes           "yes"            ["y" "enter"]          1 "yes"      "Yes, do it"
        No            "no"             ["n" "esc" "q" "ctrl-c"] 2 "no"     "No"
    }
    RunFile {
        CloseFile     "close"          ["esc" "q" "v" "ctrl-c"] 1 "close"  "Close"
        SaveFile      "save"           ["s"]                  2 "save"     "Save to a file"
        LoadFile      "load"           ["o"]                  3 "load"     "Load a file"
        CopyFile      "copy"           ["y"]                  4 "copy"     "Copy the text"
        CopyCommand   "copy-command"   ["c"]                  5 "command"  "Copy as a command line"
        FileUp        "up"             ["up" "k" "pageup"]    0 "up"       "Scroll up"
        FileDown      "down"           ["down" "j" "pagedown" "space"] 0 "down" "Scroll down"
    }
    Compare {
        CloseCompare  "close"          ["esc" "q" "c" "ctrl-c"] 1 "close"  "Close"
        CompareLog    "log-scale"      ["L"]                  2 "log"      "Logarithmic or linear loss"
        CompareScroll "scroll"         ["down" "j" "space"]   3 "scroll"   "Scroll the differences"
    }
}

/// A key as the table writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    code: KeyCode,
    modifiers: KeyModifiers,
}

impl Key {
    /// A key event, with what terminals report in several ways brought to one form.
    pub fn from_event(event: &KeyEvent) -> Self {
        let mut key = Self {
            code: event.code,
            modifiers: event.modifiers & (KeyModifiers::CONTROL | KeyModifiers::ALT | KeyModifiers::SHIFT),
        };
        match key.code {
            // An upper-case letter already says shift.
            KeyCode::Char(character) => {
                key.modifiers -= KeyModifiers::SHIFT;
                if key.modifiers.contains(KeyModifiers::CONTROL) {
                    key.code = KeyCode::Char(character.to_ascii_lowercase());
                }
            }
            KeyCode::BackTab => key = Self { code: KeyCode::Tab, modifiers: key.modifiers | KeyModifiers::SHIFT },
            _ => {}
        }
        key
    }

    /// Reads `ctrl-p`, `shift-tab`, `pageup`, `f5`, `G`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut modifiers = KeyModifiers::NONE;
        let mut rest = text;
        for (prefix, modifier) in
            [("ctrl-", KeyModifiers::CONTROL), ("alt-", KeyModifiers::ALT), ("shift-", KeyModifiers::SHIFT)]
        {
            if let Some(after) = rest.strip_prefix(prefix).filter(|after| !after.is_empty()) {
                modifiers |= modifier;
                rest = after;
            }
        }
        let mut characters = rest.chars();
        let code = match (characters.next(), characters.next()) {
            (Some(character), None) => KeyCode::Char(character),
            _ => NAMED_KEYS
                .iter()
                .find(|(name, _)| *name == rest)
                .map(|(_, code)| *code)
                .or_else(|| Some(KeyCode::F(rest.strip_prefix('f')?.parse().ok()?)))?,
        };
        Some(Self { code, modifiers })
    }

    /// The character that the key types, if it types one.
    pub fn character(self) -> Option<char> {
        match self.code {
            KeyCode::Char(character) if self.modifiers.is_empty() => Some(character),
            _ => None,
        }
    }

    /// The key for display.
    pub fn name(self) -> String {
        let mut name = String::new();
        for (prefix, modifier) in
            [("ctrl-", KeyModifiers::CONTROL), ("alt-", KeyModifiers::ALT), ("shift-", KeyModifiers::SHIFT)]
        {
            if self.modifiers.contains(modifier) {
                name.push_str(prefix);
            }
        }
        match self.code {
            KeyCode::Char(' ') => name.push_str("space"),
            KeyCode::Char(character) => name.push(character),
            KeyCode::F(number) => name.push_str(&format!("f{number}")),
            code => name.push_str(NAMED_KEYS.iter().find(|(_, named)| *named == code).map_or("?", |(name, _)| name)),
        }
        name
    }
}

const NAMED_KEYS: &[(&str, KeyCode)] = &[
    ("enter", KeyCode::Enter),
    ("esc", KeyCode::Esc),
    ("tab", KeyCode::Tab),
    ("space", KeyCode::Char(' ')),
    ("backspace", KeyCode::Backspace),
    ("delete", KeyCode::Delete),
    ("up", KeyCode::Up),
    ("down", KeyCode::Down),
    ("left", KeyCode::Left),
    ("right", KeyCode::Right),
    ("home", KeyCode::Home),
    ("end", KeyCode::End),
    ("pageup", KeyCode::PageUp),
    ("pagedown", KeyCode::PageDown),
];

/// What is wrong with the user's keymap file.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum KeymapError {
    #[error("keymap: {0}")]
    Syntax(String),
    #[error("keymap: no layer \"{0}\"; there are {layers}", layers = layer_names())]
    Layer(String),
    #[error("keymap: layer \"{layer}\" has no command \"{name}\"; `tune` lists them under ?")]
    Command { layer: String, name: String },
    #[error("keymap: \"{key}\" for {layer}.{name} is no key; write ctrl-p, shift-tab, pageup, f5 or a character")]
    Key { layer: String, name: String, key: String },
    #[error("keymap: \"{key}\" does both {first} and {second} in layer \"{layer}\"; change one of them")]
    Conflict { layer: String, key: String, first: String, second: String },
}

fn layer_names() -> String {
    let mut names: Vec<_> = BINDINGS.iter().map(|binding| binding.layer.name()).collect();
    names.dedup();
    names.join(", ")
}

/// The table with the user's keys.
#[derive(Clone, Debug)]
pub struct Keymap {
    /// Keys of each row of [`BINDINGS`].
    keys: Vec<Vec<Key>>,
}

impl Default for Keymap {
    fn default() -> Self {
        let keys =
            BINDINGS.iter().map(|binding| binding.keys.iter().filter_map(|key| Key::parse(key)).collect()).collect();
        Self { keys }
    }
}

impl Keymap {
    /// The default keys, with those of the user's file in their place.
    ///
    /// # Errors
    /// Names the layer, command or key that is wrong.
    pub fn with_overrides(text: &str) -> Result<Self, KeymapError> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Keys {
            One(String),
            Many(Vec<String>),
        }
        let tables: BTreeMap<String, BTreeMap<String, Keys>> =
            toml::from_str(text).map_err(|error| KeymapError::Syntax(error.to_string()))?;
        let mut keymap = Self::default();
        for (layer, commands) in tables {
            if !BINDINGS.iter().any(|binding| binding.layer.name() == layer) {
                return Err(KeymapError::Layer(layer));
            }
            for (name, keys) in commands {
                let Some(row) =
                    BINDINGS.iter().position(|binding| binding.layer.name() == layer && binding.name == name)
                else {
                    return Err(KeymapError::Command { layer, name });
                };
                let keys = match keys {
                    Keys::One(key) => vec![key],
                    Keys::Many(keys) => keys,
                };
                keymap.keys[row] = keys
                    .iter()
                    .map(|key| {
                        let wrong = || KeymapError::Key { layer: layer.clone(), name: name.clone(), key: key.clone() };
                        Key::parse(key).ok_or_else(wrong)
                    })
                    .collect::<Result<_, _>>()?;
            }
        }
        keymap.check()?;
        Ok(keymap)
    }

    /// One key must not do two things in one layer.
    fn check(&self) -> Result<(), KeymapError> {
        for (row, binding) in BINDINGS.iter().enumerate() {
            for (other_row, other) in BINDINGS.iter().enumerate().skip(row + 1) {
                if other.layer != binding.layer {
                    continue;
                }
                if let Some(key) = self.keys[row].iter().find(|key| self.keys[other_row].contains(key)) {
                    return Err(KeymapError::Conflict {
                        layer: binding.layer.name().into(),
                        key: key.name(),
                        first: binding.name.into(),
                        second: other.name.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// What a key does. `layers` is top first; a modal layer hides those under it.
    pub fn action(&self, layers: &[Layer], key: Key) -> Option<Action> {
        for layer in layers {
            let found =
                BINDINGS.iter().zip(&self.keys).find(|(binding, keys)| binding.layer == *layer && keys.contains(&key));
            if let Some((binding, _)) = found {
                return Some(binding.action);
            }
            if layer.is_modal() {
                return None;
            }
        }
        None
    }

    /// The rows that count in `layers`, each with the keys that reach it; top layer first.
    fn reached(&self, layers: &[Layer]) -> Vec<(&'static Binding, Vec<Key>)> {
        let mut rows = Vec::new();
        for layer in layers {
            for (binding, keys) in BINDINGS.iter().zip(&self.keys).filter(|(binding, _)| binding.layer == *layer) {
                let reaching = |key: &Key| self.action(layers, *key) == Some(binding.action);
                let keys: Vec<Key> = keys.iter().copied().filter(reaching).collect();
                if !keys.is_empty() {
                    rows.push((binding, keys));
                }
            }
            if layer.is_modal() {
                break;
            }
        }
        rows
    }

    /// The rows that count in `layers`, with their keys' names; top layer first.
    pub fn rows(&self, layers: &[Layer]) -> Vec<(&'static Binding, String)> {
        let names = |keys: Vec<Key>| keys.iter().map(|key| key.name()).collect::<Vec<_>>().join(" ");
        self.reached(layers).into_iter().map(|(binding, keys)| (binding, names(keys))).collect()
    }

    /// First key and word of each command that the bottom bar shows, in its order.
    pub fn bar(&self, layers: &[Layer]) -> Vec<(String, &'static str)> {
        let mut shown = self.reached(layers);
        shown.retain(|(binding, _)| binding.bar > 0);
        shown.sort_by_key(|(binding, _)| binding.bar);
        shown.into_iter().map(|(binding, keys)| (keys[0].name(), binding.short)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_key_parses_and_does_one_thing_in_its_layer() {
        for binding in BINDINGS {
            for key in binding.keys {
                let parsed = Key::parse(key).unwrap_or_else(|| panic!("{key}"));
                assert_eq!(parsed.name(), *key);
            }
        }
        assert_eq!(Keymap::default().check(), Ok(()));
    }

    #[test]
    fn names_are_unique_in_a_layer() {
        for (row, binding) in BINDINGS.iter().enumerate() {
            for other in &BINDINGS[row + 1..] {
                assert!(binding.layer != other.layer || binding.name != other.name, "{}", binding.name);
            }
        }
    }

    #[test]
    fn the_users_keys_take_the_place_of_the_defaults() {
        let keymap = Keymap::with_overrides("[train]\npause = [\"f5\"]\n").unwrap();
        let layers = [Layer::Train, Layer::Global];
        assert_eq!(keymap.action(&layers, Key::parse("f5").unwrap()), Some(Action::PauseRun));
        assert_eq!(keymap.action(&layers, Key::parse("p").unwrap()), None);
        assert_eq!(keymap.action(&layers, Key::parse("q").unwrap()), Some(Action::Quit));
    }

    #[test]
    fn a_wrong_keymap_file_says_what_is_wrong() {
        let error = |text| Keymap::with_overrides(text).unwrap_err().to_string();
        assert!(error("[trian]\nx = \"a\"").contains("no layer \"trian\""));
        assert!(error("[train]\nfly = \"a\"").contains("no command \"fly\""));
        assert!(error("[train]\npause = \"ctrl-\"").contains("is no key"));
        assert!(error("[train]\npause = \"s\"").contains("does both pause and save"));
    }

    #[test]
    fn text_layers_hide_what_is_under_them() {
        let keymap = Keymap::default();
        let layers = [Layer::Text, Layer::Tune, Layer::Global];
        assert_eq!(keymap.action(&layers, Key::parse("q").unwrap()), None);
        assert_eq!(keymap.action(&layers, Key::parse("esc").unwrap()), Some(Action::Cancel));
    }

    #[test]
    fn shift_is_part_of_the_character() {
        let event = KeyEvent::new(KeyCode::Char('G'), KeyModifiers::SHIFT);
        assert_eq!(Key::from_event(&event), Key::parse("G").unwrap());
        let event = KeyEvent::new(KeyCode::BackTab, KeyModifiers::SHIFT);
        assert_eq!(Key::from_event(&event), Key::parse("shift-tab").unwrap());
    }
}
