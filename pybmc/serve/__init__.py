"""`pybmc serve`: one model for many clients, over the wires of OpenAI, Anthropic, Ollama and llama-server."""
