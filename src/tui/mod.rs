//! The workbench: the terminal interface.
//!
//! It holds no training state: it reads a run's events and writes commands to its worker.

pub mod glyphs;
pub mod keymap;
pub mod terminal;
pub mod theme;
pub mod widgets;
