"""Requests that come and go while others run: python examples/engine.py [MODEL.gguf]"""

import sys

import pybmc

path = sys.argv[1] if len(sys.argv) > 1 else pybmc.demo_model()
with pybmc.Model(path) as model, pybmc.Engine(model, parallel=4) as engine:
    def request(prompt, **settings):
        return engine.add(pybmc.Request(model.tokenizer.encode(prompt), max_tokens=40,
                                        sampler=pybmc.Sampler(**settings)))

    first, second = request("Once upon a time"), request("There was a king", temperature=0.8, seed=3)
    texts = {first: "", second: ""}
    for step in range(1000):
        for sequence, token in engine.step():
            texts[sequence] += token.text
        if step == 1:
            engine.cancel(second)                      # its rows are free at once
            third = request("In the deep forest")
            texts[third] = ""
        if first.done and third.done:
            break
    for sequence, text in texts.items():
        print(f"{sequence.number}: {text!r}")
