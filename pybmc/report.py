"""What is said about an answer: one line after it, and more for who asks why it took so long."""

from __future__ import annotations

from itertools import islice


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
    """What drafting brought."""
    return (f"plain ~{stats.plain_tok_s:.1f}, gain {stats.predicted_tok_s / stats.plain_tok_s:.2f}x, "
            f"k {stats.mean_k:.1f}, {stats.accepted_share:.0%} accepted")


def why(stats, speculation=None, kind: str = "best") -> list[str]:
    """Where the time of an answer went, and what the drafting was based on."""
    if stats.predicted_tokens < 2:
        return ["nothing was said yet"]
    lines = [split(stats)]
    if speculation is None:
        return [*lines, "plain decoding: there is no draft"]
    lines.append(f"{stats.rounds} passes gave {stats.predicted_tokens} tokens; drafted tokens in a pass: "
                 + ", ".join(f"{k}: {n}x" for k, n in sorted(stats.lengths.items())))
    lines.append(f"{stats.draft_n} drafted, {stats.draft_n_accepted} accepted ({stats.accepted_share:.0%})")
    return lines + costs(speculation.controller(kind).curve) + sources(speculation, kind)


def split(stats) -> str:
    """Seconds by what they were spent on."""
    rest = stats.predicted_s - stats.draft_s - stats.verify_s - stats.choose_s
    spent = {"draft": stats.draft_s, "verify": stats.verify_s, "sample": stats.choose_s, "rest": rest}
    whole = max(stats.predicted_s, 1e-9)
    return f"{stats.predicted_s:.3f} s: " + ", ".join(f"{name} {t / whole:.0%}" for name, t in spent.items())


def costs(curve) -> list[str]:
    if not curve.known:
        return []
    widths = ", ".join(f"{n}: {curve.ratio(n):.2f}" for n in (2, 4, 8, 16))
    return [f"one token takes {curve.at(1) * 1e3:.2f} ms; a pass of so many, compared with that: {widths}"]


def sources(speculation, kind: str) -> list[str]:
    """What each drafter is worth."""
    lines = []
    for (name, of), source in speculation._sources.items():
        if of == kind and name == "draft":
            chances = " ".join(f"{p:.0%}" for p in islice(source.accepted.each(), 6))
            cost = f"{source.seconds.slope * 1e3:.2f} ms a token"
            lines.append(f"draft model: {cost}; place by place {chances} come true")
        elif of == kind:
            chances = " ".join(f"{source.by_mark.at(n):.0%}" for n in (2, 3, 4, 6, 8, 12, 16, 24))
            lines.append(f"repetitions: after matches of 2 3 4 6 8 12 16 24 tokens {chances} come true")
    return lines
