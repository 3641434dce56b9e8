"""`pybmc serve`: one model for many clients, over the wires of OpenAI, Ollama and llama-server."""
