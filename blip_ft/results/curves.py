"""The curves of training as an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

CIDER_PANEL = "CIDEr-D x 100"  # goes up to 1000

MEASURED = ("metrics, %", CIDER_PANEL)  # panels of what an evaluation gives

IN_BATCH = "in_batch_accuracy"  # of training, drawn beside them

# what an evaluation gives beside scores, each by its whole name: a score may end in the name of an answer type
NOT_SCORES = frozenset(
    ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
    + ("unreadable_images",)
)


def draw_curves(log_history: Sequence[dict[str, Any]], columns: int = 2) -> bytes | None:
    """PNG of loss, metrics, learning rate and gradient norm over steps; None where nothing is logged yet.

    log_history: as in trainer_state.json; what `before_training_` names is drawn with `eval_`, at its step.
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second, which --help need not wait for
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    last = max(step for series in lines.values() for points in series.values() for step, _ in points)
    columns = min(columns, len(lines))
    rows = -(-len(lines) // columns)
    # not pyplot: it keeps global state, and may want a display
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (panel, series) in enumerate(lines.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for name, points in sorted(series.items(), key=lambda item: item[0].startswith("eval_")):
            steps, values = zip(*sorted(points), strict=True)
            # between two evaluations nothing is known
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
    """Whether a number of an evaluation, named without `eval_`, says how right the model is; not its loss or speed."""
    return metric not in NOT_SCORES and not metric.startswith("mem_")  # mem_: of skip_memory_metrics


def panel_of(name: str) -> str | None:
    metric = name.removeprefix("before_training_").removeprefix("eval_")
    if name in ("loss", "loss_itc", "loss_itm") or (metric != name and metric == "loss"):
        return "loss"
    if name == IN_BATCH:
        return MEASURED[0]
    if name in ("learning_rate", "grad_norm"):
        return {"learning_rate": "learning rate", "grad_norm": "gradient norm"}[name]
    # retrieval has a dozen recalls: those by cosine alone and at 5 are left to all_results.json
    is_left_out = metric.startswith("itc_") or metric in ("text_recall@5", "image_recall@5")
    if metric == name or is_left_out or not is_score(metric):
        return None
    return CIDER_PANEL if metric == "cider" else "metrics, %"
