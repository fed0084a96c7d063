"""Write captions for images, and keep those that describe their image (CapFilt, section 3.3 of the BLIP paper).

    python recipes/bootstrap.py --captioner Salesforce/blip-image-captioning-base \\
        --filter Salesforce/blip-itm-base-coco --images FOLDER
        writes a caption for each image, and drops those that do not describe it
    python recipes/bootstrap.py --filter outputs/retrieval --dataset_name FOLDER_OR_FILE
        writes nothing, and filters the texts of the data
    accelerate launch --quiet recipes/bootstrap.py --captioner outputs/captioning --dataset_name FOLDER_OR_FILE \\
        --num_captions 3 --filter outputs/retrieval --keep_share 0.7
        filters the data's own texts and three new ones, and keeps the best 70 %

Writes metadata.jsonl, which recipes/captioning.py and retrieval.py train on, scores.jsonl with every text, report.html,
and bad_rows.jsonl if an image cannot be read. To resume a run that was stopped, or to apply another threshold, start
the same command again with its output_dir. The result is the same for any number of processes.
"""

import logging
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import BlipImageProcessor
from transformers.hf_argparser import HfArg

from blip_ft.arguments import Settings
from blip_ft.arguments.families import family_of, fill_defaults
from blip_ft.arguments.images import ImageArguments
from blip_ft.cli import parse, start_recipe
from blip_ft.data.images import encode_row_images, open_image
from blip_ft.data.loading import load_to_predict
from blip_ft.data.sources import list_images
from blip_ft.data.tables import write_lines
from blip_ft.data.text_formats import texts_of_checkpoint
from blip_ft.data.texts import clean_caption, encode_texts
from blip_ft.modeling import inference
from blip_ft.modeling.checkpoint_files import longest_text, require_positions
from blip_ft.modeling.registry import task_of_model
from blip_ft.models import load_model
from blip_ft.results import bootstrap
from blip_ft.results.parts import (
    Line,
    Predict,
    predict_batches,
    report_unreadable,
    require_readable,
    settings_of,
    share_of_batches,
)
from blip_ft.results.report import THUMBNAIL_PIXELS
from blip_ft.training.signals import explain_lost_worker

logger = logging.getLogger("blip_ft.bootstrap")

# settings that a resumed run may change
FREE = (
    *("output_dir", "dataloader_num_workers", "use_cpu", "threshold", "keep_share"),
    *("write_txt", "caption_extension", "overwrite"),
)

OF_CAPTIONER = (
    *("num_captions", "generation_num_beams", "generation_max_length", "generation_min_length"),
    *("repetition_penalty", "prompt", "seed"),
)

# pixels (num_images, 3, height, width) and image_ids -> captions of each image
Write = Callable[[torch.Tensor, list[str]], list[list[str]]]
# pixels, and texts of each image -> their probabilities
Match = Callable[[torch.Tensor, list[list[str]]], list[float]]


@dataclass
class Data(ImageArguments):
    """Which images, and the names of their columns."""

    without_effect = ImageArguments.without_effect | {
        **dict.fromkeys(
            ("questions_file", "annotations_file", "eval_questions_file", "eval_annotations_file"),
            "Give the images as --images or --dataset_name.",
        ),
        **dict.fromkeys(
            ("question_column", "answer_column"), "Leave it out: texts are captions. Use --caption_column."
        ),
    }
    help_texts = {
        "eval_split": "Split to read. Default: all rows.",
        "max_eval_samples": "Read the first N images only.",
    }


