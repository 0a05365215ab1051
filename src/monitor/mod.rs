//! GPU and host samples.
