"""The model card."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

# part of a metric's name -> its id on the Hub, and the name that papers give it
METRICS = {
    "vqa_accuracy": ("accuracy", "VQA accuracy"),
    "exact_match": ("exact_match", "Exact match"),
    "cider": ("cider", "CIDEr-D"),
    "bleu": ("bleu", "BLEU-"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "recall": ("recall", "recall"),
}

# class -> the task in words
TASKS = {
    "BlipForQuestionAnswering": "visual question answering",
    "BlipForConditionalGeneration": "image captioning",
    "BlipForImageTextRetrieval": "image-text retrieval",
}

STOCK_USE = {
    "BlipForQuestionAnswering": """\
inputs = processor(image, "what is it?", return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))""",
    "BlipForConditionalGeneration": """\
inputs = processor(image, {prompt}, return_tensors="pt")  # what every caption begins with
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))""",
    "BlipForImageTextRetrieval": """\
inputs = processor(image, "a cat asleep on a sofa", return_tensors="pt")
print(model(**inputs).itm_score.softmax(1)[0, 1].item())  # probability that they belong together
print(model(**inputs, use_itm_head=False)[0].item())  # cosine""",
}

OWN_USE = {
    "BlipForQuestionAnswering": """\
from blip_ft import generate_answer_blip, load_model

loaded = load_model({id})
print(generate_answer_blip(loaded["model"], loaded["processor"], "cat.jpg", ["what is it?", "is it asleep?"]))""",
}

LIMITS = {
    "BlipForQuestionAnswering": "Answers are short, in the manner of those it was trained on, and it answers questions "
    "that the image cannot answer too. Stock transformers (4.54 to 5.23) ignores the padding of questions: ask it "
    "one question at a time, or questions of equally many tokens.",
    "BlipForConditionalGeneration": "A caption may name things that are not in the image.",
    "BlipForImageTextRetrieval": "A score orders candidates; it is no probability that a text is true.",
}


def build_model_card(
    repository: str,
    task: str | None,
    stock_class: str,
    is_adapter: bool,
    base_model: str | None,
    revision: str,
    dataset: str,
    dataset_id: str | None,
    held_out: str,
    scores: dict[str, float],
    notes: dict[str, Any],
    facts: dict[str, Any],
    arguments: dict[str, Any],
    baselines: dict[str, float] | None = None,
    overlap: str = "",
    tested_on: str | None = None,
    test_overlap: str = "",
) -> ModelCard:
    """What it is, what it reached, how to use it, how it was trained, its limits and licence.

    Args:
        repository: id on the Hub, or a name to choose one from.
        task: the Hub's pipeline tag, e.g. visual-question-answering; None if it has none.
        base_model, dataset_id: Hub ids; None for what is local or new, which the Hub would reject.
        held_out: what was evaluated on, in words. tested_on: what the final model was evaluated on once, if at all.
        scores: name -> value in percent, of CIDEr-D x 100; eval_... of held_out, test_... of tested_on. The Hub's
            results are the latter where there are any. baselines: those of a guess, as far as there are.
        overlap, test_overlap: sentences on which images of the two were also trained on.
        notes: what belongs beside them, e.g. the scoring rule.
        facts: about the run, in words. arguments: all of them; folders and the Hub's own are left out.
    """
    name = _plain(Path(repository).name)
    licence, commit = _read_base(base_model, revision) if base_model else (None, None)
    words = TASKS[stock_class]
    tag = task or words.replace(" ", "-")
    by_prefix = {prefix: _with_prefix(scores, prefix) for prefix in ("eval_", "test_")}
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=dataset_id or "custom",
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric_words,
            metric_value=round(value, 2),
        )
        for (metric, metric_words), value in (
            (official_name(key), value) for key, value in (by_prefix["test_"] or by_prefix["eval_"]).items()
        )
    ]
    data = ModelCardData(
        license=licence,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model else None,
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        tags=["blip", "blip_ft", *([] if task else [tag]), *(["lora"] if is_adapter else [])],
        model_name=Path(repository).name,
        eval_results=results,
    )
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a local or new checkpoint"
    at_commit = f", commit {commit}" if commit else ""
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"BLIP for {words}, {'a LoRA adapter on' if is_adapter else 'fine-tuned from'} {origin}"
        f"{f' (revision {_plain(revision)}{at_commit})' if base_model else ''}. Data: {_plain(dataset)}.\n\n"
        "## Results\n\n"
        + f"On {_plain(held_out)}. {overlap} {_units(scores)}\n\n"
        + _results_table(by_prefix["eval_"], baselines or {})
        + (f"\nOn {_plain(tested_on)}, once, with the final model. {test_overlap}\n\n" if tested_on else "")
        + (_results_table(by_prefix["test_"], baselines or {}) if tested_on else "")
        + "".join(f"\n{_plain(key.replace('_', ' '))}: {_plain(value)}\n" for key, value in notes.items())
        + f"\n## Use\n\n{_usage(repository, stock_class, is_adapter, base_model, arguments)}\n"
        "## Training\n\n"
        + _table(("", ""), facts.items())
        + "\n<details><summary>All arguments, as a YAML file for --config</summary>\n\n"
        f"{_what_to_replace(arguments)}"
        f"```yaml\n{_settings(arguments)}\n```\n\n</details>\n\n"
        f"## Limits\n\n{LIMITS[stock_class]} It knows the images and the language of its data, with their biases; "
        "the results above say nothing of other data.\n\n"
        f"## Licence\n\n{_licence_in_words(licence, base_model)}\n\n"
        "## Versions\n\n"
        + ", ".join(
            f"{package} {version(package)}"
            for package in ("blip_ft", "transformers", "torch", "peft", "datasets", "huggingface_hub")
        )
        + "\n"
    )


