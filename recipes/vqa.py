"""Fine-tune BLIP, BLIP-2 or InstructBLIP to answer questions about images.

    accelerate launch --quiet recipes/vqa.py
        trains a small new model on built-in images of colored shapes, in a few minutes on a CPU
    accelerate launch --quiet recipes/vqa.py --dataset_name FOLDER --eval_split test
        trains Salesforce/blip-vqa-base on a folder with metadata.jsonl (file_name, question, answer)
    accelerate launch --quiet recipes/vqa.py --config recipes/configs/vqa_base_lora.yaml --dataset_name FOLDER
        reads the YAML first; flags override it

The loss is that of the originals. BLIP: for each question, the sum over its answers of weight x summed token loss
(models/blip_vqa.py). BLIP-2 and InstructBLIP: the mean over the tokens of all answers (LAVIS models/blip2_models).
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers.hf_argparser import HfArg

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, PeftArguments, VqaArguments
from blip_ft.cli import parse, read_text, start_recipe
from blip_ft.data.augmentation import build_augmentation
from blip_ft.data.collators import VqaCollator
from blip_ft.data.loading import load_splits
from blip_ft.data.tables import values_of
from blip_ft.metrics.baselines import answer_without_images
from blip_ft.metrics.vqa import VqaAccuracy, answer_type, scoring_rule, vqa_accuracy
from blip_ft.modeling import inference
from blip_ft.training.notes import Baseline
from blip_ft.training.run import run
from blip_ft.training.setup import load_for_training, prepare_run
from blip_ft.training.trainer import BlipTrainer


@dataclass
class Model(ModelArguments):
    model_name_or_path: str = "Salesforce/blip-vqa-base"


@dataclass
class Data(DataArguments):
    without_effect = {"caption_column": "Leave it out: vqa reads questions and answers. Use --answer_column."}


@dataclass
class Training(BlipTrainingArguments):
    metrics = ("vqa_accuracy", "exact_match", "loss")
    # learning rate, epochs, warmup, beams and lengths depend on the model: blip_ft/arguments/families.py. A value here
    # wins, e.g. `learning_rate: float = 2e-5`
    # train_vqa.py takes the last epoch; answering the 214,000 questions of VQA v2 ten times would take hours
    load_best_model_at_end: bool = False
    per_device_train_batch_size: int = HfArg(default=16, help="Training questions per device and batch.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Evaluation questions per device and batch.")


def main() -> None:
    model_args, data_args, vqa_args, peft_args, training_args = args = parse(
        *(Model, Data, VqaArguments, PeftArguments, Training),
        demo_config=Path(__file__).parent / "configs" / "vqa_demo.yaml",
    )
    candidates = read_answer_list(vqa_args.answer_list)
    setup = prepare_run("vqa", *args)
    train_rows, eval_rows, test_rows = load_splits("vqa", data_args, setup.bad_rows_file, training_args.seed)
    model, processor, run_settings = load_for_training(setup, train_rows, eval_rows)
    model.config.question_start_token = vqa_args.question_start_token
    limits = (training_args.generation_max_length, training_args.generation_num_beams)
    generation = setup.texts.generation(*limits)

    def predict(model, batch, positions):
        read = inference.encode_questions(model, batch)
        losses = model.answer_losses(read, batch["labels"], batch["question_index"]) * batch["answer_weights"]
        losses = losses.new_zeros(len(batch["input_ids"])).index_add(0, batch["question_index"], losses).tolist()
        items = model.loss_items(batch).tolist()
        if candidates:
            answers = inference.rank(model, setup.texts, read, candidates, vqa_args.k_test, vqa_args.max_answer_tokens)
            probabilities = [None] * len(answers)
        else:
            answers, probabilities = inference.answer(model, setup.texts, read, generation)
        names = ("prediction", "probability", "loss", "loss_items")
        results = zip(answers, probabilities, losses, items, strict=True)
        return [dict(zip(names, values, strict=True)) for values in results]

    collator = VqaCollator(processor, vqa_args.max_question_tokens, vqa_args.max_answer_tokens, texts=setup.texts)
    trainer = BlipTrainer(
        model,
        training_args,
        data_collator=replace(collator, augmentation=build_augmentation(data_args, training_args)),
        eval_collator=collator,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        evaluate_rows=lambda rows, collect: evaluate(rows, collect(predict, "Answering")),
        predict=predict,
        describe=describe,
        group=data_args.group_questions is not False,
        run_settings=run_settings,
    )
    guess = "the most frequent training answer to the same words, without the image"
    baseline = Baseline(guess, partial(score_guesses, train_rows))
    run(trainer, setup, notes_of(eval_rows, test_rows), baseline, test_rows)


def evaluate(rows, results):
    """Add accuracy and answer type to the result of each row. Returns: results, and scores in percent."""
    scores, types = score(rows, [result["prediction"] if result else "" for result in results])
    for result, answers, kind in zip(results, rows["answers"][:], types, strict=True):
        if result:
            result |= {"accuracy": vqa_accuracy(result["prediction"], answers), "answer_type": kind}
    losses = [result["loss"] for result in results if result]
    items = [result.pop("loss_items") for result in results if result]  # of no use in predictions.jsonl
    return results, {**scores, "loss": sum(losses) / sum(items)} if losses else scores


def score(rows, texts):
    """Scores in percent, and the answer type of each row."""
    answers = rows["answers"][:]
    types = rows["answer_type"][:] if "answer_type" in rows.column_names else list(map(answer_type, answers))
    return VqaAccuracy().compute(predictions=texts, references=answers, answer_types=types), types


def score_guesses(train_rows, rows):
    """Scores of answers that are guessed from the questions, without the images."""
    questions, answers = (values_of(train_rows, column) for column in ("question", "answers"))
    return score(rows, answer_without_images(questions, answers, rows["question"][:]))[0]


def describe(row, result):
    return f"{row['question']} | answer: {row['answers'][0]} | predicted: {result['prediction']}"


def notes_of(eval_rows, test_rows):
    """For all_results.json: how the answers were scored."""
    return {
        "scoring_rule": scoring_rule(eval_rows["answers"][:]),
        **({"test_scoring_rule": scoring_rule(test_rows["answers"][:])} if test_rows else {}),
        "answer_types": "of the data" if "answer_type" in eval_rows.column_names else "by rule",
    }


def read_answer_list(path: str | None) -> list[str]:
    """The answers to choose from: a JSON list of strings, or one answer per line."""
    if path is None:
        return []
    text = read_text("answer_list", path)
    needed = "the file needs a JSON list of strings, or one answer per line"
    try:
        answers = json.loads(text) if text.lstrip().startswith(("[", "{")) else text.splitlines()
    except json.JSONDecodeError as error:
        raise ValueError(f"answer_list {path} is not valid JSON ({error}): {needed}.") from error
    if not isinstance(answers, list) or not all(isinstance(answer, (str, int, float)) for answer in answers):
        raise ValueError(f"answer_list {path} contains something other than answers: {needed}.")
    answers = [str(answer).strip() for answer in answers if str(answer).strip()]
    if not answers:
        raise ValueError(f"answer_list {path} contains no answers: {needed}.")
    return answers


if __name__ == "__main__":
    start_recipe(main)
