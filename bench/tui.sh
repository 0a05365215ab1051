#!/usr/bin/env bash
# Figures of the workbench, in a real terminal (a PTY of 80x24): launch to first frame, key to frame while the CPU engine
# trains on all cores, bytes per second on the Train screen, bytes when nothing changes, memory, and how long a run of
# 1,000,000 updates takes to open. Prints one line a figure, with its bound; exits 1 when one is missed.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet
exec python3 bench/tui.py target/release/tune "$@"
