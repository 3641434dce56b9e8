"""A draft model guesses ahead; the text is the same:
python examples/speculation.py [MODEL.gguf DRAFT.gguf]"""

import sys

import pybmc

path, small = sys.argv[1:3] if len(sys.argv) > 2 else (pybmc.demo_model(), pybmc.demo_model(draft=True))
with pybmc.Model(path) as model, pybmc.Model(small) as draft:
    for name, settings in {"plain": {"spec": "off"}, "with a draft": {"draft": draft}}.items():
        answer = pybmc.generate(model, "Once upon a time", max_tokens=100, **settings)
        text = "".join(token.text for token in answer)
        stats = answer.stats
        print(f"{name}: {stats.predicted_tok_s:.0f} tokens/s, {stats.draft_n_accepted} of {stats.draft_n} "
              "guesses accepted")
        print(f"  ...{text[-60:]!r}")
