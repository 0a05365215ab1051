//! Warnings about hyperparameters and overfitting: each a small pure rule with its source.
