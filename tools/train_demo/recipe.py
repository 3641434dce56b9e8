"""Every number of a run: sizes, data, schedules.
`full` makes the bundled pair, `smoke` walks all stages in two minutes."""

from dataclasses import dataclass

# The corpus file's books in their order, and how often a pass over the data tells each of them. Tales count
# most.
BOOKS = (
    ("Andersen's tales and other fairy tales", 4.0),
    ("Grimm, Household Tales (Hunt's translation)", 4.0),
    ("Bryant, Stories to Tell to Children", 4.0),
    ("Burgess, The Adventures of Buster Bear", 4.0),
    ("Carroll, Alice in Wonderland", 4.0),
    ("Edgeworth, The Parent's Assistant", 3.0),
    ("Austen, Emma", 1.5),
    ("Austen, Persuasion", 1.5),
    ("Austen, Pride and Prejudice", 1.5),
    ("Austen, Sense and Sensibility", 1.5),
    ("Chesterton, The Ball and the Cross", 1.5),
    ("Chesterton, The Wisdom of Father Brown", 1.5),
    ("Chesterton, The Man Who Was Thursday", 1.5),
    ("Dickens, A Christmas Carol", 3.0),
    ("Dickens, Great Expectations", 2.0),
    ("Dickens, Hard Times", 1.5),
    ("Dickens, A Tale of Two Cities", 1.5),
    ("Dickens, Oliver Twist", 1.0),
    ("Doyle, The Adventures of Sherlock Holmes", 2.0),
    ("Stoker, Dracula", 1.5),
    ("Melville, Moby Dick", 1.0),
    ("Twain, The Adventures of Tom Sawyer", 3.0),
    ("Shelley, Frankenstein", 1.5),
    ("Stevenson, Dr. Jekyll and Mr. Hyde", 2.0),
    ("Wilde, The Picture of Dorian Gray", 2.0),
    ("Gilman, The Yellow Wallpaper", 2.0),
    ("Shakespeare, plays", 0.1),
    ("Verne, The Mysterious Island and other voyages", 0.6),
)


@dataclass(frozen=True)
class Shape:
    """A model but for its vocabulary."""

    dim: int
    hidden_dim: int
    head_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int


@dataclass(frozen=True)
class Schedule:
    """Training by its own clock: the share of `seconds` spent sets the rate,
    so a slow machine takes fewer steps and still ends well."""

    seconds: float
    batch_tokens: int
    micro_rows: int
    muon_rate: float
    adam_rate: float
    warm_up: float = 0.02       # share of the time over which the rate climbs
    decay_from: float = 0.30    # where the straight line down to zero begins
    weight_decay: float = 0.1
    dropout: float = 0.0        # of what a layer's two halves add: against learning by heart
    grow_at: float = 0.0        # half of the blocks learn alone up to here, and see twice the text
    long_from: float = 0.85     # from here on rows are twice as long


@dataclass(frozen=True)
class Recipe:
    vocab_size: int = 4096
    n_ctx: int = 512                        # tokens in a training row, twice as many at the target's end
    raw_share: float = 0.2                  # rows of running text, without a request
    simulated_share: float = 0.5            # documents that are simulated tales
    rounds: float = 1.0                     # passes over the weighted books when rows are made
    seed: int = 7
    compile: bool = True
    bf16: bool = True
    target: Shape = Shape(384, 1024, 64, 12, 6, 2)
    draft: Shape = Shape(96, 256, 32, 2, 3, 1)
    target_run: Schedule = Schedule(64 * 60, 4096, 8, 0.02, 3e-3, grow_at=0.65, long_from=0.9)
    more_run: Schedule = Schedule(90 * 60, 8192, 4, 0.007, 1.4e-3, decay_from=0.1, long_from=0.9,
                                  dropout=0.1)      # a second climb and descent
    more_share: float = 0.9                 # its weights, beside those that it began with
    refine_rounds: int = 1                  # in which the target learns its best answers
    choose_seconds: float = 15 * 60         # a round's answers to choose from; a fiftieth for greedy ones
    choose_batch: int = 32                  # requests at a time
    answers: int = 8                        # to each
    tale_books: int = 6                     # the first books: requests and tales of these
    refine_run: Schedule = Schedule(15 * 60, 8192, 8, 0.005, 1e-3, decay_from=0.1, long_from=2.0,
                                    dropout=0.1)    # a round's
    refine_share: float = 0.8               # the last round's weights, beside those before the first
    draft_run: Schedule = Schedule(4 * 60, 8192, 16, 0.02, 6e-3, long_from=2.0)
    distill_run: Schedule = Schedule(40 * 60, 8192, 16, 0.02, 4e-3, long_from=2.0)
    generate_seconds: float = 20 * 60       # time for the target's own text
    read_seconds: float = 2 * 60            # time for what it would have written in the corpus's place
    generate_batch: int = 128
    generate_tokens: int = 352              # positions of one told row, its request included
    top: int = 48                           # the target's likeliest tokens kept at each position


FULL = Recipe()
SMOKE = Recipe(
    vocab_size=512, n_ctx=128, compile=False, bf16=False,
    target=Shape(64, 128, 32, 2, 2, 1), draft=Shape(32, 64, 32, 1, 1, 1),
    target_run=Schedule(20, 1024, 8, 0.02, 3e-3, grow_at=0.5),
    more_run=Schedule(5, 1024, 8, 0.02, 3e-3),
    draft_run=Schedule(5, 1024, 8, 0.02, 6e-3, long_from=2.0),
    refine_rounds=1, choose_seconds=8, choose_batch=4, answers=2,
    refine_run=Schedule(5, 1024, 8, 0.005, 1e-3, long_from=2.0),
    distill_run=Schedule(8, 1024, 16, 0.02, 4e-3, long_from=2.0),
    generate_seconds=8, read_seconds=2, generate_batch=8, generate_tokens=64, top=16,
)
RECIPES = {"full": FULL, "smoke": SMOKE}
