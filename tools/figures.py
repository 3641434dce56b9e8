"""The figures of docs/bmc.md, drawn from what `python -m tools.kvbench --json` printed.
Needs matplotlib, the extra [plot]."""

from __future__ import annotations

from pathlib import Path

from pybmc.errors import BmcError, needs_packages

PARTS = ("rest_ms", "attention_ms", "touch_ms", "copy_ms", "allocate_ms")
COLOURS = {"rest_ms": "#d9d9d9", "attention_ms": "#7fa8c9", "touch_ms": "#e0b35a", "copy_ms": "#c9553f",
           "allocate_ms": "#5b3a5e"}
LINES = ("#33608c", "#c9553f", "#5a8f4e", "#8a5aa0", "#b0802a")


def draw(lines: list[dict], folder) -> list[Path]:
    """Write every figure that the lines have something for; the files."""
    plt = _pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kv = [line for line in lines if line.get("test") == "kv"]
    drawn = []
    for name, figure in (("curve", _curves), ("parts", _parts), ("memory", _memory),
                         ("speculation", _speculation)):
        made = figure(plt, kv)
        if made is not None:
            drawn.append(folder / f"bmc-{name}.svg")
            made.savefig(drawn[-1], bbox_inches="tight", metadata={"Date": None})
            plt.close(made)
    return drawn


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise BmcError(needs_packages("a figure", "plot")) from error
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bmc", "svg.fonttype": "none", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
                                "legend.frameon": False})
    import matplotlib.pyplot as plt
    return plt


def _values(lines: list[dict], key: str) -> list:
    return list(dict.fromkeys(line[key] for line in lines))


