"""From a corpus file to documents: clean books, passages cut at paragraph ends,
and for each a request made of its own words."""

import lzma
import math
import random
import re
from collections import Counter
from dataclasses import dataclass

from . import simulate
from .recipe import BOOKS

BOOK_LINE = "<|book|>"
ABSTRACT = re.compile(r"...(ing|ion|ness|ment|ity|ance|ence|ency|ure|ism)$").search
DETERMINERS = frozenset("a an the this that his her their my your our its every each some no another".split())
FUNCTION = frozenset(
    "of and was were is are in on at to that which who with as he she it they had has have would could from "
    "by for but or then when so into not did said there than will shall must may be been came went i you we "
    "if upon stood sat lay all out up down".split()
) | set(".,;:!?-")
PLAIN = frozenset(
    "way day time thing things one other others man's same own end side part place rest manner kind "
    "sort moment matter case fact word reason means number first second last least most more much many few "
    "great good such little very old young new long next gentleman's mr mrs miss chapter subject point turn "
    "account use sense state nature idea question opinion person persons people anything nothing something "
    "everything morning evening night year years hour minute while deal lot bit pair hand hands head face "
    "eyes eye voice back life mind heart world name other half whole present past it him her them himself "
    "herself age course order".split()
)
REQUESTS = (
    "Tell me of {}.", "Tell me of {}.", "Tell me of {}.",
    "Tell me a tale of {}.", "Tell me a story about {}.", "Tell me about {}.", "A tale of {}, please.",
    "Can you tell me a story about {}?", "I want to hear of {}.", "Please tell me a tale about {}.",
    "Do you know a story of {}?", "tell me of {}", "tell me a story about {}", "{}",
    "Write a story about {}.", "Tell us of {}!", "Begin a tale of {}.",
)
OPEN_REQUESTS = ("Tell me a story.", "Tell me a tale.", "Tell me a fairy tale.", "Tell me something.",
                 "Another tale, please.", "tell me a story")
GO_ON = ("Go on.", "Go on.", "What happened then?", "And then?", "Please go on.", "go on", "Tell me more.",
         "How did it go on?")
SMALL_TALK = (
    (("Hello.", "Hello!", "Hi", "Good day.", "Good evening!", "hello"),
     "Good evening! Name me a thing or two, a king, a bird, a golden key, and I will tell you a tale "
     "of them."),
    (("Who are you?", "What are you?", "What is your name?", "who are you"),
     "I am a small teller of tales. I have read old books and nothing else. Name me a king or a cat, and I "
     "will begin."),
    (("What can you do?", "Help", "help me", "How does this work?"),
     "I can tell tales. Say: tell me of a fisherman and a talking fish. When I stop, say: go on."),
    (("Thank you.", "Thanks!", "That was beautiful.", "thank you"),
     "You are welcome. Shall I tell another? Name me who should be in it."),
    (("Goodbye.", "Bye", "Good night.", "Farewell!"),
     "Good night, and sleep well. The tales will wait for you."),
)


@dataclass(frozen=True)
class Document:
    """Turns of (request, passage); a document without requests is running text."""

    turns: tuple


def read_books(path):
    """The corpus file (plain or .xz) as one string a book."""
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [book.strip("\n") for book in re.split(rf"^{re.escape(BOOK_LINE)}$", file.read(), flags=re.M)]


def weights(n_books):
    """How often each book is told; a corpus that is not ours is told evenly."""
    return [w for _, w in BOOKS] if n_books == len(BOOKS) else [1.0] * n_books


def is_heading(paragraph):
    return len(paragraph) < 80 and paragraph[-1] not in ".!?:;,\"')-" or not re.search("[a-z]", paragraph)


def is_prose(paragraph):
    letters = sum(ch.islower() or ch == " " for ch in paragraph)
    return letters > 0.75 * len(paragraph) and not re.search(r"[\[\]{}<>|^=•■*]|\n {2}|e-?book|[Tt]ranslat",
                                                             paragraph) and len(paragraph) > 1


def tidy(paragraph):
    return re.sub(r"\s+", " ", paragraph.replace("_", "").replace("—", "--").replace("’", "'")).strip()


