//! Model families: configuration, weight names, builders.
