"""The stages, in their order. Each leaves its result in the work folder and does nothing when
it is already there."""

import copy
import json
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import pybmc
from pybmc.engine.perplexity import perplexity

from . import card, choose, distill, evaluate, export, text, tokens
from .generate import generate, read
from .model import Config, Llama, blend, grow, load_model, save_model
from .recipe import Recipe
from .train import Trainer, text_batches, text_loss

TARGET, DRAFT, RESULTS = PAIR = "teller.gguf", "teller-draft.gguf", "results.json"


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    corpus: Path | None
    heldout: Path | None
    work: Path
    out: Path
    start: Path | None = None       # a folder with a pair that an earlier run left, to go on from

    def books(self):
        return text.read_books(self.corpus) if self.corpus else text.invented_books(self.recipe.seed)

    def heldout_books(self):
        return (text.read_books(self.heldout) if self.heldout
                else text.invented_books(self.recipe.seed + 1, n_books=1, n_tales=20))

    def tokenizer(self):
        return Tokenizer.from_file(str(self.work / "tokenizer.json"))

    def config(self, shape):
        """A model's Config. Positions reach twice a training row, as the last rows do."""
        return Config(vocab_size=self.recipe.vocab_size, n_ctx=2 * self.recipe.n_ctx, **asdict(shape))

    def rows(self, name):
        """(ids, mask) of a file of rows."""
        saved = np.load(self.work / f"{name}.npz")
        return saved["ids"], saved["learn"]

    def passage_limit(self):
        """Characters of the longest passage: what fits a row with its request."""
        return 3.3 * self.recipe.n_ctx


def say(line):
    print(line, file=sys.stderr, flush=True)


def running_streams(tokenizer, books):
    """Each book's running text as ids, and how often it is told."""
    return [(np.array(tokenizer.encode(text.running_text(book)).ids, np.uint16), weight)
            for book, weight in zip(books, text.weights(len(books)))]


def data(job):
    """Tokenizer and rows."""
    if (job.work / "long.npz").exists():
        return
    r, books = job.recipe, job.books()
    documents = text.chat_documents(books, r.seed, r.rounds, job.passage_limit(), r.simulated_share)
    if job.start:
        tokenizer = export.read_tokenizer(job.start / TARGET)
    else:
        tokenizer = tokens.train_tokenizer((part for d in documents for turn in d.turns for part in turn),
                                           r.vocab_size)
    tokenizer.save(str(job.work / "tokenizer.json"))
    streams = running_streams(tokenizer, books)
    late = text.chat_documents(books, r.seed + 1, r.rounds * 0.3, job.passage_limit(), r.simulated_share)
    for name, docs, length in (("short", documents, r.n_ctx + 1), ("long", late, 2 * r.n_ctx + 1)):
        ids, learn = tokens.make_rows(tokens.encode_documents(tokenizer, docs), streams, length,
                                      r.raw_share, r.seed)
        np.savez(job.work / f"{name}.npz", ids=ids, learn=learn)
        say(f"data  {name} rows {ids.shape}, {learn.mean():.0%} to learn")