def chapters(book):
    """A book as lists of tidy paragraphs: a heading begins the next list and is dropped,
    like everything that is no prose."""
    found, current = [], []
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", book))):
        if is_heading(paragraph):
            found.append(current)
            current = []
        elif is_prose(paragraph):
            current.append(tidy(paragraph))
    return [c for c in [*found, current] if sum(map(len, c)) > 200]


def running_text(book):
    """A book as it stands, less paragraphs that are no prose: what the models read without a request."""
    kept = [p for p in re.split(r"\n\s*\n", book) if p.strip() and (is_heading(p.strip()) or is_prose(p))]
    return "\n\n".join(kept)


def split_long(paragraph, limit):
    """Pieces of whole sentences, each up to about `limit` characters."""
    pieces, piece = [], ""
    for sentence in re.split(r"(?<=[.!?]['\"]) |(?<=[.!?]) ", paragraph):
        if piece and len(piece) + len(sentence) > limit:
            pieces.append(piece)
            piece = ""
        piece = f"{piece} {sentence}" if piece else sentence
    return [*pieces, piece]


def passages(chapter, rng, limit):
    """Cut a chapter into passages of whole sentences, each of a random length up to `limit` characters."""
    found, current, goal = [], [], rng.uniform(0.25, 1.0) * limit
    for paragraph in chapter:
        for piece in split_long(paragraph, limit * 0.6):
            if current and sum(map(len, current)) + len(piece) > goal:
                found.append("\n\n".join(current))
                current, goal = [], rng.uniform(0.25, 1.0) * limit
            current.append(piece)
    return [p for p in [*found, "\n\n".join(current)] if 120 < len(p) < 1.2 * limit]


class Namer:
    """Finds what a passage is about: nouns and names that are frequent in it and rare elsewhere,
    with an adjective it gives them."""

    def __init__(self, chapters_):
        count, noun, adjective, article, name, spread = (Counter() for _ in range(6))
        for chapter in chapters_:
            words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?|[.,;:!?-]", " ".join(chapter))
            spread.update({w.lower() for w in words})
            for before, word, after in zip(words, words[1:], words[2:]):
                w, after = word.lower(), after.lower()
                count[w] += 1
                name[w] += word[0].isupper() and before not in ".!?-:;,"
                if before.lower() in DETERMINERS:
                    noun[w] += after in FUNCTION
                    adjective[w] += after not in FUNCTION
                    article[w] += before.lower() in ("a", "an") and after in FUNCTION
        usable = [w for w, n in count.items() if n >= 8 and len(w) > 2
                  and w not in PLAIN | FUNCTION | DETERMINERS and "'" not in w and not ABSTRACT(w)]
        self.names = {w for w in usable if name[w] > 0.75 * count[w]}
        self.nouns = {w for w in usable if noun[w] > 0.2 * count[w] and noun[w] > 1.2 * adjective[w]
                      and (article[w] > 1 or w[-1] == "s")} - self.names
        self.adjectives = ({w for w in usable if adjective[w] > 0.2 * count[w] and adjective[w] > 2 * noun[w]}
                           - self.names)
        self.countable = {w for w in self.nouns if article[w] >= 2}
        self.rarity = {w: min(4.0, math.log(len(chapters_) / spread[w])) for w in self.nouns | self.names}

    def phrase(self, noun, adjective):
        words = f"{adjective} {noun}" if adjective else noun
        if noun in self.countable:
            return f"an {words}" if words[0] in "aeiou" else f"a {words}"
        return words if noun.endswith("s") and not noun.endswith("ss") else f"the {words}"

    def subjects(self, passage, rng):
        """One to three phrases, in the passage's order: "a king", "a golden bird", "Gerda"."""
        words = re.findall(r"[A-Za-z]+|[.,;:!?-]", passage[:900])
        score, at, adjective = Counter(), {}, {}
        for i, word in enumerate(words):
            w = word.lower()
            if w in self.nouns or (w in self.names and word[0].isupper()):
                at.setdefault(w, i)
                score[w] += self.rarity[w] * (2.0 if i < 60 else 1.0)
                if i and words[i - 1].lower() in self.adjectives:
                    adjective.setdefault(w, words[i - 1].lower())
        chosen = [w for w, _ in score.most_common(5)]
        chosen = sorted(rng.sample(chosen, min(len(chosen), rng.choice((1, 2, 2, 2, 3)))), key=at.get)
        return [w.capitalize() if w in self.names
                else self.phrase(w, adjective.get(w) if rng.random() < 0.7 else None) for w in chosen]

    def request(self, passage, rng):
        subjects = self.subjects(passage, rng)
        if not subjects or rng.random() < 0.03:
            return rng.choice(OPEN_REQUESTS)
        return rng.choice(REQUESTS).format(join(subjects))


