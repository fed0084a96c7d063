"""Fine-tune BLIP to find the image of a text and the text of an image.

    accelerate launch --quiet recipes/retrieval.py
        trains a small new model on built-in images of colored shapes, in a few minutes on a CPU
    accelerate launch --quiet recipes/retrieval.py --dataset_name FOLDER
        trains Salesforce/blip-itm-base-coco on a folder with metadata.jsonl (file_name, caption)
    accelerate launch --quiet recipes/retrieval.py --config recipes/configs/retrieval_base.yaml --dataset_name FILE
        reads the YAML first; flags override it

The loss is that of the original BLIP: contrast with a momentum model and a queue, and matching with hard negatives
(models/blip_retrieval.py). Evaluation ranks by cosine, and then the best k_test again by the matching head.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers.hf_argparser import HfArg

from blip_ft.arguments import (
    WITHOUT_EFFECT,
    BlipTrainingArguments,
    DataArguments,
    ModelArguments,
    PeftArguments,
    RetrievalArguments,
)
from blip_ft.cli import parse, start_recipe
from blip_ft.data.augmentation import build_augmentation
from blip_ft.data.collators import ImageCollator, RetrievalCollator
from blip_ft.data.loading import load_splits
from blip_ft.data.texts import clean_caption, encode_texts
from blip_ft.metrics.baselines import chance_scores
from blip_ft.metrics.retrieval import retrieval_scores, same_caption
from blip_ft.modeling import inference
from blip_ft.modeling.blip.contrastive import Contrastive, require_memory_for_queue
from blip_ft.training.notes import Baseline
from blip_ft.training.run import run
from blip_ft.training.setup import load_for_training, prepare_run
from blip_ft.training.trainer import BlipTrainer


@dataclass
class Model(ModelArguments):
    without_effect = {"label_smoothing": "Leave it out: the retrieval losses have no label smoothing."}
    model_name_or_path: str = "Salesforce/blip-itm-base-coco"


@dataclass
class Data(DataArguments):
    without_effect = dict.fromkeys(
        ("question_column", "answer_column"), "Leave it out: retrieval reads captions. Use --caption_column."
    )


@dataclass
class Training(BlipTrainingArguments):
    without_effect = WITHOUT_EFFECT | dict.fromkeys(
        ("generation_max_length", "generation_num_beams"), "Leave it out: retrieval generates no text."
    )
    metrics = ("recall_mean", "text_recall", "image_recall", "itc_")
    # learning rate, epochs and warmup: blip_ft/arguments/families.py. A value here wins
    load_best_model_at_end: bool = True  # train_retrieval.py: the best epoch, by mean recall
    per_device_train_batch_size: int = HfArg(default=32, help="Training pairs per device and batch.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Evaluation images per device and batch.")


def main() -> None:
    model_args, data_args, retrieval_args, peft_args, training_args = args = parse(
        *(Model, Data, RetrievalArguments, PeftArguments, Training),
        demo_config=Path(__file__).parent / "configs" / "retrieval_demo.yaml",
    )
    if data_args.streaming:
        raise ValueError("streaming is for questions and captions: retrieval needs all captions of an image together.")
    setup = prepare_run("image_text_retrieval", *args)
    width = setup.meta_model.config.image_text_hidden_size
    require_memory_for_queue(retrieval_args.queue_size, width, training_args.device)
    train_rows, eval_rows, test_rows = load_splits("captions", data_args, setup.bad_rows_file, training_args.seed)
    model, processor, run_settings = load_for_training(setup, train_rows, eval_rows)
    model.config.itm_start_token = retrieval_args.itm_start_token

    trainer = BlipTrainer(
        model,
        training_args,
        data_collator=RetrievalCollator(
            processor,
            retrieval_args.max_caption_tokens,
            retrieval_args.clean_captions,
            augmentation=build_augmentation(data_args, training_args),
        ),
        eval_collator=ImageCollator(processor),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        evaluate_rows=lambda rows, collect: evaluate(rows, collect, processor.tokenizer, retrieval_args),
        group=bool(data_args.group_questions),
        run_settings=run_settings,
    )
    trainer.blip.contrastive = Contrastive(
        trainer.blip, retrieval_args.queue_size, retrieval_args.momentum, retrieval_args.alpha
    )
    notes = {
        "scores": "ranked by the matching head; itc_: by cosine only",
        "identical_captions": "count as correct for each of their images",
    }
    run(trainer, setup, notes, Baseline("chance, a random order", partial(score_chance, retrieval_args)), test_rows)


def evaluate(rows, collect, tokenizer, args):
    """Rank images and texts. Returns: the best text of each image, and recalls in percent."""
    captions, texts, owner, right = texts_of(rows, args)
    tokens = encode_texts(texts, tokenizer, args.max_caption_tokens)
    cosines, for_texts, for_images = inference.rank_pairs(collect, owner, **tokens, k=args.k_test)
    by_contrast = {f"itc_{name}": value for name, value in retrieval_scores(cosines, right).items()}
    results = [
        {"prediction": captions[best], "score": float(for_texts[row, best]), "accuracy": float(right[row, best])}
        if np.isfinite(for_texts[row, best])
        else None
        for row, best in enumerate(for_texts.argmax(1))
    ]
    return results, {**retrieval_scores(for_texts, right, for_images), **by_contrast}


def texts_of(rows, args):
    """All captions, as written and as the model reads them, the image of each, and which images each one describes."""
    by_image = rows["captions"][:]
    captions = [caption for own in by_image for caption in own]
    owner = np.repeat(np.arange(len(rows)), [len(own) for own in by_image])
    texts = [clean_caption(caption) for caption in captions] if args.clean_captions else captions
    return captions, texts, owner, same_caption(texts, owner)


def score_chance(args, rows):
    """Expected scores of a random order."""
    return chance_scores(texts_of(rows, args)[-1])


if __name__ == "__main__":
    start_recipe(main)
