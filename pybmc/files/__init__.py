"""Files: GGUF, and the types of its tensors."""
