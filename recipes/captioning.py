"""Fine-tune BLIP, BLIP-2 or InstructBLIP to write captions.

    accelerate launch --quiet recipes/captioning.py
        trains a small new model on built-in images of colored shapes, in a few minutes on a CPU
    accelerate launch --quiet recipes/captioning.py --dataset_name FOLDER
        trains Salesforce/blip-image-captioning-base on a folder with metadata.jsonl (file_name, caption)
    accelerate launch --quiet recipes/captioning.py --config recipes/configs/captioning_base.yaml --dataset_name FILE
        reads the YAML first; flags override it

The loss is that of the originals: the mean over the tokens of the captions, without the prompt (models/blip.py of BLIP,
models/blip2_models of LAVIS).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.hf_argparser import HfArg

from blip_ft.arguments import BlipTrainingArguments, CaptioningArguments, DataArguments, ModelArguments, PeftArguments
from blip_ft.cli import parse, start_recipe
from blip_ft.data.augmentation import build_augmentation
from blip_ft.data.collators import CaptionCollator, ImageCollator
from blip_ft.data.loading import load_splits
from blip_ft.metrics.captions import CaptionScores, caption_exact_match, caption_rouge_l
from blip_ft.metrics.vqa import most_frequent_answer
from blip_ft.modeling import inference
from blip_ft.training.notes import Baseline
from blip_ft.training.run import run
from blip_ft.training.setup import load_for_training, prepare_run
from blip_ft.training.trainer import BlipTrainer


@dataclass
class Model(ModelArguments):
    model_name_or_path: str = "Salesforce/blip-image-captioning-base"


@dataclass
class Data(DataArguments):
    without_effect = dict.fromkeys(
        ("question_column", "answer_column"), "Leave it out: captioning reads captions. Use --caption_column."
    )


@dataclass
class Training(BlipTrainingArguments):
    metrics = ("cider", "bleu", "rouge_l", "exact_match")
    # learning rate, epochs, warmup, beams and lengths depend on the model: blip_ft/arguments/families.py. A value here
    # wins, e.g. `learning_rate: float = 1e-5`
    load_best_model_at_end: bool = True  # train_caption.py: the best epoch, there by CIDEr + BLEU-4
    per_device_train_batch_size: int = HfArg(default=32, help="Training captions per device and batch.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Evaluation images per device and batch.")


def main() -> None:
    model_args, data_args, caption_args, peft_args, training_args = args = parse(
        *(Model, Data, CaptioningArguments, PeftArguments, Training),
        demo_config=Path(__file__).parent / "configs" / "captioning_demo.yaml",
    )
    setup = prepare_run("conditional_generation", *args)
    train_rows, eval_rows, test_rows = load_splits("captions", data_args, setup.bad_rows_file, training_args.seed)
    model, processor, run_settings = load_for_training(setup, train_rows, eval_rows)
    generation = setup.texts.generation(
        training_args.generation_max_length,
        training_args.generation_num_beams,
        min_length=caption_args.generation_min_length,
        repetition_penalty=caption_args.repetition_penalty,
    )

    def predict(model, batch, positions):
        texts, probabilities = inference.caption(model, setup.texts, batch["pixel_values"], generation)
        return [
            {"prediction": text, "probability": probability}
            for text, probability in zip(texts, probabilities, strict=True)
        ]

    trainer = BlipTrainer(
        model,
        training_args,
        data_collator=CaptionCollator(
            processor,
            caption_args.max_caption_tokens,
            caption_args.clean_captions,
            texts=setup.texts,
            augmentation=build_augmentation(data_args, training_args),
        ),
        eval_collator=ImageCollator(processor),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        evaluate_rows=lambda rows, collect: evaluate(rows, collect(predict, "Writing captions")),
        predict=predict,
        describe=describe,
        group=data_args.group_questions is not False,
        run_settings=run_settings,
    )
    baseline = Baseline("the most frequent training caption, for every image", partial(score_guesses, train_rows))
    run(trainer, setup, {"prompt": setup.texts.prompt}, baseline, test_rows)


def evaluate(rows, results):
    """Add ROUGE-L to the result of each row. Returns: results, and scores in percent."""
    for result, captions in zip(results, rows["captions"][:], strict=True):
        if result:
            result["rouge_l"] = caption_rouge_l(result["prediction"], captions)
    return results, score(rows, [result["prediction"] if result else "" for result in results])


def score(rows, texts):
    references = rows["captions"][:]
    scores = CaptionScores().compute(predictions=texts, references=references)
    return {**scores, "exact_match": caption_exact_match(texts, references)}


def score_guesses(train_rows, rows):
    """Scores of the same caption for every image."""
    return score(rows, [most_frequent_answer(train_rows.captions())] * len(rows))


def describe(row, result):
    return f"{row['captions'][0]} | predicted: {result['prediction']}"


if __name__ == "__main__":
    start_recipe(main)
