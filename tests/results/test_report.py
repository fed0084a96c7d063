"""The page of predictions, the curves, and what trackers are given."""

import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from datasets import Dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

from blip_ft.results.curves import draw_curves, panel_of
from blip_ft.results.report import write_report
from blip_ft.results.samples import Sample, choose_rows, choose_samples
from blip_ft.training.callbacks import TrackerCallback
from blip_ft.training.notes import beside_baseline, scores_of
from blip_ft.training.trainer import BlipTrainer

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onclick='alert(1)",
    "</script></style></title><!--",
    "{title} {0} %s &amp;",
    "🙂 שלום ‮ gnol",
    "\ud800 half of a pair",
]


class Page(HTMLParser):
    """Tags with their attributes, and all text outside script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture
def write(tmp_path):
    def write(samples, title="a run", history=(), size=(40, 30)):
        path = tmp_path / "report.html"
        noise = Image.effect_noise(size, 90).convert("RGB")
        write_report(path, title, {"eval_vqa_accuracy": 81.25}, samples, lambda position: noise, history)
        return path

    return write


def test_hostile_strings_are_text_and_nothing_else(write):
    plain = Page(write([Sample("a", "b", ["c"], 0.0, 0.5, kind="d")] * 7).read_text())
    samples = [Sample(text, text, [text, text], 0.0, 0.5, kind="x" + text) for text in HOSTILE]
    page = Page(write(samples, title=HOSTILE[0]).read_text(encoding="utf-8"))
    for text in HOSTILE:
        assert text.replace("\ud800", "?") in page.text
    allowed = {tag for tag, _ in plain.tags} | {"button"}  # several kinds have buttons
    assert {tag for tag, _ in page.tags} <= allowed
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    kinds = {attributes["data-kind"] for tag, attributes in page.tags if tag == "article"}
    assert kinds == {"x" + text.replace("\ud800", "?") for text in HOSTILE}


def test_page_is_one_file_that_asks_for_nothing(write):
    html = write([Sample("a", references=["b"], accuracy=0.0)], history=[{"step": 1, "loss": 2.0}]).read_text()
    sources = re.findall(r"""(?:src|href|srcset)=["']?([^"'>]+)""", html)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http" not in html and "url(" not in html
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_page_of_many_large_images_and_long_texts_stays_under_five_megabytes(write):
    samples = [Sample("long " * 1000, "why " * 1000, ["so"] * 10, 0.0, 0.9) for _ in range(1000)]
    path = write(samples, history=[{"step": step, "loss": 1.0} for step in range(500)], size=(1200, 1200))
    assert path.stat().st_size < 5_000_000
    articles = [tag for tag, _ in Page(path.read_text()).tags if tag == "article"]
    assert len(articles) == 200


def test_surest_wrong_ones_come_first_and_right_ones_are_spread():
    wrong = [Sample("w", accuracy=0.3, score=score) for score in (0.2, 0.9, None, 0.5)]
    assert choose_samples(wrong) == [1, 3, 0, 2]
    right = [Sample("r", accuracy=1.0, score=number / 1000) for number in range(1000)]
    chosen = choose_samples(wrong + right)
    assert chosen[:4] == [1, 3, 0, 2] and len(chosen) == 200
    # 196 of 1,000: every fifth or so
    gaps = {b - a for a, b in zip(chosen[4:], chosen[5:], strict=False)}
    assert chosen[4] == 4 and gaps == {5, 6}
    many = [Sample("w", accuracy=0.0, score=0.5)] * 300
    assert len(choose_samples(many)) == 200
    verdicts = [(many + right)[position].verdict for position in choose_samples(many + right)]
    assert verdicts == ["wrong"] * 120 + ["right"] * 80


def test_captions_are_neither_right_nor_wrong_and_go_by_their_score(write):
    captions = [Sample("a", references=["b"], quality=number / 999, score=1e-9) for number in range(1000)]
    chosen = choose_samples(captions)
    assert len(chosen) == 200 and chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] == 995
    unread = Sample("", references=["b"], quality=0.0, readable=False)
    html = write([*captions, unread, Sample("c", references=["c"], quality=1.0)]).read_text()
    page = Page(html)
    articles = [attributes for tag, attributes in page.tags if tag == "article"]
    assert {attributes["data-verdict"] for attributes in articles} == {"unknown"}
    bands = [f"ROUGE-L {least} to {least + 25}" for least in (0, 25, 50, 75)]
    assert list(dict.fromkeys(attributes["data-band"] for attributes in articles)) == bands
    buttons = [(attributes["data-group"], attributes["data-value"]) for tag, attributes in page.tags if tag == "button"]
    assert buttons == [("band", ""), *(("band", band) for band in bands), ("order", ""), ("order", "nearest first")]
    assert "farthest from their references first" in page.text and "confusions" not in page.text
    assert "ROUGE-L 0 · probability under 0.1%" in page.text and "accuracy" not in page.text.replace("vqa accuracy", "")


