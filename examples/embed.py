"""Which text is closest to a question: python examples/embed.py [MODEL.gguf],
best with one made for embeddings."""

import sys

import pybmc

path = sys.argv[1] if len(sys.argv) > 1 else pybmc.demo_model()
texts = ["The mill stands by the river.", "A mouse lives under its floor.", "The king went to war."]
with pybmc.Model(path) as model:
    pooling = None if model.config.pooling.kind != "none" else "mean"
    vectors = model.embed(texts, pooling=pooling)
    question = model.embed("Where does the mouse live?", pooling=pooling)[0]
    for closeness, text in sorted(zip(vectors @ question, texts), reverse=True):
        print(f"{closeness:.3f}  {text}")
