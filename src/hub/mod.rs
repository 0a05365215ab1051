//! Models and datasets: local folders, the Hugging Face cache, the hub.
