//! The CPU engine: the reference, and the engine of last resort.
