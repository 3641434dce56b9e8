"""Continue a text: python examples/generate.py [MODEL.gguf]"""

import sys

import pybmc

path = sys.argv[1] if len(sys.argv) > 1 else pybmc.demo_model()
with pybmc.Model(path) as model:
    answer = pybmc.generate(model, "Once upon a time", max_tokens=60, temperature=0.8, seed=1)
    for token in answer:
        print(token.text, end="", flush=True)
    print(f"\n{answer.stats.predicted_tok_s:.0f} tokens/s", file=sys.stderr)
