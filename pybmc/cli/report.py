"""What is said about an answer: one line after it, and more for who asks why it took so long."""

from __future__ import annotations

from ..spec.speculation import MODEL, NGRAMS


def summary(stats, arena=None, seed=None) -> str:
    """One line about an answer."""
    new = stats.prompt_tokens - stats.reused_tokens
    reused = f" ({stats.reused_tokens} more were there)" if stats.reused_tokens else ""
    parts = [f"prompt {new} tokens{reused} {stats.prompt_tok_s:.1f} tok/s",
             f"answer {stats.predicted_tokens} tokens {stats.predicted_tok_s:.1f} tok/s"]
    if stats.plain_tok_s and stats.rounds:
        parts.append(gain(stats))
    if arena is not None:
        parts.append(f"rows {arena.rows_used}/{arena.rows_reserved}")
    return " | ".join(parts + [f"seed {seed}"] * (seed is not None))


def gain(stats) -> str:
    """What guessing brought."""
    return (f"plain ~{stats.plain_tok_s:.1f}, gain {stats.predicted_tok_s / stats.plain_tok_s:.2f}x, "
            f"k {stats.mean_k:.1f}, {stats.accepted_share:.0%} accepted")


def why(stats, speculation=None) -> list[str]:
    """Where the time of an answer went, and what guessing was based on.
    speculation: the engine's Speculation."""
    if stats.predicted_tokens < 2:
        return ["nothing was said yet"]
    lines = [split(stats)]
    if speculation is None or speculation.off:
        return [*lines, "plain decoding: nobody guesses"]
    lines.append(f"{stats.rounds} passes gave {stats.predicted_tokens} tokens; guesses in a pass: "
                 + ", ".join(f"{k}: {n}x" for k, n in sorted(stats.lengths.items())))
    lines.append(f"{stats.draft_n} guesses, {stats.draft_n_accepted} accepted ({stats.accepted_share:.0%})")
    return lines + costs(speculation) + sources(speculation)


def split(stats) -> str:
    """Seconds by what they were spent on."""
    rest = stats.predicted_s - stats.draft_s - stats.verify_s
    spent = {"draft": stats.draft_s, "verify": stats.verify_s, "rest": rest}
    whole = max(stats.predicted_s, 1e-9)
    return f"{stats.predicted_s:.3f} s: " + ", ".join(f"{name} {t / whole:.0%}" for name, t in spent.items())


def drafter(speculation) -> str:
    return "draft head" if speculation.head else "draft model"


def costs(speculation) -> list[str]:
    """What passes cost by their width."""
    one = speculation.seconds(1)
    if not one:
        return []
    widths = ", ".join(f"{n}: {speculation.seconds(n) / one:.2f}" for n in (2, 4, 8, 16))
    lines = [f"one token takes {one * 1e3:.2f} ms; a pass of more tokens, compared with that: {widths}"]
    draft = speculation.seconds(1, of_draft=True)
    if draft and speculation.draft:
        lines.append(f"a guess of the {drafter(speculation)} takes {draft * 1e3:.2f} ms")
    return lines


def sources(speculation) -> list[str]:
    """How often guesses come true."""
    lines = []
    if speculation.draft:
        lines.append(f"{drafter(speculation)}: {speculation.chance(MODEL):.0%} of its guesses come true")
    if speculation.spec in ("auto", "ngram"):
        chances = " ".join(f"{speculation.chance(NGRAMS, n):.0%}" for n in (2, 3, 4, 6, 8, 12, 16, 24))
        lines.append(f"repetitions: after matches of 2 3 4 6 8 12 16 24 tokens {chances} come true")
    return lines
