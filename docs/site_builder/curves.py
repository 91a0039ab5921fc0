"""Draw the curves of real runs, for *Reading the curves*.

python docs/site_builder/curves.py NAME RUN_DIR    keeps the numbers of a run that are drawn
python docs/site_builder/curves.py                 draws all pictures from the numbers that are kept
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "concepts" / "curves"
#: Column -> title of its panel.
PANELS: Mapping[str, str] = {
    "reward_mean": "reward",
    "score": "held-out accuracy, sampled",
    "entropy": "entropy, nats a token",
    "clip_share": "clipped tokens",
    "logprob_gap_mean": "sampler–learner gap, nats",
    "zero_variance_share": "groups without a signal",
    "truncated_share": "cut completions",
    "grad_norm": "gradient norm",
    "ratio_max": "largest ratio",
}
#: Run -> the panels that show what is wrong with it, or right; four make a square.
PICTURES: Mapping[str, Sequence[str]] = {
    "healthy": ("reward_mean", "score", "entropy", "clip_share"),
    "high_rate": ("reward_mean", "score", "entropy", "logprob_gap_mean"),
    "wrong_reward": ("reward_mean", "score"),
    "alike": ("reward_mean", "score", "zero_variance_share", "grad_norm"),
    "truncated": ("reward_mean", "score", "truncated_share", "zero_variance_share"),
    "stale": ("reward_mean", "score", "ratio_max", "logprob_gap_mean"),
}
#: Drawn in grey next to a sick run: the healthy one, or the one that differs in nothing but the cause.
HEALTHY = "healthy"
BESIDE: Mapping[str, str] = {"stale": "fresh"}
WIDTH, HEIGHT, MARGIN, HEAD = 260, 150, 40, 24
STYLE = """<style>
svg{--ink:#24292f;--soft:#6e7781;--line:#d0d7de;--fill:#f6f8fa;--blue:#0969da;--good:#1a7f37;--bad:#cf222e;--warm:#9a6700}
@media (prefers-color-scheme:dark){svg{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--fill:#151b23;--blue:#4493f8;--good:#3fb950;--bad:#f85149;--warm:#d29922}}
</style>"""

Point = tuple[float, float]
Curves = Mapping[str, Sequence[Point]]


def keep(name: str, run_dir: Path) -> None:
    """Write the columns of a run that are drawn to ``NAME.csv``: one row per update, with a score where there is one."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["topic"] == "metrics":
            row = rows.setdefault(record["update"], {})
            row.update({column: record[column] for column in PANELS if record.get(column) is not None})
        elif record["topic"] == "eval":
            rows.setdefault(record["update"], {})["score"] = record["score"]["value"]
    with (FOLDER / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["update", *PANELS], lineterminator="\n")
        writer.writeheader()
        for update, row in sorted(rows.items()):
            writer.writerow({"update": update, **{key: f"{value:.4g}" for key, value in row.items()}})


def read(name: str) -> Curves:
    """Return column -> its points (update, value); an update without a value has none."""
    with (FOLDER / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        column: [(float(row["update"]), float(row[column])) for row in rows if row[column]]
        for column in PANELS
    }


def picture(name: str) -> str:
    """Return the SVG of a run's panels, two in a row, each with another run in grey."""
    run, other = read(name), {} if name == HEALTHY else read(BESIDE.get(name, HEALTHY))
    columns = PICTURES[name]
    parts = []
    for index, column in enumerate(columns):
        x, y = index % 2 * WIDTH, index // 2 * HEIGHT
        panel = _panel(PANELS[column], run[column], other.get(column, ()))
        parts.append(f'<g transform="translate({x} {y})">{panel}</g>')
    width, height = 2 * WIDTH, -(-len(columns) // 2) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="system-ui, sans-serif" font-size="12">{STYLE}\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, points: Sequence[Point], others: Sequence[Point]) -> str:
    last = max(x for x, _ in points)
    seen = [*points, *(point for point in others if point[0] <= last)]
    low, high = min(0.0, *(y for _, y in seen)), max(y for _, y in seen) or 1.0
    left, right, top, bottom = MARGIN, WIDTH - 12, HEAD, HEIGHT - 22

    def place(point: Point) -> str:
        x = left + (right - left) * point[0] / last
        return f"{x:.1f},{bottom - (bottom - top) * (point[1] - low) / (high - low):.1f}"

    def line(curve: Sequence[Point], colour: str) -> str:
        path = " ".join(place(point) for point in curve if point[0] <= last)
        return f'<polyline points="{path}" fill="none" stroke="var(--{colour})" stroke-width="1.8"/>'

    def text(x: float, y: float, words: str, anchor: str, colour: str = "soft") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="var(--{colour})">{escape(words)}</text>'

    return "".join(
        [
            text(left, 14, title, "start", "ink"),
            f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="var(--line)"/>',
            text(left - 4, top + 5, f"{high:.3g}", "end"),
            text(left - 4, bottom, f"{low:.3g}", "end"),
            text(right, HEIGHT - 8, f"update {last:.0f}", "end"),
            line(others, "soft") if others else "",
            line(points, "blue"),
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Keep the numbers of one run, or draw all pictures."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    command.add_argument("run", nargs="*", metavar="NAME RUN_DIR")
    run = command.parse_args(arguments).run
    if len(run) == 2:
        keep(run[0], Path(run[1]))
    elif run:
        command.error("give NAME and RUN_DIR, or neither")
    else:
        for name in PICTURES:
            (FOLDER / f"{name}.svg").write_text(picture(name))


if __name__ == "__main__":
    main(sys.argv[1:])
