"""report.html: scores, curves, confusions and samples on one page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from blip_ft.results.curves import draw_curves
from blip_ft.results.samples import BANDS, Sample, choose_samples

THUMBNAIL_PIXELS = 160

MAX_THUMBNAIL_BYTES = 3_500_000  # per page, which keeps it under 5 MB

MAX_CONFUSIONS = 15


def write_report(
    path: Path,
    title: str,
    scores: dict[str, float],
    samples: Sequence[Sample],
    open_image: Callable[[int], Image.Image],
    log_history: Sequence[dict[str, Any]] = (),
    baselines: dict[str, float] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write scores, curves, confusions and samples to one HTML file that needs no network.

    Wrong predictions come first, starting with those that the model was most certain of. Captions start with those
    farthest from their references.

    Args:
        scores: name -> number; recalls and accuracies in percent.
        baselines: the same scores for a guess that does not look at the images.
        notes: sentences that explain the numbers.
        samples: all predictions; the page shows some of them.
        open_image: returns the RGB image of a sample, given its position; called only for the samples on the page.
        log_history: as in trainer_state.json.
    """
    shown = choose_samples(samples)
    curves, narrow_curves = (draw_curves(log_history, columns) for columns in (2, 1))
    write_page(
        path,
        "report.html",
        *(samples, shown, open_image),
        title=title,
        scores=scores,
        baselines=baselines or {},
        notes=notes,
        curves=curves and _data_uri(curves, "png"),
        curves_on_a_phone=narrow_curves and _data_uri(narrow_curves, "png"),
        predictions=Counter(sample.prediction for sample in samples),
        confusions=_confusions(samples),
        verdicts=[name for name in ("wrong", "right") if any(samples[place].verdict == name for place in shown)],
        bands=[band for band in BANDS if any(samples[place].band == band for place in shown)],
    )


def write_page(
    path: Path,
    template: str,
    samples: Sequence[Sample],
    shown: Sequence[int],
    open_image: Callable[[int], Image.Image],
    **values: Any,
) -> None:
    """Write one HTML file that needs no network.

    Args:
        template: a file of this folder.
        shown: positions of the samples on the page, in their order.
        open_image: as in write_report.
        values: what else the template reads.
    """
    page = (
        _environment()
        .get_template(template)
        .render(
            cards=_cards(samples, shown, open_image),
            kinds=sorted({samples[place].kind for place in shown} - {""}),
            total=len(samples),
            **values,
        )
    )
    # JSON can contain a lone surrogate, which UTF-8 cannot encode
    path.write_text(page, encoding="utf-8", errors="replace")


@cache  # a recipe writes two reports, the first one in its dry run; each template is compiled once
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cards(
    samples: Sequence[Sample], shown: Sequence[int], open_image: Callable[[int], Image.Image]
) -> list[dict[str, Any]]:
    """The samples to show, each with its thumbnail, its references as (text, count), and its numbers in words."""
    cards, room = [], MAX_THUMBNAIL_BYTES
    for position in shown:
        sample, thumbnail = samples[position], ""
        if sample.readable and room > 0:
            thumbnail = _thumbnail(open_image(position))
            room -= len(thumbnail)
        references = Counter(sample.references).most_common(6)
        cards.append({"sample": sample, "thumbnail": thumbnail, "references": references, "facts": _facts(sample)})
    return cards


def _thumbnail(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=72)
    return _data_uri(file.getvalue(), "jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _confusions(samples: Sequence[Sample]) -> list[tuple[str, str, int]]:
    """(reference, prediction, count) of wrong samples, if a pair occurs at least twice."""
    pairs = Counter(
        (Counter(sample.references).most_common(1)[0][0], sample.prediction)
        for sample in samples
        if sample.verdict == "wrong" and sample.readable
    )
    return [(*pair, count) for pair, count in pairs.most_common(MAX_CONFUSIONS) if count > 1]


def _facts(sample: Sample) -> list[str]:
    facts = [] if sample.quality is None else [f"ROUGE-L {100 * sample.quality:.0f}"]
    if sample.score is not None:
        # the probability of a caption is a product over all its tokens, so it can be tiny
        percent = f"{sample.score:.1%}" if sample.score >= 0.001 else "under 0.1%"
        number = percent if sample.score_name == "probability" else f"{sample.score:.2f}"
        facts.append(f"{sample.score_name} {number}")
    if sample.accuracy is not None and 0 < sample.accuracy < 1:
        facts.append(f"accuracy {sample.accuracy:.0%}")
    return [*facts, sample.kind] if sample.kind else facts
