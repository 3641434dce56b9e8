"""Models of the Hugging Face hub: their names, the cache on this machine, and bringing them here.

Only pull() and look() open a connection; names.py and store.py read the cache's folders themselves.
"""

from .._lazy import lazy

__getattr__, __dir__ = lazy(__name__, dict.fromkeys(("find", "models", "remove"), "store")
                            | dict.fromkeys(("HubError", "look", "pull"), "transfer"))