def test_baseline_stands_beside_its_score_and_notes_below(tmp_path):
    path = tmp_path / "report.html"
    scores, note = {"eval_exact_match": 81.25, "eval_cider": 3.0}, "The loss <cannot> fall to 0."
    write_report(path, "run", scores, [], lambda position: None, baselines={"eval_exact_match": 40.5}, notes=[note])
    text = Page(path.read_text()).text
    assert "81.25exact matchbaseline 40.50" in text and "3.00cider\n" in text and note in text


def test_confusions_are_counted_and_a_model_that_always_says_the_same_is_seen(write):
    samples = [Sample("yes", references=["no"], accuracy=0.0)] * 3
    samples += [Sample("yes", references=["two"], accuracy=0.0), Sample("yes", references=["yes"], accuracy=1.0)]
    text = " ".join(Page(write(samples).read_text()).text.split())
    assert "Different predictions: 1 of 5 (20.0%). The most frequent, yes, makes up 100.0%." in text
    assert "timesnoyes3 Predictions" in text  # no row for a pair seen once, none for what is right


def test_unreadable_image_is_said_and_not_opened(write):
    page = Page(write([Sample("", references=["no"], accuracy=0.0, readable=False)]).read_text())
    assert "image cannot be read" in page.text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_curves_have_a_panel_for_each_kind_of_number():
    history = [{"step": 0, "before_training_vqa_accuracy": 1.0, "before_training_runtime": 1.0}]
    assert size(draw_curves(history)) == (550, 340)
    history += [{"step": 5, "loss": 3.0, "loss_itc": 1.0, "loss_itm": 2.0, "learning_rate": 1e-5, "grad_norm": 2.0}]
    assert size(draw_curves(history)) == (1100, 680)
    assert size(draw_curves(history, columns=1)) == (550, 1360)
    assert draw_curves([]) is None and draw_curves([{"step": 3, "epoch": 1.0}]) is None


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


@pytest.mark.parametrize("kind", ["loss", "runtime", "per_second", "unreadable_images", "samples_per_second", "@5"])
def test_score_of_an_answer_type_is_one_whatever_its_name(kind):
    name = f"eval_vqa_accuracy_{kind}"
    others = {"eval_loss": 1.0, "eval_runtime": 2.0, "eval_samples_per_second": 3.0, "eval_mem_cpu_alloc_delta": 4}
    assert scores_of({"train_loss": 1.0, **others, name: 5.0}) == {name: 5.0}
    assert panel_of(name) == "metrics, %"
    assert {panel_of(other) for other in others} == {"loss", None}


@pytest.fixture
def few(checkpoints, image_folder):
    """Flags of a run of three steps."""

    def flags(task: str) -> list[str]:
        queue = ["--queue_size", "24", "--k_test", "3"] if task == "retrieval" else []
        return [
            *("--model_name_or_path", str(checkpoints[task]), "--dataset_name", str(image_folder), *queue),
            *("--eval_split", "test", "--per_device_train_batch_size", "8", "--max_steps", "3", "--logging_steps", "1"),
        ]

    return flags