def _curve(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """The lines of growth by copies, ordered by r, and those that reserve everything."""
    copies = sorted((line for line in lines if line["rows"].startswith("copy:")), key=lambda line: line["r"])
    return copies, [line for line in lines if line["rows"] == "max"]


def _grid(plt, n_rows: int, n_cols: int, width: float = 2.7, height: float = 2.2):
    return plt.subplots(n_rows, n_cols, figsize=(width * n_cols + 0.4, height * n_rows + 0.3), squeeze=False,
                        layout="constrained")


def _curves(plt, kv: list[dict]):
    """Milliseconds a token over r, measured and predicted, plain decoding."""
    kv = [line for line in kv if line["pad"] and line["k"] == 0]
    shapes, prompts = _values(kv, "shape"), sorted(_values(kv, "prompt"))
    if not kv:
        return None
    figure, axes = _grid(plt, len(prompts), len(shapes))
    for row, prompt in zip(axes, prompts):
        for ax, shape in zip(row, shapes):
            copies, whole = _curve([x for x in kv if x["shape"] == shape and x["prompt"] == prompt])
            _one_curve(ax, copies, whole)
            ax.set_title(f"{shape}, prompt {prompt}", fontsize=9)
    axes[0][0].legend(fontsize=7, handles=axes[0][0].lines[:2])
    figure.supxlabel("r, rows added at a time; N: all at once", fontsize=9)
    figure.supylabel("ms a token", fontsize=9)
    return figure


def _one_curve(ax, copies: list[dict], whole: list[dict]) -> None:
    both = copies + whole
    n = 2 * max(line["r"] for line in copies)
    at = [line["r"] for line in copies] + [n] * len(whole)
    rest = sorted(line["rest_ms"] for line in both)[len(both) // 2]
    ax.plot(at, [line["predicted_ms"] + rest for line in both], color=LINES[0], label="predicted")
    ax.plot(at, [line["cache_ms"] + rest for line in both], "o", color=LINES[1], markersize=4,
            label="measured")
    stars = [line["r"] for line in copies if line["r_star"]]
    if stars:
        ax.axvline(stars[0], color="#999999", linestyle=":")
        ax.text(stars[0], 1.2 * max(line["total_ms"] for line in both), f" r* = {stars[0]}",
                fontsize=7, va="top")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    shown = [r for r in at if r in (1, 16, 64, 256, 1024)] + [n]
    ax.set_xticks(shown, [*map(str, shown[:-1]), "N"])
    ax.set_ylim(0.8 * min(line["total_ms"] for line in both), 1.3 * max(line["total_ms"] for line in both))
    low, high = ax.get_ylim()
    ticks = [y for y in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 300, 500, 1000) if low < y < high]
    ax.set_yticks(ticks, map(str, ticks))
    ax.minorticks_off()


def _parts(plt, kv: list[dict]):
    """What a token's time goes into, by policy."""
    kv = [line for line in kv if not line["pad"]]
    shapes = _values(kv, "shape")
    if not kv:
        return None
    figure, axes = _grid(plt, 1, len(shapes), 3.2, 3.0)
    for ax, shape in zip(axes[0], shapes):
        lines, bottom = [line for line in kv if line["shape"] == shape], None
        names = [line["rows"] for line in lines]
        bottom = [0.0] * len(lines)
        for part in PARTS:
            values = [max(0.0, line[part]) for line in lines]
            ax.barh(names, values, left=bottom, color=COLOURS[part], label=part.removesuffix("_ms"))
            bottom = [b + v for b, v in zip(bottom, values)]
        ax.invert_yaxis()
        ax.set_title(f"{shape}, prompt {lines[0]['prompt']}", fontsize=9)
        ax.set_xlabel("ms a token")
    axes[0][0].legend(fontsize=7, loc="lower right")
    return figure


def _memory(plt, kv: list[dict]):
    """MB reserved while tokens come."""
    shown = ("copy", "geometric", "chunk", "max")
    kv = [line for line in kv if not line["pad"] and line["rows"] != "copy:1"
          and line["rows"].split(":")[0] in shown]
    shapes = _values(kv, "shape")
    if not kv:
        return None
    figure, axes = _grid(plt, 1, len(shapes), 2.9, 2.4)
    for ax, shape in zip(axes[0], shapes):
        for colour, line in zip(LINES, (line for line in kv if line["shape"] == shape)):
            tokens, mb = zip(*line["memory"])
            ax.plot(tokens, mb, color=colour, label=line["rows"], linewidth=1)
        used = [(n, n * line["row_bytes"] / 1e6) for n in (tokens[0], tokens[-1])]
        ax.plot(*zip(*used), color="black", linestyle=":", linewidth=1, label="rows in use")
        ax.set_title(shape, fontsize=9)
        ax.set_xlabel("tokens")
        ax.set_ylim(bottom=0)
    axes[0][0].set_ylabel("MB reserved")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def _speculation(plt, kv: list[dict]):
    """How many times faster drafting is over r, forced acceptance."""
    kv = [line for line in kv if line["pad"]]
    drafted = [line for line in kv if line["k"]]
    if not drafted:
        return None
    shapes, prompts = _values(kv, "shape"), sorted(_values(kv, "prompt"))
    prompt = prompts[len(prompts) // 2]
    figure, axes = _grid(plt, 1, len(shapes), 2.9, 2.4)
    for ax, shape in zip(axes[0], shapes):
        here = [line for line in kv if line["shape"] == shape and line["prompt"] == prompt]
        plain = {line["rows"]: line["total_ms"] for line in here if line["k"] == 0}
        for colour, k in zip(LINES, sorted(_values([line for line in here if line["k"]], "k"))):
            copies, _ = _curve([x for x in here if x["k"] == k and x["rows"] in plain])
            ax.plot([line["r"] for line in copies],
                    [plain[line["rows"]] / line["total_ms"] for line in copies], "o-", color=colour,
                    markersize=3, linewidth=1, label=f"k = {k}")
        ax.axhline(1, color="#999999", linewidth=0.7)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{shape}, prompt {prompt}", fontsize=9)
        ax.set_xlabel("r")
    axes[0][0].set_ylabel("times plain decoding")
    axes[0][0].legend(fontsize=7)
    return figure
