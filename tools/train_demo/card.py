"""The model card: what the pair is, how it was made, what it was measured to do,
and ten tales as they came."""

import textwrap

from . import simulate
from .choose import LOOP
from .evaluate import KNOWN, MIN_P, SIMULATED, answer
from .recipe import BOOKS

TALES = (       # (request, temperature)
    ("Tell me of a king and a golden bird.", 0.0), ("Tell me of a fisherman and a talking fish.", 0.0),
    ("Tell me a story about a cat.", 0.0), ("Tell me of a little girl and a wolf.", 0.0), ("Hello.", 0.0),
    ("Tell me of a king and a golden bird.", 0.8), ("Tell me a tale of a poor miller and a princess.", 0.8),
    ("Tell me about an old soldier.", 0.8), ("Tell me of a fox and a goose.", 0.8),
    ("Tell me a fairy tale.", 0.8),
)

CARD = """# The bundled pair: a small teller of tales and its draft

Two models that ship with pybmc so that `pybmc chat` answers without a download. `teller.gguf` tells tales in the manner of old books;
`teller-draft.gguf` has the same vocabulary and guesses its next words for speculative decoding. They are small. They know no facts, follow no
instructions but "tell me of ..." (and forget even that one at times), know {plots} plots, lose their thread where they leave those, and repeat the
manners, and the prejudices, of books a century or two old. A temperature of 0.7 to 0.9 suits them best.

| | teller | draft |
|---|---|---|
{sizes}

Both are `llama` models with tied embeddings, Q8_0 matrices and F32 norms, and share a byte-level BPE of {vocab_size} tokens (GPT-2's pre-tokenizer). The chat
template is ChatML's. Text is best within {n_ctx} tokens; training rows had {row} and, at the end, {n_ctx}.

## Made by

`python -m tools.train_demo --corpus tales.txt.xz --heldout heldout.txt`: every number of the recipe is in `tools/train_demo/recipe.py`.
A pair that goes on from another (`--from`) has its first part by the recipe of that day.

{text}
- **Form**: four rows in five hold passages that answer a request made of their own words ("Tell me of a king and a golden bird."), sometimes
  followed by "Go on."; the rest is running text. Only answers and running text are learned. A few lines of small talk are ours.
- **Simulated tales**: {simulated:.0%} of the requests are answered by tales that a program of ours makes up (`tools/train_demo/simulate.py`, `plots.toml`): {plots} plots in which
  what happens follows from what happened before, some 300 beings, things and places, sentences put together by chance. Five million tokens of old books teach a
  small model how sentences go, but not that what is lost is looked for; these teach it that: asked for what they tell of, it follows their plots, in their words.
- **Teller**: {target_tokens} tokens in {target_steps} steps of {batch_tokens}; Muon for the matrices, AdamW for the rest; warm-up, a level stretch and a straight line to
  zero; weight decay, gradients clipped at 1, bf16 products; half of the layers first, the other half from {grow_at:.0%} of the time on.
  Then {more_tokens} tokens more, from the weights of one run to the next, each with a warm-up and a descent of its own and with rows of {n_ctx} at its end.
  At first the teller that ships had six layers; then each got a copy behind it that added nothing yet, and a tenth of what layers
  add was dropped in training, against learning by heart: by then the tales had been read a dozen times. Of the runs of the
  teller that ships only the last, of {last_tokens} tokens, had simulated tales. Weights are {more_share:.0%} those of its end and the rest those that it began with. {target_minutes} minutes on CPU together, beside other
  work, so that a rerun differs a little.
{refined}- **Draft**: {draft_tokens} tokens of the same text, then {distill_tokens} tokens of distillation on {told_tokens} tokens that the teller's quantized file wrote itself,
  greedy and as chat samples, or read in the corpus: what chat may choose of its {top} likeliest tokens, and its first choice. The last
  {distill_last} on {told_last} tokens of this very teller, those before on tellers that it comes from.

## Measured

Made by the script's evaluate stage, in float32 from the dequantized files; `pybmc perplexity` and `pybmc prove` measure the same with the engine.

Bits per byte of 190 kB of held-out text (ends of six of the books, never trained on), windows of {n_ctx} tokens with a step of half of that:

| | bits per byte | nats per token |
|---|---|---|
{heldout}

The engine agrees: `pybmc perplexity pybmc/demo/teller.gguf -f heldout.txt -c {n_ctx}` gives {engine[0]:.3f} bits per byte, {engine[1]:.3f} for the draft (it
scores the second half of each window, and windows do not overlap).

Drafted tokens that the teller accepts: 20 requests made of held-out text, up to 128 tokens each, four tokens drafted a round (a token counts as accepted when it
and all before it in its round are):

| | accepted of all drafted | 1st | 2nd | 3rd | 4th | tokens a round |
|---|---|---|---|---|---|---|
{acceptance}

Text of plots is easy to guess, for a draft that learned them too: most pairs of models agree less.

Of what 200 requests made of held-out text ask for, and 200 made of fresh simulated tales, answers name the share in the first row; of their
tokens, the share in the second ends a run of {loop} that stood there before, and that in the third one of {known} that stands in one of {n_simulated:,}
simulated tales:

| | held out, greedy | as chat chooses | simulated, greedy | as chat chooses |
|---|---|---|---|---|
{told}

## Licence

The text is in the public domain. The models are under pybmc's MIT licence.

## Ten tales, unedited

{tales}
"""  # noqa: E501

