#!/usr/bin/env bash
# The figures of a card as the workbench shows them (NVML) beside those of nvidia-smi, while a run trains on it:
#   bash bench/tui_card.sh
# Ours is .gpu/tune, made by `bash tests/gpu.sh build`. Takes about 20 seconds; needs python3 and nvidia-smi. Where there is
# no card, it shows the Machine panel all the same and says that there is nothing to compare with.
set -u
cd "$(dirname "$0")/.."
exec python3 bench/tui_card.py "${TUNE:-.gpu/tune}"
