"""What engines write, for tests that compare it."""

from pybmc import Engine
from pybmc.spec import Speculation


def events(engine, most=20_000):
    """The events of steps until no request is left, or of `most` steps."""
    for _ in range(most):
        if not engine.waiting and not engine.running:
            return
        yield from engine.step()
    raise AssertionError("requests do not end")


def write(model, request, speculation=None):
    """A request's tokens in an engine of its own, without who guessed them, and its Stats.
    Without a Speculation decoding is plain."""
    with Engine(model, speculation=speculation or Speculation(model, spec="off"), parallel=1) as engine:
        sequence = engine.add(request)
        found = [token._replace(from_draft=False, by=None) for _, token in events(engine)]
        assert sequence.done and not sequence.error
        return found, sequence.stats