@dataclass
class Bootstrap(Settings):
    """How to write and filter texts, and what to write."""

    _argument_group_name = "Captions and filter"

    captioner: str | None = HfArg(
        default=None,
        help="Hub id or folder of a captioning checkpoint of BLIP, BLIP-2 or InstructBLIP. Default: no new texts.",
    )
    filter: str | None = HfArg(
        default=None, help="Hub id or folder of a retrieval checkpoint of BLIP. Default: all texts are kept."
    )
    output_dir: str | None = HfArg(
        default=None,
        help="Folder for results. Default: outputs/bootstrap, or the next free outputs/bootstrap-2, -3, ...",
    )
    threshold: float | None = HfArg(
        default=None,
        help="Keep texts with at least this score. In [0, 1]. Default: 0.5. Scores are not calibrated between "
        "checkpoints: look at report.html, or use keep_share.",
    )
    keep_share: float | None = HfArg(
        default=None,
        help="Keep this share of all texts, those with the highest scores, instead of using a threshold. In [0, 1]. It "
        "means the same for every filter, because scores are not calibrated between checkpoints.",
    )
    num_captions: int = HfArg(default=1, help="Texts to write for each image.")
    generation_num_beams: int | None = HfArg(
        default=None, help="Write by beam search with this number of beams. Default: draw texts, as the original."
    )
    generation_max_length: int | None = HfArg(
        default=None, help="Maximum tokens of a text. Default: that of the model's recipe."
    )
    generation_min_length: int | None = HfArg(
        default=None, help="Minimum tokens of a text. Default: that of the model's recipe."
    )
    repetition_penalty: float | None = HfArg(
        default=None, help="Above 1, make repeated words less likely. Default: 1.1; with beams that of the recipe."
    )
    prompt: str | None = HfArg(
        default=None, help="Text before every caption; it is not part of the result. Default: as in training."
    )
    seed: int = HfArg(default=42, help="Seed of the texts that are drawn. Each image has its own draws.")
    max_caption_tokens: int = HfArg(default=35, help="Truncate longer texts to filter.")
    clean_captions: bool = HfArg(default=True, help="Filter texts in lowercase, without most punctuation.")
    write_txt: bool = HfArg(
        default=False,
        help="Also write a text file beside each image that keeps a text. It has the one with the highest score.",
    )
    caption_extension: str = HfArg(default=".txt", help="Extension of these files.")
    overwrite: bool = HfArg(
        default=False, help="Replace text files that exist. Default: they stay as they are, and are counted."
    )
    allow_pickle: bool = HfArg(default=False, help="Also load weights that exist only as .bin.")
    per_device_eval_batch_size: int = HfArg(default=32, help="Images per device and batch.")
    dataloader_num_workers: int = HfArg(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        help="Processes that read and resize images. By default one per core, at most 4.",
    )
    bf16: bool = HfArg(default=False, help="Mixed precision in bfloat16.")
    use_cpu: bool = HfArg(default=False, help="Use the CPU even if there is a GPU.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.captioner and not self.filter:
            raise ValueError("Give --captioner to write texts, --filter to filter texts, or both.")
        if self.threshold is not None and self.keep_share is not None:
            raise ValueError("threshold and keep_share are mutually exclusive. Give one of them.")
        if self.generation_num_beams and self.num_captions > 1:
            raise ValueError(
                "Beam search writes one text for each image. Leave out --generation_num_beams to draw more."
            )
        if not re.fullmatch(r"\.\w+", self.caption_extension):
            raise ValueError(f"caption_extension must be like .txt, found {self.caption_extension!r}.")

    def unread(self) -> dict[str, str]:
        return {
            **dict.fromkeys(() if self.captioner else OF_CAPTIONER, "without --captioner"),
            **({"seed": "with beams"} if self.generation_num_beams else {}),
            **dict.fromkeys(
                () if self.filter else ("threshold", "keep_share", "max_caption_tokens", "clean_captions"),
                "without --filter",
            ),
            **dict.fromkeys(() if self.write_txt else ("caption_extension", "overwrite"), "without --write_txt"),
        }


def main() -> None:
    args, data_args = parse(Bootstrap, Data)
    folder = folder_of(data_args)
    rows, names, bad_rows = read_rows(data_args, folder)
    if not args.captioner and not any(rows["captions"][:]):
        raise ValueError("The data has no texts to filter. Give --captioner to write some, or check --caption_column.")
    files = text_files(args, names, folder)
    state, draws = PartialState(cpu=args.use_cpu), args.generation_num_beams is None
    writer, write = load_captioner(args, state.device) if args.captioner else (None, None)
    matcher, match = load_filter(args, state.device) if args.filter else (None, None)

    checkpoints = [name for name in (args.captioner, args.filter) if name]
    settings = settings_of((data_args, args), FREE, checkpoints, [rows[name][:] for name in ("image_id", "captions")])
    settings["texts are drawn"] = draws  # load_captioner has set the number of beams
    output, done = bootstrap.OUTPUT.settle_folder(args.output_dir, settings)
    batches = share_of_batches(len(rows), args.per_device_eval_batch_size, done)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=args.bf16), torch.no_grad():
        encode, predict = partial(collate, writer=writer, matcher=matcher), make_predict(rows, args, write, match)
        lines = predict_batches(rows, batches, encode, predict, args.dataloader_num_workers)
        with explain_lost_worker(lambda: "Start the same command again: it resumes."):
            bootstrap.OUTPUT.append_part(output, lines)
    state.wait_for_everyone()
    if state.is_main_process:
        parts = bootstrap.OUTPUT.read_parts(output)
        lines = [parts[position] for position in range(len(rows))]
        report_unreadable(rows, lines, bad_rows, output)
        write_results(output, args, rows, lines, names, folder, files)
        require_readable(rows, lines)