@pytest.mark.draws_curves
def test_run_that_is_cut_leaves_its_curves(recipe, few, tmp_path, monkeypatch):
    steps = []

    def stop_in_the_third(self, *args, step=BlipTrainer.training_step, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(BlipTrainer, "training_step", stop_in_the_third)
    with pytest.raises(SystemExit):
        recipe(*few("vqa"))
    assert size((tmp_path / "run" / "training_curves.png").read_bytes()) == (1100, 680)  # loss, rate and norm


# task -> baselines worked out from the eight rows, and what is said of the loss
BASELINES = {
    # of four colors each once, and yes to two of four
    "vqa": ({"exact_match": 37.5, "vqa_accuracy_other": 25, "vqa_accuracy_yes_no": 50}, "for one word and [SEP]"),
    # the first caption, which one of four images has
    "captioning": ({"exact_match": 25}, "the mean over its tokens"),
    # two of eight captions, one of four images
    "retrieval": ({"text_recall@1": 25, "image_recall@1": 25, "image_recall@5": 100}, "full after 3 steps"),
}


@pytest.mark.draws_curves
@pytest.mark.parametrize("task", BASELINES)
def test_baseline_and_words_on_the_loss_are_in_results_log_card_and_report(recipe, few, task, caplog):
    caplog.set_level("INFO")
    baselines, explained = BASELINES[task]
    folder = recipe(*few(task), task=task)
    results = json.loads((folder / "all_results.json").read_text())
    assert results["baseline"]
    page, card = Page((folder / "report.html").read_text()).text, (folder / "README.md").read_text()
    for name, value in baselines.items():
        assert results[f"baseline_{name}"] == pytest.approx(value)
        assert re.search(
            rf"^  {name} +{results[f'eval_{name}']:.2f} +baseline +{value:.2f}$", caplog.text, re.MULTILINE
        )
        assert f"baseline {value:.2f}" in page and f"| {value:.2f} |" in card
    assert results["baseline"] in page and results["baseline"] in card
    assert caplog.text.count(explained) == 1 and explained in page
    assert caplog.text.index(explained) < caplog.text.index("Results, ")


def test_model_that_is_no_better_than_a_guess_is_said_to_be(caplog):
    scores, baselines = {"eval_exact_match": 67.0, "eval_vqa_accuracy": 66.0}, {"eval_exact_match": 67.0}
    assert "No score is above its baseline" in beside_baseline(scores, baselines, "a guess")
    assert "No score" not in beside_baseline({"eval_exact_match": 67.1}, baselines, "a guess")


def test_parts_of_the_retrieval_loss_are_logged(recipe, few):
    history = json.loads((recipe(*few("retrieval"), task="retrieval") / "trainer_state.json").read_text())
    logged = [entry for entry in history["log_history"] if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["loss_itc"] + entry["loss_itm"], abs=2e-4)
        assert 0 <= entry["in_batch_accuracy"] <= 100
    assert panel_of("in_batch_accuracy") == "metrics, %" and panel_of("eval_cider") == "CIDEr-D x 100"


def test_results_before_training_are_on_the_screen(recipe, few, caplog):
    folder = recipe(*few("vqa"), "--eval_on_start")
    (said,) = [record.getMessage() for record in caplog.records if record.msg.startswith("Results before training")]
    name, value = "before_training_exact_match", json.loads((folder / "all_results.json").read_text())
    assert f'"{name}": {value[name]}' in said
    assert caplog.text.index(said) < caplog.text.index("Results, ")


def test_tensorboard_gets_numbers_images_and_predictions_in_output_dir(recipe, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = recipe(*few("vqa"), "--report_to", "tensorboard", "--eval_on_start")
    assert not (tmp_path / "runs").exists()
    images, texts, scalars = {}, {}, {}
    # one file of the evaluation before training, one of the rest; they may be of the same second
    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(path))
        events.Reload()
        tags = events.Tags()
        scalars |= {tag: events.Scalars(tag) for tag in tags["scalars"]}
        images |= {tag: events.Images(tag) for tag in tags["images"]}
        texts |= {tag: events.Tensors(tag) for tag in tags["tensors"]}
    assert {"train/loss", "train/grad_norm", "eval/vqa_accuracy"} <= set(scalars)
    assert set(images) == {f"samples/{number}" for number in range(8)}
    assert (images["samples/0"][-1].width, images["samples/0"][-1].step) == (160, 3)
    row = json.loads((folder / "predictions.jsonl").read_text().splitlines()[1])
    text = texts["samples/1/text_summary"][-1].tensor_proto.string_val[0].decode()
    assert row["question"] in text and f"**prediction** {row['prediction']}" in text


@pytest.mark.parametrize("typed", [True, False])
def test_rows_shown_in_training_are_of_different_images_and_types(typed):
    """Three images: five yes/no questions and a number on the first, then two other answers."""
    rows = [{"image_id": "a", "answers": ["yes"]}] * 5 + [{"image_id": "a", "answers": ["2"]}]
    rows += [{"image_id": "b", "answers": ["no"]}, {"image_id": "b", "answers": ["3"]}]
    rows += [{"image_id": "c", "answers": ["yes"]}, {"image_id": "c", "answers": ["a dog"]}]
    kinds = ["yes/no"] * 5 + ["number", "yes/no", "number", "yes/no", "other"]
    if typed:
        rows = [{**row, "answer_type": kind} for row, kind in zip(rows, kinds, strict=True)]
    rows = Dataset.from_list(rows)
    assert choose_rows(rows, 3) == [0, 7, 9]
    assert choose_rows(rows, 4) == [0, 1, 7, 9]  # each is shown once: the first row
    assert choose_rows(rows, 20) == list(range(10))
    assert choose_rows(rows.select_columns("image_id"), 3) == [0, 6, 8]


class Package:
    """Stands for wandb and trackio: keeps what is logged."""

    def __init__(self) -> None:
        self.logged = []

    def Image(self, image):
        return image.size

    def Table(self, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log(self, entry):
        self.logged.append(entry)


def test_wandb_and_trackio_get_a_table(image_folder, tmp_path):
    rows = Dataset.from_list(
        [
            {"image": {"bytes": None, "path": str(image_folder / "0.png")}, "image_id": "0", "captions": ["a", "b"]},
            {"image": {"bytes": None, "path": "gone.png"}, "image_id": "1", "captions": ["c"]},
        ]
    )
    callbacks = []
    for kind, name in ((integration_utils.WandbCallback, "_wandb"), (integration_utils.TrackioCallback, "_trackio")):
        callbacks.append(object.__new__(kind))  # without the package that it would import
        setattr(callbacks[-1], name, Package())
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=callbacks),
        evaluated_rows=rows,
        results=[{"prediction": "a", "probability": 0.5, "accuracy": 1.0}, None],
    )
    state = SimpleNamespace(is_world_process_zero=True, global_step=7)
    TrackerCallback(trainer).on_evaluate(None, state, None)
    table = [{"image": (40, 36), "question": "", "references": "a, b", "prediction": "a", "score": 0.5}]
    for package in (callbacks[0]._wandb, callbacks[1]._trackio):
        assert package.logged == [{"samples": table, "train/global_step": 7}]


def test_tracker_that_is_not_there_is_said_before_the_model_is_loaded(recipe, few, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    for name, message in (("notebook", "notebook is not supported"), ("trackio", "Run `pip install trackio`")):
        with pytest.raises(SystemExit):
            recipe(*few("vqa"), "--report_to", name, "--model_name_or_path", "/no/such/model")
        assert "report_to must be tensorboard, trackio, wandb" in caplog.text and message in caplog.text
        assert "/no/such/model" not in caplog.text and not (tmp_path / "run").exists()
