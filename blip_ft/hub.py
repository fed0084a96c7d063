"""The model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData


def write_model_card(
    folder: Path,
    task: str,
    stock_class: str,
    base_model: str | None,
    dataset: str,
    metrics: dict[str, float],
    is_adapter: bool,
    settings: dict[str, object],
) -> None:
    """README.md with the Hub's front matter: what it is, how it was trained, what it reached, how to load it.

    Args:
        task: the Hub's pipeline tag, e.g. visual-question-answering.
        base_model: Hub id; None for a local checkpoint or new weights, which the Hub would reject.
        metrics: name -> value in percent.
    """
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        base_model=base_model,
        base_model_relation="adapter" if is_adapter and base_model else None,
        tags=["blip"],
        model_name=folder.resolve().name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="custom",
                dataset_name=dataset,
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(value, 2),
            )
            for name, value in metrics.items()
        ],
    )
    results = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    values = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    loading = (
        f'base = {stock_class}.from_pretrained("{base_model or "BASE"}")\n'
        'model = PeftModel.from_pretrained(base, "THIS")'
        if is_adapter
        else f'model = {stock_class}.from_pretrained("THIS")'
    )
    base = base_model or "a local or new checkpoint"
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n"
        f"# {folder.resolve().name}\n\nBLIP ({task}) fine-tuned from {base} on {dataset}.\n\n"
        f"| held-out metric | percent |\n|---|---|\n{results}\n\n"
        f"## Use\n\n```python\nfrom transformers import {stock_class}, BlipProcessor\n"
        + ("from peft import PeftModel\n" if is_adapter else "")
        + f'{loading}\nprocessor = BlipProcessor.from_pretrained("THIS")\n```\n\n'
        f"## Training\n\n| argument | value |\n|---|---|\n{values}\n"
    )
    card.save(folder / "README.md")
