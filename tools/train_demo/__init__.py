"""Makes the bundled pair: a small teller of tales and its draft, from plain text to two GGUF files."""
