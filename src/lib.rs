//! `tune`: a terminal workbench for fine-tuning language models.
//!
//! See `ARCHITECTURE.md` for the map.

pub mod advise;
pub mod backend;
pub mod cli;
pub mod data;
pub mod demo;
pub mod export;
pub mod generate;
pub mod hub;
pub mod model;
pub mod monitor;
pub mod program;
pub mod run;
pub mod spec;
pub mod train;
pub mod tui;
