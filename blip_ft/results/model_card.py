"""The model card: README.md of a run, from the template model_card.md."""

from __future__ import annotations

import html
import json
import os
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

# part of a metric's name -> its id on the Hub, and its name in papers
METRICS = {
    "vqa_accuracy": ("accuracy", "VQA accuracy"),
    "exact_match": ("exact_match", "Exact match"),
    "cider": ("cider", "CIDEr-D"),
    "bleu": ("bleu", "BLEU-"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "recall": ("recall", "recall"),
}

# task -> its words, and its name on the Hub
TASKS = {
    "vqa": ("visual question answering", "visual-question-answering"),
    "conditional_generation": ("image captioning", "image-to-text"),
    "image_text_retrieval": ("image-text retrieval", None),
}

# model_type of a language model -> its name, and what its license allows
LANGUAGE_MODELS = {
    "opt": ("OPT", "the OPT-175B license, for non-commercial research only"),
    "llama": ("Vicuna, which is made from LLaMA", "the LLaMA license, for non-commercial use only"),
    "t5": ("Flan-T5", "Apache 2.0"),
}

# arguments that are not shown: of the Hub, and of folders on this machine
PRIVATE = ("hub_", "push_to_hub", "output_dir", "resume_from_checkpoint", "run_name")

PACKAGES = ("blip_ft", "transformers", "torch", "peft", "datasets", "huggingface_hub")


def build_model_card(
    repository: str,
    task: str,
    family: str,
    model_type: str,
    stock_class: str,
    is_adapter: bool,
    base_model: str | None,
    revision: str,
    dataset: str,
    dataset_ids: list[str],
    held_out: str,
    scores: dict[str, float],
    notes: dict[str, Any],
    facts: dict[str, Any],
    arguments: dict[str, Any],
    language_model: str | None = None,
    prompt: str = "",
    max_new_tokens: int | None = None,
    baselines: dict[str, float] | None = None,
    overlap: str = "",
    tested_on: str | None = None,
    test_overlap: str = "",
) -> ModelCard:
    """The README.md of a fine-tuned model: scores, usage, training, limits and license.

    Args:
        repository: id on the Hub, or a local name.
        task: a key of TASKS. family: name of the model's family. model_type: as in config.json.
        base_model, dataset_ids: Hub ids; None, or none, for local or new ones, which the Hub would reject.
        held_out: name of the evaluation data. tested_on: name of the test data of the final model, if any.
        scores: name -> value in percent, CIDEr-D x 100; eval_... on held_out, test_... on tested_on. The Hub shows
            the test scores if there are any. baselines: scores of a guess, for some of the names.
        overlap, test_overlap: sentences on which of their images were also trained on.
        notes: facts about the scores, e.g. the scoring rule.
        facts: about the run, in words. arguments: all of them; folders and the Hub's own are left out.
        language_model: a key of LANGUAGE_MODELS if the model has a language model of its own, with max_new_tokens.
        prompt: text before an answer, with {} for the question, or before a caption.
    """
    license, commit = _read_base(base_model, revision) if base_model else (None, None)
    template = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        _metadata(repository, task, model_type, is_adapter, base_model, license, dataset, dataset_ids, scores),
        template_str=template + "\n",  # jinja2 removes the last newline
        repository=repository,
        task=task,
        words=TASKS[task][0],
        family=family,
        language_model=language_model,
        language_model_license=LANGUAGE_MODELS.get(language_model),
        text=prompt.replace("{}", "what is it?").strip(),
        max_new_tokens=max_new_tokens,
        stock_class=stock_class,
        is_adapter=is_adapter,
        revision=revision,
        commit=commit,
        dataset=dataset,
        held_out=held_out,
        overlap=overlap,
        tested_on=tested_on,
        test_overlap=test_overlap,
        scores=scores,
        baselines=baselines,
        notes=notes,
        facts=facts,
        versions={package: version(package) for package in PACKAGES},
        **_settings(arguments),
        **{"plain": _plain, "dumps": json.dumps, "official_name": official_name},
    )


def _metadata(
    repository: str,
    task: str,
    model_type: str,
    is_adapter: bool,
    base_model: str | None,
    license: str | list[str] | None,
    dataset: str,
    dataset_ids: list[str],
    scores: dict[str, float],
) -> ModelCardData:
    """The YAML at the top of the card, which the Hub reads."""
    words, pipeline_tag = TASKS[task]
    tag = pipeline_tag or words.replace(" ", "-")
    tested = {name: value for name, value in scores.items() if name.startswith("test_")}
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=dataset_ids[0] if len(dataset_ids) == 1 else "custom",
            dataset_name=dataset,
            metric_type=official_name(name)[0],
            metric_name=official_name(name)[1],
            metric_value=round(value, 2),
        )
        for name, value in (tested or scores).items()
    ]
    return ModelCardData(
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_model else None,
        datasets=dataset_ids or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)),
        tags=[model_type, "blip_ft", *([] if pipeline_tag else [tag]), *(["lora"] if is_adapter else [])],
        model_name=Path(repository).name,
        eval_results=results,
    )


def official_name(metric: str) -> tuple[str, str]:
    """The Hub's id of a metric, and its name in words: eval_bleu4 is bleu, BLEU-4."""
    metric = metric.removeprefix("eval_").removeprefix("test_")
    part = next((part for part in METRICS if part in metric), metric)
    identifier, words = METRICS.get(part, (metric, metric))
    return identifier, metric.replace(part, words).replace("_", " ")


def _read_base(base_model: str, revision: str) -> tuple[str | list[str] | None, str | None]:
    """The license named in the card of the base model, and the commit of the revision; None if they are unknown."""
    try:
        path = Path(hf_hub_download(base_model, "README.md", revision=revision))
        license = ModelCard.load(path, ignore_metadata_errors=True).data.license
    # the card is missing or malformed, or there is no connection
    except (OSError, ValueError, yaml.YAMLError):
        return None, None
    return license, path.parent.name  # the cache names the folder of each commit after it


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of the arguments: each as YAML on one line, so a value cannot end the code block."""
    public = {key: value for key, value in arguments.items() if not key.startswith(PRIVATE)}
    shown = {key: _without_folders(value) for key, value in public.items()}
    return {
        "settings": {key: json.dumps(value, ensure_ascii=False) for key, value in shown.items()},
        "shortened": [key for key, value in public.items() if value != shown[key]],
    }


def _without_folders(value: Any) -> Any:
    """The value, with every path in it shortened to its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).name if is_path else value


def _plain(value: Any) -> str:
    """The value as text on one line, escaped so that Markdown and HTML show it unchanged."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
