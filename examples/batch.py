"""Many prompts together: python examples/batch.py [MODEL.gguf]"""

import sys

import pybmc

path = sys.argv[1] if len(sys.argv) > 1 else pybmc.demo_model()
prompts = ["Once upon a time", "There was a king", "In the deep forest", "The old clockmaker"]
with pybmc.Model(path) as model:
    texts = [""] * len(prompts)
    for number, token in pybmc.generate_batch(model, prompts, max_tokens=30):
        texts[number] += token.text                    # tokens of all prompts come in turn
    for prompt, text in zip(prompts, texts):
        print(f"{prompt}|{text}")