def train_on_text(job, name, shape, schedule):
    """Train a model on the rows; leaves name.pt."""
    if (job.work / f"{name}.pt").exists():
        return
    r = job.recipe
    torch.manual_seed(r.seed)
    config, trainer = job.config(shape), None
    batches = text_batches(schedule, job.rows("short"), job.rows("long"))

    def train(part, model, until):
        say(f"{part}  {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
        loss_of = text_loss(model, r.bf16, r.compile)
        run = Trainer(part, model, schedule, loss_of, batches, job.work / f"{part}.ckpt", until,
                      after=trainer)
        run.run()
        return run

    if schedule.grow_at:
        trainer = train(f"{name}-half", Llama(replace(config, n_layers=config.n_layers // 2)),
                        schedule.grow_at)
    trainer = train(name, grow(trainer.model) if trainer else Llama(config), 1.0)
    save_model(trainer.model, job.work / f"{name}.pt")
    keep(job, name, trainer.counts())


def read_results(folder):
    path = folder / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}


def keep(job, key, value):
    """Remember a result for the card, and for a run that goes on from here."""
    (job.work / RESULTS).write_text(json.dumps({**read_results(job.work), key: value}, indent=1))


def keep_sum(job, key, counts):
    """Remember counts, by themselves and with those of the run that this one goes on from."""
    keep(job, f"{key}_last", counts)
    before = read_results(job.start).get(key, {}) if job.start else {}
    keep(job, key, {name: count + before.get(name, 0) for name, count in counts.items()})


def take_over(job, name, file):
    """name.pt from the pair to go on from, and what its training came to."""
    if not (job.work / f"{name}.pt").exists():
        keep(job, name, read_results(job.start)[name])
        save_model(export.read_gguf(job.start / file), job.work / f"{name}.pt")


def target(job):
    """Train the target."""
    if job.start:
        take_over(job, "target", TARGET)
    else:
        train_on_text(job, "target", job.recipe.target, job.recipe.target_run)


def more(job):
    """Train the target further, from where its first run ended, and write the file of what lies between."""
    r, path, first = job.recipe, job.work / "more.pt", job.work / "target.ckpt"
    if not path.exists():
        start = load_model(job.work / "target.pt")
        if start.config.n_layers < r.target.n_layers:       # a pair of an earlier recipe
            start = grow(start)
        model, schedule = copy.deepcopy(start), r.more_run
        cursor = (torch.load(first, weights_only=True, map_location="cpu")["cursor"]
                  if first.exists() else None)
        batches = text_batches(schedule, job.rows("short"), job.rows("long"))
        run = Trainer("more", model, schedule, text_loss(model, r.bf16, r.compile), batches,
                      job.work / "more.ckpt", cursor=cursor)
        run.run()
        save_model(blend(start, model, r.more_share), path)
        keep_sum(job, "more", run.counts())
    export.write_gguf(load_model(path), job.tokenizer(), job.out / TARGET, "Teller",
                      "A small teller of tales")


def tale_documents(job, seed):
    """Requests and tales of the books that chat's come from."""
    return text.chat_documents(job.books()[: job.recipe.tale_books], seed, job.recipe.rounds,
                               job.passage_limit(), job.recipe.simulated_share)


def choose_answers(job, n):
    """Let the target, as its file has it, answer requests several times and keep the best,
    and go round in circles."""
    r = job.recipe
    requests = sorted({d.turns[0][0] for d in tale_documents(job, r.seed + 2 * n)
                       if choose.subjects(d.turns[0][0])})
    with pybmc.Model(job.out / TARGET) as model:
        choose.write_chosen(model, job.tokenizer(), requests, r, job.work, f"chosen{n}", r.choose_seconds)
        choose.write_circles(model, job.tokenizer(), requests, r, job.work, f"circles{n}",
                             r.choose_seconds / 50)


def learn_answers(job, n, model):
    """Teach the target its best answers, beside as many of the books' tales and running text;
    and what not to say again."""
    r, tokenizer = job.recipe, job.tokenizer()
    newline, = tokenizer.encode("\n").ids
    chosen, circles = (list(choose.told_documents(job.work, f"{name}{n}", newline))
                       for name in ("chosen", "circles"))
    if not chosen:
        say(f"refine{n}  no answer was good enough to be learned")
        return {"steps": 0, "tokens": 0, "seconds": 0, "answers": 0}
    tales = tokens.encode_documents(tokenizer, tale_documents(job, r.seed + 2 * n + 1)[: len(chosen)])
    encoded = [*chosen, *circles[: len(chosen) // 2], *tales]
    random.Random(r.seed).shuffle(encoded)
    rows = tokens.make_rows(encoded, running_streams(tokenizer, job.books()), r.n_ctx + 1,
                            r.raw_share, r.seed)
    say(f"refine{n}  {len(chosen)} answers chosen, rows {rows[0].shape}")
    batches = text_batches(r.refine_run, rows, None)
    run = Trainer(f"refine{n}", model, r.refine_run, text_loss(model, r.bf16, r.compile), batches,
                  job.work / f"refine{n}.ckpt")
    run.run()
    return run.counts() | {"answers": len(chosen)}


def refine(job):
    """Rounds in which the target answers requests and learns its best answers,
    and its file of what lies between the first and the last."""
    r, start = job.recipe, load_model(job.work / "more.pt")
    model = copy.deepcopy(start)
    for n in range(r.refine_rounds):
        path = job.work / f"refined{n}.pt"
        if not path.exists():
            torch.manual_seed(r.seed + n)
            choose_answers(job, n)
            keep(job, f"refine{n}", learn_answers(job, n, model))
            save_model(model, path)
        model = load_model(path)
        export.write_gguf(model, job.tokenizer(), job.out / TARGET, "Teller", "A small teller of tales")
    rounds = [read_results(job.work)[f"refine{n}"] for n in range(r.refine_rounds)]
    if rounds:
        keep_sum(job, "refine", {key: sum(counts[key] for counts in rounds) for key in rounds[0]})
        export.write_gguf(blend(start, model, r.refine_share), job.tokenizer(), job.out / TARGET, "Teller",
                          "A small teller of tales")


def draft(job):
    """Teach the draft the corpus, before it learns from the target."""
    if job.start:
        take_over(job, "draft", DRAFT)
    else:
        train_on_text(job, "draft", job.recipe.draft, job.recipe.draft_run)


def tell(job):
    """Let the target, as its file has it, write what the draft will learn from,
    and say what it would have written in the corpus."""
    books, tokenizer = job.books(), job.tokenizer()
    documents = text.chat_documents(books, job.recipe.seed + 2, min(1.0, job.recipe.rounds),
                                    job.passage_limit(), job.recipe.simulated_share)
    requests = [d.turns[0][0] for d in documents]
    running = tokenizer.encode("\n\n".join(text.running_text(book) for book in books[:6])).ids
    with pybmc.Model(job.out / TARGET) as model:
        read(model, job.rows("short"), job.recipe, job.work, job.recipe.read_seconds)
        generate(model, tokenizer, requests, running, job.recipe, job.work, job.recipe.generate_seconds)


def distill_draft(job):
    """Teach the draft the target's choices and write its file."""
    r = job.recipe
    if not (job.work / "distilled.pt").exists():
        torch.manual_seed(r.seed)
        model, told = load_model(job.work / "draft.pt"), distill.told_rows(job.work)
        batches = distill.told_batches(r.distill_run, told, r.seed)
        trainer = Trainer("distill", model, r.distill_run, distill.told_loss(model, r.compile), batches,
                          job.work / "distilled.ckpt")
        trainer.run()
        save_model(model, job.work / "distilled.pt")
        keep_sum(job, "distill", trainer.counts() | {"told": int(told["own"].size)})
    export.write_gguf(load_model(job.work / "distilled.pt"), job.tokenizer(), job.out / DRAFT, "Teller draft",
                      "Drafts for Teller")


def heldout_requests(job, n=20):
    """Requests made of held-out passages, the way the training's were made of theirs."""
    rng = random.Random(job.recipe.seed)
    chapters = [c for book in job.heldout_books() for c in text.chapters(book)]
    namer = text.Namer([c for book in job.books() for c in text.chapters(book)])
    found = [p for c in chapters for p in text.passages(c, rng, job.passage_limit())]
    return [namer.request(p, rng) for p in rng.sample(found, min(n, len(found)))]


def evaluation(job):
    """Held-out bits per byte and acceptance of the pair as its files have it."""
    tokenizer, pair = job.tokenizer(), {"target": export.read_gguf(job.out / TARGET),
                                        "draft": export.read_gguf(job.out / DRAFT)}
    heldout = job.heldout.read_text() if job.heldout else "\n\n".join(job.heldout_books())
    known = f"\n{text.BOOK_LINE}\n".join(job.books())
    for name, model in pair.items():
        keep(job, f"{name}_heldout", evaluate.bits_per_byte(model, tokenizer, heldout))
    keep(job, "xz", {"alone": evaluate.xz_bits_per_byte(heldout),
                     "after_corpus": evaluate.xz_bits_per_byte(heldout, known)})
    for name, file in (("target", TARGET), ("draft", DRAFT)):
        with pybmc.Model(job.out / file) as model:
            keep(job, f"{name}_engine", perplexity(model, heldout, model.config.n_ctx).bits_per_byte)
    asked = {"told": heldout_requests(job, 200),
             "told_simulated": [d.turns[0][0]
                                for d in text.simulated(random.Random(job.recipe.seed - 1), 200)]}
    simulated = evaluate.simulated_runs(tokenizer)
    with pybmc.Model(job.out / TARGET) as model:
        for key, requests in asked.items():
            keep(job, key, evaluate.tales_told(model, tokenizer,
                                               [r for r in requests if choose.subjects(r)], simulated))
    requests = heldout_requests(job)
    keep(job, "greedy", evaluate.greedy_acceptance(pair["target"], pair["draft"], tokenizer, requests))
    keep(job, "sampled", evaluate.sampled_acceptance(pair["target"], pair["draft"], tokenizer, requests))
    say(f"evaluate  {(job.work / RESULTS).read_text()}")


def model_card(job):
    """Write the card with the numbers and ten tales."""
    results = read_results(job.work)
    pair = [export.read_gguf(job.out / name) for name in (TARGET, DRAFT)]
    sizes = [(job.out / name).stat().st_size for name in (TARGET, DRAFT)]
    tales = card.tales(pair[0], job.tokenizer())
    (job.out / RESULTS).write_text(json.dumps(results, indent=1))
    (job.out / "README.md").write_text(card.write(job.recipe, [m.config for m in pair], sizes,
                                                  results, tales))


STAGES = {
    "data": data, "target": target, "more": more, "refine": refine, "draft": draft, "tell": tell,
    "distill": distill_draft, "evaluate": evaluation, "card": model_card,
}
