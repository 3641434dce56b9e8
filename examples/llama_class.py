"""Code for llama-cpp-python's class, with another import: python examples/llama_class.py [MODEL.gguf]"""

import sys

import pybmc
from pybmc import Llama  # before: from llama_cpp import Llama

path = sys.argv[1] if len(sys.argv) > 1 else pybmc.demo_model()
llm = Llama(model_path=str(path), n_gpu_layers=0, seed=1, verbose=False)

answer = llm("Once upon a time", max_tokens=40, temperature=0.8, stop=["\n"], echo=True)
print(answer["choices"][0]["text"])

messages = [{"role": "user", "content": "Tell me of a fox."}]
for chunk in llm.create_chat_completion(messages, max_tokens=40, stream=True):
    print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
print()