REFINED = """- **Its own best answers**: then it answered requests of the tales' words, {answers} times each, as chat does. {chosen} answers were kept, where
  one of a request's named more than half of what was asked and did not repeat itself: of those that named most, the one whose halves were likeliest by
  its own measure, and likeliest for what stood before them. It read them once or twice, beside as many tales of the first {tale_books} books and simulated
  ones, and running text, {refine_tokens} tokens ([RAFT](https://arxiv.org/abs/2304.06767)), and some of its greedy texts, to find what ends a run of {loop} tokens that stood there
  before less likely ([unlikelihood](https://arxiv.org/abs/1908.04319)). Weights are {refine_share:.0%} those of the end, the rest those before.
"""  # noqa: E501


def tales(model, tokenizer, n_tok=340):
    """[(request, temperature, text)]: the first answer each request gets;
    the seed is its place in the list."""
    return [(q, t, tokenizer.decode(answer(model, tokenizer, q, n_tok, t, seed)[1]))
            for seed, (q, t) in enumerate(TALES)]


def titles():
    listed = "; ".join(title for title, _ in BOOKS)
    words = (f"- **Text**: public-domain English literature: {listed}. Headings, contents pages and editors' "
             "notes were dropped; tales were read "
             "several times as often as novels.")
    return textwrap.fill(words, 140, subsequent_indent="  ")


def millions(n):
    return f"{n / 1e6:.1f}M"


def table(rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def size_rows(configs, sizes):
    row = lambda name, values: (name, *map(str, values))
    return [
        row("file size", [f"{s / 1e6:.1f} MB" for s in sizes]),
        row("weights multiplied a token, head included",
            [f"{c.matrix_params() / 1e6:.2f}M" for c in configs]),
        *(row(name, [getattr(c, name) for c in configs])
          for name in ("n_layers", "dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim")),
    ]


def heldout_rows(results):
    model = lambda name: (f"{results[name]['bits_per_byte']:.3f}", f"{results[name]['nats_per_token']:.3f}")
    return [
        ("teller", *model("target_heldout")), ("draft", *model("draft_heldout")),
        ("`xz -9e`, the held-out text alone", f"{results['xz']['alone']:.3f}", ""),
        ("`xz -9e`, what it adds to the whole training text before it",
         f"{results['xz']['after_corpus']:.3f}", ""),
    ]


def acceptance_rows(results):
    row = lambda name, r: (name, f"{r['rate']:.1%}", *(f"{a:.0%}" for a in r["by_position"]),
                           f"{r['tokens_a_round']:.2f}")
    return [row("greedy", results["greedy"]), row("temperature 0.8", results["sampled"])]


def request_rows(results):
    row = lambda name, key: (name, *(f"{results[told][way][key]:.0%}" for told in ("told", "told_simulated")
                                     for way in ("greedy", "sampled")))
    return [row("named", "named"), row("in circles", "circles"), row("in simulated tales' words", "known")]


def refined(recipe, results):
    """How it learned its own best answers, where it did."""
    if "refine" not in results:
        return ""
    return REFINED.format(
        refine_share=recipe.refine_share, answers=recipe.answers, chosen=f"{results['refine']['answers']:,}",
        tale_books=recipe.tale_books, refine_tokens=millions(results["refine"]["tokens"]), loop=LOOP,
    )


def quote(request, temperature, told):
    how = f"temperature {temperature}, min-p {MIN_P}" if temperature else "greedy"
    lines = "\n".join(f"> {line}".rstrip() for line in told.strip().splitlines())
    return f"**{request}** ({how})\n\n{lines}"


def write(recipe, configs, sizes, results, told):
    return CARD.format(
        sizes=table(size_rows(configs, sizes)), vocab_size=recipe.vocab_size, n_ctx=configs[0].n_ctx,
        row=recipe.n_ctx, top=recipe.top, text=titles(), batch_tokens=recipe.target_run.batch_tokens,
        grow_at=recipe.target_run.grow_at, more_share=recipe.more_share,
        target_tokens=millions(results["target"]["tokens"]), target_steps=results["target"]["steps"],
        more_tokens=millions(results["more"]["tokens"]),
        target_minutes=(results["target"]["seconds"] + results["more"]["seconds"]) // 60,
        draft_tokens=millions(results["draft"]["tokens"]),
        distill_tokens=millions(results["distill"]["tokens"]),
        told_tokens=millions(results["distill"]["told"]), simulated=recipe.simulated_share,
        plots=len(simulate.PLOTS), refined=refined(recipe, results), loop=LOOP, known=KNOWN,
        n_simulated=SIMULATED, engine=[results[f"{name}_engine"] for name in ("target", "draft")],
        last_tokens=millions(results["more_last"]["tokens"]),
        distill_last=millions(results["distill_last"]["tokens"]),
        told_last=millions(results["distill_last"]["told"]), told=table(request_rows(results)),
        heldout=table(heldout_rows(results)), acceptance=table(acceptance_rows(results)),
        tales="\n\n".join(quote(*t) for t in told),
    )
