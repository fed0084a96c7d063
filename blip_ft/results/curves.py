"""Training curves as an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

CIDER_PANEL = "CIDEr-D x 100"  # at most 1000

MEASURED = ("metrics, %", CIDER_PANEL)  # panels of evaluation scores

IN_BATCH = "in_batch_accuracy"  # measured in training, drawn in the same panel

# full names of the numbers of an evaluation that are not scores; an answer type may have one of these as its name
NOT_SCORES = frozenset(
    ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
    + ("unreadable_images",)
)


def draw_curves(log_history: Sequence[dict[str, Any]], columns: int = 2) -> bytes | None:
    """PNG of loss, metrics, learning rate and gradient norm by step; None if nothing is logged yet.

    log_history: as in trainer_state.json; `before_training_` numbers are drawn as part of the `eval_` curves.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {
        name: {} for name in ("loss", "metrics, %", CIDER_PANEL, "learning rate", "gradient norm")
    }
    for entry in log_history:
        for name, value in entry.items():
            panel = panel_of(name)
            if panel and isinstance(value, (int, float)):
                name = name.removeprefix("before_training_").removeprefix("eval_") if panel in MEASURED else name
                name = name.replace("before_training_", "eval_")
                lines[panel].setdefault(name, []).append((entry["step"], value))
    lines = {panel: series for panel, series in lines.items() if series}
    if not lines:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second, which would slow down --help
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    last = max(step for series in lines.values() for points in series.values() for step, _ in points)
    columns = min(columns, len(lines))
    rows = -(-len(lines) // columns)
    # pyplot would keep global state and may need a display
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (panel, series) in enumerate(lines.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for name, points in sorted(series.items(), key=lambda item: item[0].startswith("eval_")):
            steps, values = zip(*sorted(points), strict=True)
            # dotted, because nothing is known between two evaluations
            is_measured = (panel in MEASURED and name != IN_BATCH) or name.startswith("eval_")
            axes.plot(
                *(steps, values),
                linestyle=":" if is_measured else "-",
                marker="o" if is_measured or len(points) < 20 else None,
                markersize=3,
                linewidth=1.4,
                label=name,
            )
        axes.set_title(panel, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def is_score(metric: str) -> bool:
    """Whether a number of an evaluation, named without `eval_`, is a score; loss and speed are not."""
    return metric not in NOT_SCORES and not metric.startswith("mem_")  # mem_: with skip_memory_metrics false


def panel_of(name: str) -> str | None:
    """The panel that shows a logged number; None if it is not drawn."""
    metric = name.removeprefix("before_training_").removeprefix("eval_")
    if name in ("loss", "loss_itc", "loss_itm") or (metric != name and metric == "loss"):
        return "loss"
    if name == IN_BATCH:
        return MEASURED[0]
    if name in ("learning_rate", "grad_norm"):
        return {"learning_rate": "learning rate", "grad_norm": "gradient norm"}[name]
    # retrieval has a dozen recalls; the cosine-only ones and recall@5 are only in all_results.json
    is_left_out = metric.startswith("itc_") or metric in ("text_recall@5", "image_recall@5")
    if metric == name or is_left_out or not is_score(metric):
        return None
    return CIDER_PANEL if metric == "cider" else "metrics, %"