def folder_of(args: Data) -> Path:
    """The folder that the paths in metadata.jsonl are relative to."""
    if args.images:
        folders = [path if path.is_dir() else path.parent for path in map(Path, args.images)]
        return Path(os.path.commonpath(map(os.path.abspath, folders)))  # links stay: texts stand beside them
    path = Path(args.image_folder or args.dataset_name).expanduser()
    return (path.parent if path.is_file() else path).resolve()


def read_rows(args: Data, folder: Path) -> tuple[Dataset, dict[int, str] | None, list[Line]]:
    """A row for each image, the images' paths relative to folder, if they are files, and the rows that are bad."""
    if not args.images:
        rows, bad_rows = load_to_predict(args, "images", needs_split=True)
        return rows, bootstrap.relative_names(rows, folder), bad_rows
    rows = list_images(args.images)
    names = bootstrap.relative_names(rows, folder)
    # so that what is drawn does not depend on the folder in which the program is started
    ids = rows["image_id"][:] if names is None else list(names.values())
    rows = rows.select_columns("image").add_column("image_id", ids).add_column("captions", [[] for _ in ids])
    return rows, names, []


def text_files(args: Bootstrap, names: dict[int, str] | None, folder: Path) -> dict[int, Path]:
    """Position of an image -> the text file beside it."""
    if not args.write_txt or names is None:
        return {}
    files = bootstrap.text_files(names, folder, args.caption_extension)
    if taken := [] if args.overwrite else [file for file in files.values() if file.exists()]:
        logger.warning(
            "%d of %d images have a text file, e.g. %s. These files stay as they are; --overwrite replaces them.",
            *(len(taken), len(files), taken[0]),
        )
    return files


def load_captioner(args: Bootstrap, device: torch.device) -> tuple[BlipImageProcessor, Write]:
    """How the captioner reads images, and the function that writes texts. Sets the lengths that are None in args."""
    loaded = load_model(args.captioner, device=device, allow_pickle=args.allow_pickle, merge=True)
    model, processor = loaded["model"], loaded["processor"]
    family, task = family_of(model.config), task_of_model(model)
    # a checkpoint of BLIP-2 or InstructBLIP on the Hub names no task and has no prompt
    is_general = family.reads_prompts and getattr(model.config, "prompt", None) is None
    if task != "conditional_generation" and not is_general:
        raise ValueError(f"--captioner needs a captioning checkpoint; {args.captioner} is for {task}.")
    draws = args.generation_num_beams is None
    if draws:  # BLIP models/blip.py generate with sample=True; no beams are compared
        args.generation_num_beams = 1
        args.repetition_penalty = 1.1 if args.repetition_penalty is None else args.repetition_penalty
    fill_defaults(family, "conditional_generation", longest_text(model.config), args)
    require_positions(model.config, args)
    texts = texts_of_checkpoint(processor, model.config, "conditional_generation", args.prompt)
    texts.require_room_for_captions(None, args.generation_max_length, args.generation_min_length)

    def write(pixel_values: torch.Tensor, image_ids: list[str]) -> list[list[str]]:
        generation = texts.generation(
            *(args.generation_max_length, args.generation_num_beams),
            min_length=args.generation_min_length,
            repetition_penalty=args.repetition_penalty,
        )
        if draws:
            steps = args.generation_max_length
            generation["logits_processor"] = inference.sampling(args.seed, image_ids, args.num_captions, steps, device)
        return inference.caption_several(model, texts, pixel_values, generation, args.num_captions)

    return processor.image_processor, write