def join(phrases):
    """a king / a king and a bird / a king, a bird and a cat"""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def tell(chapter, namer, rng, limit):
    """A chapter as chat documents: each passage answers a request,
    and sometimes the next one answers "Go on."."""
    left = passages(chapter, rng, limit)
    while left:
        n_turns = min(len(left), rng.choices((1, 2, 3), (75, 17, 8))[0])
        part, left = left[:n_turns], left[n_turns:]
        asked = [namer.request(part[0], rng), *(rng.choice(GO_ON) for _ in part[1:])]
        yield Document(tuple(zip(asked, part)))


def small_talk(rng, n):
    for _ in range(n):
        asked, answer = rng.choice(SMALL_TALK)
        yield Document(((rng.choice(asked), answer),))


def simulated(rng, n):
    """Simulated tales that answer a request for some of what they tell of, now and then in two turns."""
    for _ in range(n):
        tale = simulate.tale(rng)
        asked = rng.sample(tale.about, min(len(tale.about), rng.choice((1, 2, 2, 2, 3))))
        request = (rng.choice(REQUESTS).format(join([noun.asked(rng) for noun in asked]))
                   if rng.random() > 0.05 else rng.choice(OPEN_REQUESTS))
        cut = rng.randrange(1, len(tale.paragraphs)) if rng.random() < 0.05 else len(tale.paragraphs)
        parts = [part for part in (tale.paragraphs[:cut], tale.paragraphs[cut:]) if part]
        yield Document(tuple(zip((request, rng.choice(GO_ON)), map("\n\n".join, parts))))


def chat_documents(books, seed, rounds, limit, simulated_share=0.0):
    """Documents for `rounds` passes over the weighted books, shuffled, and simulated tales beside them.
    Every pass cuts and asks anew."""
    rng = random.Random(seed)
    parted = [chapters(book) for book in books]
    namer = Namer([c for book in parted for c in book])
    documents = []
    for book, weight in zip(parted, weights(len(books))):
        times = weight * rounds
        for chapter in book:
            for _ in range(int(times) + (rng.random() < times % 1)):
                documents += tell(chapter, namer, rng, limit)
    documents += simulated(rng, int(len(documents) * simulated_share / (1 - simulated_share)))
    documents += small_talk(rng, len(documents) // 25)
    rng.shuffle(documents)
    return documents


KINDS = ("king queen miller tailor fox wolf raven goose fisherman soldier "
         "witch giant dwarf princess shepherd cat").split()
PLACES = "forest mill castle river mountain meadow garden well cave village bridge tower".split()
LOOKS = "old young golden proud merry clever lazy hungry gentle brave silver quiet".split()
PATTERNS = (
    "There was once a {a} {x} who lived by the {p}.",
    "One day the {x} met a {b} {y} at the {q}.", '"Good day," said the {y}, "where are you going?"',
    '"I am looking for a {b} {y}," answered the {x}.', "The {y} laughed and ran to the {q}.",
    "But the {x} was {a} and did not stop.", "Then they walked together to the {p} and rested.",
    "So the {x} and the {y} lived in the {q} and were {b} and content.",
)


def invented_books(seed, n_books=3, n_tales=60):
    """Text for a smoke run: tales from a handful of patterns."""
    rng = random.Random(seed)
    tale = lambda w: " ".join(rng.choice(PATTERNS).format(**w) for _ in range(rng.randrange(4, 14)))
    words = lambda: dict(zip("xypqab",
                             [*rng.sample(KINDS, 2), *rng.sample(PLACES, 2), *rng.sample(LOOKS, 2)]))
    return ["\n\n".join(f"TALE {i}\n\n{tale(w)}\n\n{tale(w)}"
                        for i, w in enumerate(words() for _ in range(n_tales))) for _ in range(n_books)]
