//! Prefill and decode programs driven to text: sampling and chat.
