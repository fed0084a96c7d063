"""report.html: scores, curves, confusions and samples on one page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from blip_ft.results.curves import draw_curves
from blip_ft.results.samples import BANDS, Sample, choose_samples

THUMBNAIL_PIXELS = 160

MAX_THUMBNAIL_BYTES = 3_500_000  # of a page, so that it stays under 5 MB

MAX_TEXT = 300  # signs of one string of a page

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
    """One file of HTML that needs no network: scores, curves, confusions and samples.

    The surest wrong ones come first, of captions the farthest from their references.

    Args:
        scores: name -> number; recalls and accuracies in percent.
        baselines: the same of a guess that learned nothing from images.
        notes: sentences that explain the numbers.
        samples: all predictions; the page shows a part of them.
        open_image: the RGB image of a sample by its position; called for those shown alone.
        log_history: as in trainer_state.json.
    """
    shown = choose_samples(samples)
    cards, room = [], MAX_THUMBNAIL_BYTES
    for position in shown:
        thumbnail = ""
        if samples[position].readable and room > 0:
            thumbnail = _thumbnail(open_image(position))
            room -= len(thumbnail)
        cards.append(_card(samples[position], thumbnail))
    kinds = sorted({samples[position].kind for position in shown} - {""})
    verdicts = [name for name in ("wrong", "right") if any(samples[position].verdict == name for position in shown)]
    bands = [band for band in BANDS if any(samples[position].band == band for position in shown)]
    order = "the farthest from their references" if bands else "the wrong ones, and the surest of them,"
    page = _PAGE.format(
        title=escape(title),
        scores="".join(_tile(name, value, (baselines or {}).get(name)) for name, value in scores.items()),
        notes="".join(f"<p class=note>{escape(note)}</p>" for note in notes),
        variety=_variety(samples),
        curves=_curves(log_history),
        confusions=_confusions(samples),
        filters="".join(
            [
                _buttons("verdict", verdicts),
                _buttons("kind", kinds),
                _buttons("band", bands),
                _buttons("order", ["nearest first"], "farthest first") if bands else "",
            ]
        ),
        shown=f"{len(shown):,} of {len(samples):,} predictions; {order} first.",
        cards="".join(cards),
    )
    # a lone surrogate, which JSON can bring in, is no UTF-8
    path.write_text(page, encoding="utf-8", errors="replace")


def _curves(log_history: Sequence[dict[str, Any]]) -> str:
    """Two drawings, one of them for a phone."""
    wide, narrow = (draw_curves(log_history, columns) for columns in (2, 1))
    if wide is None or narrow is None:
        return ""
    return (
        f'<h2>Training</h2><picture><source media="(max-width: 40rem)" srcset="{_data_uri(narrow, "png")}">'
        f'<img class="curves" alt="Curves of training" src="{_data_uri(wide, "png")}"></picture>'
    )


def _thumbnail(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=72)
    return _data_uri(file.getvalue(), "jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _text(text: str) -> str:
    return escape(text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…")


def _tile(name: str, value: float, baseline: float | None) -> str:
    beside = "" if baseline is None else f"<span>baseline {baseline:.2f}</span>"
    words = escape(name.removeprefix("eval_").replace("_", " "))
    return f"<div><b>{value:.2f}</b><span>{words}</span>{beside}</div>"


def _buttons(group: str, names: list[str], first: str = "all") -> str:
    """A row of choices; one name alone is none."""
    if len(names) < 2 and first == "all":
        return ""
    buttons = "".join(
        f'<button type="button" data-group="{group}" data-value="{escape(name)}" aria-pressed="{pressed}">'
        f"{escape(name) or first}</button>"
        for name, pressed in [("", "true"), *((name, "false") for name in names)]
    )
    return f'<div class="buttons" role="group" aria-label="{group}">{buttons}</div>'


def _variety(samples: Sequence[Sample]) -> str:
    if not samples:
        return "<p>There is no prediction.</p>"
    counts = Counter(sample.prediction for sample in samples)
    text, most = counts.most_common(1)[0]
    return (
        f"<p>Different predictions: {len(counts):,} of {len(samples):,} ({len(counts) / len(samples):.1%}). "
        f"The most frequent, <q dir=auto>{_text(text)}</q>, makes up {most / len(samples):.1%}.</p>"
    )


def _confusions(samples: Sequence[Sample]) -> str:
    """Reference and prediction of wrong samples, where a pair is seen twice or more."""
    pairs = Counter(
        (Counter(sample.references).most_common(1)[0][0], sample.prediction)
        for sample in samples
        if sample.verdict == "wrong" and sample.readable
    )
    rows = "".join(
        f"<tr><td dir=auto>{_text(reference)}</td><td dir=auto>{_text(prediction)}</td><td>{count}</td></tr>"
        for (reference, prediction), count in pairs.most_common(MAX_CONFUSIONS)
        if count > 1
    )
    if not rows:
        return ""
    head = "<tr><th>reference</th><th>predicted</th><th>times</th></tr>"
    return f"<h2>Most frequent confusions</h2><table>{head}{rows}</table>"


def _card(sample: Sample, thumbnail: str) -> str:
    missing = "no room for more images" if sample.readable else "image cannot be read"
    image = f'<img alt="" loading="lazy" src="{thumbnail}">' if thumbnail else f"<i>{missing}</i>"
    facts = [] if sample.quality is None else [f"ROUGE-L {100 * sample.quality:.0f}"]
    if sample.score is not None:
        # that of a caption is the product of all its words'
        percent = f"{sample.score:.1%}" if sample.score >= 0.001 else "under 0.1%"
        number = percent if sample.score_name == "probability" else f"{sample.score:.2f}"
        facts.append(f"{escape(sample.score_name)} {number}")
    if sample.accuracy is not None and 0 < sample.accuracy < 1:
        facts.append(f"accuracy {sample.accuracy:.0%}")
    if sample.kind:
        facts.append(_text(sample.kind))
    counts = Counter(sample.references).most_common()
    references = ", ".join(f"{_text(text)}{f' ×{count}' if count > 1 else ''}" for text, count in counts[:6])
    lines = [
        f"<p class=question dir=auto>{_text(sample.question)}</p>" if sample.question else "",
        f"<p class=prediction dir=auto>{_text(sample.prediction) or '(nothing)'}</p>",
        f"<p class=reference dir=auto>{references}</p>" if references else "",
        f"<p class=facts>{' · '.join(facts)}</p>" if facts else "",
    ]
    return (
        f'<article class="{sample.verdict}" data-verdict="{sample.verdict}" data-kind="{escape(sample.kind)}"'
        f' data-band="{sample.band}">'
        f"{image}<div>{''.join(lines)}</div></article>\n"
    )


# braces are doubled for format()
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --back: #f6f7f9; --card: #fff; --ink: #1c2024; --soft: #60646c; --line: #d9dce1;
  --right: #18794e; --wrong: #c62a2f; --unknown: #60646c; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #111315; --card: #1b1e21; --ink: #edeef0; --soft: #a0a6ad; --line: #34393e;
    --right: #4cc38a; --wrong: #ff8b8e; --unknown: #a0a6ad; }}
  img.curves {{ filter: invert(.9) hue-rotate(180deg); }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .7rem; }}
p {{ margin: .2rem 0; }}
.scores {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem;
  margin-bottom: 1rem; }}
.scores div, article, table {{ background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }}
.scores div {{ padding: .6rem .8rem; }}
.scores b, .scores span {{ display: block; }}
.scores b {{ font-size: 1.35rem; }}
.scores span, .facts, .note {{ color: var(--soft); font-size: .87rem; }}
img.curves {{ width: 100%; height: auto; border-radius: .5rem; }}
table {{ border-collapse: separate; border-spacing: 0; width: 100%; max-width: 40rem; }}
th, td {{ text-align: start; padding: .35rem .8rem; }}
td {{ border-top: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: 500; white-space: nowrap; }}
th:last-child, td:last-child {{ text-align: end; width: 5rem; }}
.buttons {{ display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0; }}
button {{ font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 1rem;
  padding: .3rem .9rem; cursor: pointer; max-width: 100%; }}
button[aria-pressed=true] {{ background: var(--ink); color: var(--back); border-color: var(--ink); }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .7rem;
  margin-top: .8rem; }}
article {{ display: flex; gap: .8rem; padding: .7rem; border-inline-start: 4px solid var(--unknown); min-width: 0; }}
article[hidden] {{ display: none; }}
article.right {{ border-inline-start-color: var(--right); }}
article.wrong {{ border-inline-start-color: var(--wrong); }}
article > div {{ min-width: 0; flex: 1; }}
article > img, article > i {{ width: 6.5rem; height: 6.5rem; flex: none; border-radius: .3rem; }}
article > img {{ object-fit: contain; }}
article > i {{ color: var(--soft); font-size: .8rem; border: 1px dashed var(--line); padding: .4rem; }}
.prediction {{ font-weight: 600; }}
.right .prediction {{ color: var(--right); }}
.wrong .prediction {{ color: var(--wrong); }}
.right .prediction::before {{ content: "✓ "; }}
.wrong .prediction::before {{ content: "✗ "; }}
.reference::before {{ content: "reference: "; color: var(--soft); }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="scores">{scores}</div>
{notes}
{variety}
{curves}
{confusions}
<h2>Predictions</h2>
<p class="note">{shown}</p>
{filters}
<p class="note" id="count" aria-live="polite"></p>
<div class="cards">
{cards}</div>
<script>
const chosen = {{}};
const cards = [...document.querySelectorAll("article")];
for (const button of document.querySelectorAll("button")) button.onclick = () => {{
  if (button.dataset.group === "order")
    for (const card of button.dataset.value ? [...cards].reverse() : cards) card.parentElement.append(card);
  else chosen[button.dataset.group] = button.dataset.value;
  for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
  for (const card of cards)
    card.hidden = Object.keys(chosen).some(group => chosen[group] && card.dataset[group] !== chosen[group]);
  document.getElementById("count").textContent = cards.filter(card => !card.hidden).length + " of these shown";
}};
</script>
</body>
</html>
"""