def load_filter(args: Bootstrap, device: torch.device) -> tuple[BlipImageProcessor, Match]:
    """How the filter reads images, and the function that gives each text its score."""
    loaded = load_model(args.filter, device=device, allow_pickle=args.allow_pickle, merge=True)
    model, processor = loaded["model"], loaded["processor"]
    if (task := task_of_model(model)) != "image_text_retrieval":
        raise ValueError(f"--filter needs a retrieval checkpoint of BLIP; {args.filter} is for {task}.")

    def match(pixel_values: torch.Tensor, texts: list[list[str]]) -> list[float]:
        flat = [clean_caption(text) if args.clean_captions else text for own in texts for text in own]
        if not flat:
            return []
        index = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
        tokens = encode_texts(flat, processor.tokenizer, args.max_caption_tokens)
        return inference.match_texts(model, pixel_values, **tokens, image_index=index)

    return processor.image_processor, match


def collate(
    rows: list[Line], writer: BlipImageProcessor | None, matcher: BlipImageProcessor | None
) -> dict[str, torch.Tensor]:
    """A batch of images as the captioner and the filter read them, and `readable`."""
    first, *others = (processor for processor in (writer, matcher) if processor)
    batch = encode_row_images(rows, first)
    batch = {"written": batch["pixel_values"], "matched": batch["pixel_values"], "readable": batch["readable"]}
    if others and (first.size, first.resample) != (matcher.size, matcher.resample):
        batch["matched"] = encode_row_images(rows, matcher)["pixel_values"]
    return batch


def make_predict(rows: Dataset, args: Bootstrap, write: Write | None, match: Match | None) -> Predict:
    """The function that gives each image of a batch its texts with their sources and scores."""
    own, ids = rows["captions"][:], rows["image_id"][:]

    def predict(batch: dict[str, torch.Tensor], positions: list[int]) -> list[Line]:
        image_ids = [ids[position] for position in positions]
        written = write(batch["written"], image_ids) if write else [[] for _ in positions]
        texts = [
            bootstrap.different_texts(own[position], new, args.clean_captions)
            for position, new in zip(positions, written, strict=True)
        ]
        scores = iter(match(batch["matched"], [[entry["text"] for entry in part] for part in texts]) if match else ())
        return [{"texts": [{**entry, "score": next(scores, None)} for entry in part]} for part in texts]

    return predict


def write_results(
    output: Path,
    args: Bootstrap,
    rows: Dataset,
    lines: list[Line],
    names: dict[int, str] | None,
    folder: Path,
    files: dict[int, Path],
) -> None:
    """Write images and texts, metadata.jsonl, report.html, and at the end scores.jsonl."""
    scores = bootstrap.build_scores(rows, lines, 0.5 if args.threshold is None else args.threshold, args.keep_share)
    kept = bootstrap.kept_by_image(scores)
    train_on = f"{shlex.quote(str(output / bootstrap.METADATA_FILE))} --image_folder {shlex.quote(str(folder))}"
    if names is None:
        names, train_on = bootstrap.write_images(rows, kept, output), shlex.quote(str(output))
        files = bootstrap.text_files(names, output, args.caption_extension)
    if args.write_txt:
        written, left = bootstrap.write_texts(files, scores, kept, args.overwrite)
        logger.info("%d text files written, %d left as they were (--overwrite replaces them).", written, left)
    write_lines(output / bootstrap.METADATA_FILE, bootstrap.build_metadata(rows, names, kept))
    bootstrap.write_report(
        output / "report.html",
        " and ".join(Path(name).name for name in (args.captioner, args.filter) if name),
        *(scores, len(rows)),
        lambda position: open_image(rows[position]["image"], THUMBNAIL_PIXELS),
    )
    num_kept = sum(line["kept"] for line in scores)
    bootstrap.OUTPUT.finish(
        output, ({name: value for name, value in line.items() if name != "position"} for line in scores)
    )
    logger.info(
        "%d of %d texts are kept, for %d of %d images: %s, report: %s",
        *(num_kept, len(scores), len(kept), len(rows), output / bootstrap.METADATA_FILE, output / "report.html"),
    )
    if kept:
        logger.info("To train on them: accelerate launch --quiet recipes/captioning.py --dataset_name %s", train_on)
    else:
        logger.warning("No text is kept. Lower --threshold, or use --keep_share.")


if __name__ == "__main__":
    start_recipe(main)