def official_name(metric: str) -> tuple[str, str]:
    """The Hub's id of a metric of ours, and its name in words: eval_bleu4 is bleu, BLEU-4."""
    metric = metric.removeprefix("eval_").removeprefix("test_")
    part = next((part for part in METRICS if part in metric), metric)
    identifier, words = METRICS.get(part, (metric, metric))
    return identifier, metric.replace(part, words).replace("_", " ")


def _usage(
    repository: str, stock_class: str, is_adapter: bool, base_model: str | None, arguments: dict[str, Any]
) -> str:
    own_id, prompt = json.dumps(repository), json.dumps(arguments.get("prompt", "").strip())
    stock = [
        "from PIL import Image",
        *(["from peft import PeftModel"] if is_adapter else []),
        f"from transformers import {stock_class}, BlipProcessor",
        "",
        *(
            [
                f"base = {stock_class}.from_pretrained({json.dumps(base_model or 'BASE')})",
                f"model = PeftModel.from_pretrained(base, {own_id})",
            ]
            if is_adapter
            else [f"model = {stock_class}.from_pretrained({own_id})"]
        ),
        f"processor = BlipProcessor.from_pretrained({own_id})",
        'image = Image.open("cat.jpg").convert("RGB")',
        STOCK_USE[stock_class].replace("{prompt}", prompt),
    ]
    default = "from blip_ft import load_model\n\nloaded = load_model({id})  # model and processor, for the calls above"
    own = OWN_USE.get(stock_class, default).replace("{id}", own_id)
    lines = "\n".join(stock)
    return f"With transformers alone:\n\n```python\n{lines}\n```\n\nWith blip_ft:\n\n```python\n{own}\n```\n"


def _read_base(base_model: str, revision: str) -> tuple[str | list[str] | None, str | None]:
    """The licence that the base's own card names, and the commit of the revision; None where they cannot be had."""
    try:
        path = Path(hf_hub_download(base_model, "README.md", revision=revision))
        licence = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):  # no card, a malformed one, or no Hub and nothing in the cache
        return None, None
    return licence, path.parent.name  # the cache keeps each commit in a folder of its name


def _licence_in_words(licence: str | list[str] | None, base_model: str | None) -> str:
    if licence:
        return f"{_plain(licence)}, the licence of {base_model}. The data may add terms of their own."
    return "Not known: look up the licence of the checkpoint that was fine-tuned, and the terms of the data."


def _settings(arguments: dict[str, Any]) -> str:
    """`key: value` lines, each of them YAML on one line, so that no value can end the block it stands in."""
    return "\n".join(
        f"{key}: {json.dumps(_without_folders(value), ensure_ascii=False)}" for key, value in _public(arguments).items()
    )


def _what_to_replace(arguments: dict[str, Any]) -> str:
    """Words on the settings of which only the last part of a path is shown."""
    names = [name for name, value in _public(arguments).items() if value != _without_folders(value)]
    if not names:
        return ""
    listed = ", ".join(f"`{name}`" for name in names)
    return f"Of {listed} only the last part of the path is shown: put your own paths there before you run it.\n\n"


def _public(arguments: dict[str, Any]) -> dict[str, Any]:
    private = ("hub_", "push_to_hub", "output_dir", "resume_from_checkpoint", "run_name")
    return {key: value for key, value in arguments.items() if not key.startswith(private)}


def _without_folders(value: Any) -> Any:
    """value, with the last part alone of every path in it."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).name if is_path else value


def _units(scores: dict[str, float]) -> str:
    if "eval_cider" not in scores:
        return "Percent."
    return "BLEU and ROUGE-L are x 100, CIDEr-D is x 100 and has no bound of 100; exact match is in percent."


def _results_table(scores: dict[str, float], baselines: dict[str, float]) -> str:
    head = ("metric", "value", "baseline")[: 3 if baselines else 2]
    rows = []
    for name, value in scores.items():
        baseline = f"{baselines[name]:.2f}" if name in baselines else ""
        rows.append((official_name(name)[1], f"{value:.2f}", baseline)[: len(head)])
    return _table(head, rows)


def _with_prefix(scores: dict[str, float], prefix: str) -> dict[str, float]:
    return {name: value for name, value in scores.items() if name.startswith(prefix)}


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_plain, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(value: Any) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
