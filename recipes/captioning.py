"""Fine-tune BLIP to write captions.

    accelerate launch --quiet recipes/captioning.py
        trains a small new model on built-in images of coloured shapes, in a few minutes on a CPU
    accelerate launch --quiet recipes/captioning.py --dataset_name FOLDER
        trains Salesforce/blip-image-captioning-base on a folder with metadata.jsonl (file_name, caption)
    accelerate launch --quiet recipes/captioning.py --config recipes/configs/captioning_base.yaml --dataset_name FILE
        reads a YAML first; flags override it

The loss is the original's: the mean over the captions' tokens, the prompt not counted (models/blip.py).
"""

from dataclasses import dataclass, field
from pathlib import Path

from blip_ft.arguments import BlipTrainingArguments, CaptioningArguments, DataArguments, ModelArguments, PeftArguments
from blip_ft.cli import parse, start_recipe
from blip_ft.data.collators import CaptionCollator, ImageCollator
from blip_ft.data.loading import load_splits
from blip_ft.data.texts import require_room_for_captions
from blip_ft.metrics.captions import CaptionScores, caption_exact_match, caption_rouge_l
from blip_ft.metrics.vqa import most_frequent_answer
from blip_ft.modeling import inference
from blip_ft.models import load_processor
from blip_ft.training.notes import Baseline
from blip_ft.training.run import run
from blip_ft.training.run_settings import settle_settings
from blip_ft.training.setup import build_meta_model, check_run, load_for_training, prepare_output_dir
from blip_ft.training.trainer import BlipTrainer

# ---- what to edit ----


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
    # configs/caption_coco.yaml of the original: 8 GPUs x 32 images, 1e-5, 5 epochs; 3 beams, 5 to 20 tokens
    learning_rate: float = 1e-5
    num_train_epochs: float = 5
    load_best_model_at_end: bool = True  # train_caption.py: of the epochs, there by CIDEr + BLEU-4
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Captions a step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Images at once."})
    generation_max_length: int = field(default=20, metadata={"help": "Tokens of a caption, prompt included."})
    generation_num_beams: int = field(default=3, metadata={"help": "Beams of generation. Original: 3."})


# ---- the run ----


def main() -> None:
    model_args, data_args, caption_args, peft_args, training_args = parse(
        *(Model, Data, CaptioningArguments, PeftArguments, Training),
        demo_config=Path(__file__).parent / "configs" / "captioning_demo.yaml",
    )
    data_args.check_streaming(training_args)
    checkpoint = prepare_output_dir(training_args, "captioning", peft_args)
    meta_model = build_meta_model("conditional_generation", model_args, peft_args, caption_args, training_args)
    require_room_for_captions(
        caption_args.prompt,
        load_processor(model_args.model_name_or_path, revision=model_args.model_revision).tokenizer,
        caption_args.generation_min_length,
        training_args.generation_max_length,
        caption_args.max_caption_tokens,
    )
    bad_rows_file = Path(training_args.output_dir) / "bad_rows.jsonl"
    train_rows, eval_rows, test_rows = load_splits("captions", data_args, bad_rows_file, training_args.seed)
    check_run(training_args, train_rows, meta_model)
    parts, rows = (model_args, data_args, caption_args, peft_args), {"train": train_rows, "eval": eval_rows}
    settings = settle_settings(checkpoint, training_args, parts, rows, meta_model)

    model, processor = load_for_training("conditional_generation", model_args, peft_args, training_args)

    def predict(model, batch, positions):
        texts, probabilities = inference.caption(
            model,
            processor.tokenizer,
            batch["pixel_values"],
            caption_args.prompt,
            max_length=training_args.generation_max_length,
            num_beams=training_args.generation_num_beams,
            min_length=caption_args.generation_min_length,
            repetition_penalty=caption_args.repetition_penalty,
        )
        return [
            {"prediction": text, "probability": probability}
            for text, probability in zip(texts, probabilities, strict=True)
        ]

    def score(rows, texts):
        references = rows["captions"][:]
        scores = CaptionScores().compute(predictions=texts, references=references)
        return {**scores, "exact_match": caption_exact_match(texts, references)}

    def baseline(rows):
        return score(rows, [most_frequent_answer(train_rows.captions())] * len(rows))

    def evaluate(rows, collect):
        results = collect(predict, "Writing captions")
        for result, captions in zip(results, rows["captions"][:], strict=True):
            if result:
                result["rouge_l"] = caption_rouge_l(result["prediction"], captions)
        return results, score(rows, [result["prediction"] if result else "" for result in results])

    def describe(row, result):
        return f"{row['captions'][0]} | predicted: {result['prediction']}"

    trainer = BlipTrainer(
        model,
        training_args,
        data_collator=CaptionCollator(
            processor, caption_args.prompt, caption_args.max_caption_tokens, caption_args.clean_captions
        ),
        eval_collator=ImageCollator(processor),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        evaluate_rows=evaluate,
        predict=predict,
        describe=describe,
        group=data_args.group_questions is not False,
        run_settings=settings,
    )
    run(
        trainer,
        checkpoint,
        "image-to-text",
        model_args,
        data_args,
        (caption_args, peft_args),
        baseline=Baseline("the most frequent training caption, for every image", baseline),
        test_rows=test_rows,
        result_notes={"prompt": caption_args.prompt},
    )


if __name__ == "__main__":
    start_recipe(main)
