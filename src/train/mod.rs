//! The training loop, schedules, checkpoints, methods.
