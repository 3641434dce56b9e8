"""Conversations: messages as a model's template writes them, and what stands around that."""
