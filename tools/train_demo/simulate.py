"""Tales with causes and ends, simulated: somebody wants something, something stands in the way,
and what was done before decides how it ends.

Old books teach a small model their sentences, but not that what is lost is looked for and what is promised is
kept: their tales are too long and too different for that. These are short, and each thing in them follows
from one before it. The idea of a made text that a small model can follow is TinyStories' (arXiv 2305.07759);
of a program that tells tales, TALE-SPIN's (Meehan, IJCAI 1977). Plots and words: plots.toml.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tomllib

BOOK = tomllib.loads(Path(__file__).with_name("plots.toml").read_text())
PLOTS, PARTS = BOOK["plots"], BOOK["parts"]
NAMES = {"he": BOOK["he_names"].split(), "she": BOOK["she_names"].split()}
INNERMOST = re.compile(r"\[([^\[\]]*)\]")
# not behind "What?" or "Away!", where "said he" may follow
BEGINNING = re.compile(r"(^|[.!?] |\.\" )([a-z])")
LOOKED, NAMED = 0.7, 0.2        # shares of nouns that have a look, and of heroes that have a name


def words_of(entries):
    """All words of a list in the book, those of a kind in the place of its name, each once."""
    words = [word for entry in entries.split()
             for word in (words_of(BOOK["kinds"][entry[1:]]) if entry[0] == "@" else [entry])]
    return list(dict.fromkeys(words))


KINDS = {kind: words_of(entries) for kind, entries in BOOK["kinds"].items()}
SHE = frozenset(words_of(BOOK["she"]))
LOOKS = {name: look["words"].split() for name, look in BOOK["looks"].items()}
LOOKS_OF = {kind: LOOKS[name] for name, look in BOOK["looks"].items() for kind in look.get("of", "").split()}


def an(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True)
class Noun:
    """Somebody or something of a tale, as its sentences need it."""

    kind: str
    look: str = ""
    name: str = ""

    words = property(lambda self: f"{self.look} {self.kind}".strip())
    a = property(lambda self: an(self.words))
    full = property(lambda self: f"the {self.words}")
    the = property(lambda self: self.name or f"the {self.kind}")
    The = property(lambda self: self.name or f"The {self.kind}")
    he = property(lambda self: "she" if self.kind in SHE else "he")
    him = property(lambda self: "her" if self.kind in SHE else "him")
    his = property(lambda self: "her" if self.kind in SHE else "his")
    himself = property(lambda self: f"{self.him}self")

    def asked(self, rng):
        """As a request may name it."""
        return rng.choice([self.a, self.a, an(self.kind), self.name or an(self.kind)])


@dataclass(frozen=True)
class Tale:
    """Paragraphs, and the nouns that a request may ask for."""

    paragraphs: list
    about: list


def choose_facts(rng, plot):
    """One of each list of facts that says nothing else than those before it where both speak of the same."""
    facts = {}
    for choices in plot.get("facts", {}).values():
        facts |= rng.choice([c for c in choices
                             if all(facts.get(name, fact) == fact for name, fact in c.items())])
    return facts


def choose_noun(rng, role, taken):
    """A noun for a role of the cast, "person animal, named" or "thing, looks=quiet",
    of a kind that is not taken; "=son" is a son."""
    kinds, *more = role.split(", ")
    if kinds[0] == "=":
        return Noun(kinds[1:])
    kind = rng.choice(kinds.split())
    look, _, word = rng.choice([w for w in KINDS[kind] if w.split("_")[-1] not in taken]).rpartition("_")
    looks = next((LOOKS[m.removeprefix("looks=")] for m in more if m.startswith("looks=")), None)
    if looks or kind in LOOKS_OF and rng.random() < LOOKED:
        look = rng.choice(looks or LOOKS_OF[kind])
    noun = Noun(word, look)
    return Noun(word, look, rng.choice(NAMES[noun.he])) if "named" in more and rng.random() < NAMED else noun


def fill(text, parts):
    """The text with its parts, and theirs, in place."""
    while "<" in text:
        text = re.sub("<(.*?)>", lambda name: parts[name[1]], text)
    return text


def tell(rng, plot):
    """A tale of a plot."""
    facts, cast = choose_facts(rng, plot), {}
    parts = PARTS | facts
    for name, role in plot["cast"].items():
        cast[name] = choose_noun(rng, fill(role, parts), {noun.kind for noun in cast.values()})
    text = fill(plot["text"], parts)
    while found := INNERMOST.search(text):
        text = text[: found.start()] + rng.choice(found[1].split("|")).strip() + text[found.end() :]
    called = f" called {cast['h'].name}" if cast["h"].name else ""
    told = [re.sub(r"\s+", " ", part.format(called=called, **cast))
            for part in re.split(r"\n\n+", text.strip())]
    told = [BEGINNING.sub(lambda found: found[1] + found[2].upper(), part) for part in told]
    return Tale(told, [noun for noun in cast.values() if re.search(rf"\b{noun.kind}\b", " ".join(told))])


def tale(rng):
    """A tale of any plot."""
    return tell(rng, rng.choices(list(PLOTS.values()), [plot["share"] for plot in PLOTS.values()])[0])
