"""Many prompts from a file into a file: lines in, lines out,
with one engine or with one on each node of a cluster."""
