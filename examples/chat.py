"""A conversation of two turns: python examples/chat.py [MODEL.gguf]"""

import sys

import pybmc
from pybmc.chat import Conversation

path = sys.argv[1] if len(sys.argv) > 1 else pybmc.demo_model()
with pybmc.Model(path) as model, model.session() as session:
    talk = Conversation(model, session, max_tokens=60, temperature=0.8, seed=1)
    for message in ("Tell me of a fox.", "Go on."):
        print(f"> {message}")
        for token in talk.ask(message):                # only what is new in a turn is evaluated
            print(token.text, end="", flush=True)
        print()
