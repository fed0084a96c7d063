"""Whatever a data set contains: each row is read correctly or listed as bad, or the source is refused."""

import csv
import io
import json
import math
import os
import struct
import tempfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from blip_ft.arguments import DataArguments
from blip_ft.data import schema, sources
from blip_ft.data.collators import CaptionCollator, RetrievalCollator, VqaCollator
from blip_ft.data.images import open_image
from blip_ft.data.loading import load_captions, load_vqa
from blip_ft.data.sources import list_images
from blip_ft.data.texts import clean_caption

COLOR = (200, 90, 10)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("good.png", "other.png"):
        Image.new("RGB", (8, 6), COLOR).save(folder / name)
    return folder


def encoded(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def load_rows(folder, rows, load=load_vqa, **kwargs):
    """Write metadata.jsonl with these training rows and a good row to evaluate on, and load it.

    Returns: the training rows, and the rows of bad_rows.jsonl.
    """
    lines = [{"question": "what is it ?", "answer": "dog", "caption": "a dog", **row, "split": "train"} for row in rows]
    lines.append({**lines[0], "file_name": "other.png", "question": "q ?", "answer": "a", "caption": "c"})
    lines[-1] = {**lines[-1], "split": "test", "image_id": "other", "question_id": "other"}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = folder / "bad_rows.jsonl"
    listed.unlink(missing_ok=True)
    args = DataArguments(dataset_name=str(folder), eval_split="test", max_bad_fraction=1.0, **kwargs)
    train, _ = load(args, listed)
    return list(train), [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []


def bomb(width, height):
    """A PNG of a few kB that would decode to width x height pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def jpeg_of_scans(number, between=b""):
    """A progressive JPEG with `number` scans. All but six have only a few bytes and come after the bytes `between`."""
    content = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + (between + scan) * (number - content.count(b"\xff\xda")) + b"\xff\xd9"


NOISE = Image.effect_noise((64, 64), 50)
UNREADABLE = {
    "zero bytes": b"",
    "text": b"no image",
    "cut png": encoded(NOISE)[:1000],
    "cut jpeg": encoded(NOISE.convert("RGB"), "JPEG")[:1000],
    "header alone": encoded(NOISE)[:30],
    # Pillow only warns about the first one, and refuses the second one
    "bomb": bomb(12_000, 10_000),
    "larger bomb": bomb(60_000, 60_000),
    # Pillow would start Ghostscript
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "format of no use": encoded(NOISE, "PCX"),
    "scans": jpeg_of_scans(101),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("check", ["full", "header"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_image_is_listed_or_has_no_weight(folder, processor, kind, check):
    (folder / "bad.png").write_bytes(UNREADABLE[kind])
    rows, bad = load_rows(folder, [{"file_name": "good.png"}, {"file_name": "bad.png"}], check_images=check)
    if check == "full" or kind not in ("cut png", "cut jpeg", "scans"):
        assert [(row["row"], row["reason"].split(":")[0]) for row in bad] == [(1, "image cannot be read")]
        assert [row["image_id"] for row in rows] == ["good.png"]
    else:
        # only the header was checked: the row stays, with weight 0
        assert VqaCollator(processor)(rows)["answer_weights"].tolist() == [1, 0]


def test_no_other_program_is_started_for_an_image(folder, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started"))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("started"))
    for name in ("bad.jpg", "bad.eps"):
        (folder / name).write_bytes(UNREADABLE["postscript"])
    for image in (UNREADABLE["postscript"], folder / "bad.jpg"):
        with pytest.raises(OSError, match="not in one of the formats JPEG, PNG"):
            open_image(image)
    assert "bad.eps" not in [Path(row["image"]["path"]).name for row in list_images([str(folder)])]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "MPO"])
def test_image_of_each_usual_format_is_read(form):
    if form == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("Pillow below 11.3")
    image = open_image(encoded(FLAT, form))
    assert np.abs(np.asarray(image, int) - COLOR).max() <= 3


def test_only_regular_files_are_opened(folder):
    """Opening a named pipe would wait forever."""
    os.mkfifo(folder / "pipe.png")
    rows, bad = load_rows(folder, [{"file_name": "good.png"}, {"file_name": "pipe.png"}])
    assert [row["image_id"] for row in rows] == ["good.png"]
    assert len(bad) == 1 and "not a regular file" in bad[0]["reason"]
    for path in (folder / "pipe.png", "/dev/zero", folder):
        with pytest.raises(OSError, match="not a regular file"):
            open_image(path)


def test_scans_of_a_jpeg_are_bounded_before_it_is_decoded(monkeypatch):
    assert open_image(jpeg_of_scans(100)).size == (64, 64)
    for between in (b"", b"\xff\xfe\0\x02", b"\xff\xff"):  # nothing, a comment, a fill byte
        content = jpeg_of_scans(5000, between)
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="JPEG has 5000 scans; the limit is 100"):
            patch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
            open_image(content)


def test_bytes_that_only_look_like_a_scan_are_not_counted():
    """They appear inside a segment, and after the end, where phones store videos."""
    content = encoded(NOISE.convert("RGB"), "JPEG", comment=b"\xff\xda" * 200) + b"\xff\xda" * 200
    assert open_image(content).size == (64, 64)


def test_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with (
        pytest.raises(ValueError, match="12000 x 10000 pixels; Pillow's limit is"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        open_image(UNREADABLE["bomb"])


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
FLAT = Image.new("RGB", (9, 5), COLOR)
GREY = 37  # 37 * 257 in 16 bits
ODD = {
    "1x1": (encoded(FLAT.resize((1, 1))), (1, 1), COLOR),
    "1x5000": (encoded(FLAT.resize((1, 5000))), (1, 5000), COLOR),
    "5000x1 jpeg": (encoded(FLAT.resize((5000, 1)), "JPEG"), (5000, 1), COLOR),
    "16 bits": (encoded(Image.fromarray(np.full((5, 9), GREY * 257, np.uint16))), (9, 5), (GREY,) * 3),
    "cmyk jpeg": (encoded(FLAT.convert("CMYK"), "JPEG"), (9, 5), COLOR),
    "alpha": (encoded(FLAT.convert("RGBA")), (9, 5), COLOR),
    "grey with alpha": (encoded(Image.new("LA", (9, 5), (GREY, 200))), (9, 5), (GREY,) * 3),
    "palette": (encoded(FLAT.quantize(2), transparency=1), (9, 5), COLOR),
    "animated gif": (
        encoded(FLAT, "GIF", save_all=True, append_images=[Image.new("RGB", (9, 5), (0, 0, 250))]),
        *((9, 5), COLOR),
    ),
    "animated webp": (
        encoded(FLAT, "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 5), (0, 0, 250))], lossless=True),
        *((9, 5), COLOR),
    ),
    "turned by exif": (encoded(FLAT, "JPEG", exif=ROTATED), (5, 9), COLOR),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_image_with_a_wrong_suffix_becomes_upright_rgb(folder, processor, kind):
    content, size, color = ODD[kind]
    (folder / "odd.jpg").write_bytes(content)
    rows, bad = load_rows(folder, [{"file_name": "odd.jpg"}])
    assert bad == [] and len(rows) == 1
    image = open_image(rows[0]["image"])
    assert image.mode == "RGB" and image.size == size
    assert np.abs(np.asarray(image, int) - color).max() <= 3  # the error of JPEG
    pixels = VqaCollator(processor)(rows)["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert (pixels.int() - torch.tensor(color).view(3, 1, 1)).abs().max() <= 3


def test_image_column_of_images_bytes_paths_or_both(folder, tmp_path):
    content = (folder / "good.png").read_bytes()
    columns = {
        "PIL": ([Image.open(folder / "good.png")] * 2, ImageFeature()),
        "bytes": ([content] * 2, Value("binary")),
        "paths": (["good.png"] * 2, Value("string")),
        "dicts": ([{"bytes": content, "path": None}, {"bytes": None, "path": "good.png"}], None),
    }
    for name, (values, feature) in columns.items():
        feature = feature or {"bytes": Value("binary"), "path": Value("string")}
        features = Features({"image": feature, "question": Value("string"), "answer": Value("string")})
        rows = {"image": values, "question": ["a ?", "b ?"], "answer": ["x", "y"]}
        Dataset.from_dict(rows, features).save_to_disk(tmp_path / name)
        # "dicts": the second image has only a path, which is not trusted if other images of the column have bytes
        wanted = 1 if name == "dicts" else 2
        args = {"dataset_name": str(tmp_path / name), "eval_dataset_name": str(tmp_path / name)}
        args |= {"allow_image_overlap": True, "image_folder": str(folder)}
        train, _ = load_vqa(DataArguments(**args, max_bad_fraction=0.5))
        assert len(train) == wanted, name
        for row in train:
            assert np.asarray(open_image(row["image"]))[0, 0].tolist() == list(COLOR)
    listed = Dataset.from_dict(
        {"image": [[{"bytes": content, "path": None}]], "question": ["?"], "answer": ["x"]},
        Features({"image": List(ImageFeature()), "question": Value("string"), "answer": Value("string")}),
    )
    listed.save_to_disk(tmp_path / "lists")
    with pytest.raises(ValueError, match="expected one image per row"):
        load_vqa(DataArguments(dataset_name=str(tmp_path / "lists")))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *[("missing.png", "cannot be read"), ("", "has no path"), ("../outside.png", "is outside")],
        *[("sub/../../outside.png", "is outside"), ("link.png", "is outside"), ("circle", "cannot be resolved")],
        *[("sub", "cannot be read"), ("a\0b.png", "has no path"), ("\ud800.png", "not text in UTF-8")],
        *[
            ("x" * 5000, "cannot be read"),
            (7, "not a path"),
            (None, "not a path"),
            (["good.png"], "not a path"),
        ],
        *[("http://127.0.0.1:9/a.png", "is a URL"), ("data:image/png;base64,AAAA", "is a URL")],
        *[("file:///etc/passwd", "is a URL"), ({"path": "http://127.0.0.1:9/a.png"}, "is a URL")],
        *[({"path": "../outside.png", "bytes": None}, "is outside"), (float("nan"), "not a path")],
    ],
)
def test_path_that_is_none_or_leads_elsewhere_is_refused(folder, tmp_path, monkeypatch, path, reason):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("fetched"))
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    os.symlink("circle", folder / "circle")
    (folder / "sub").mkdir()
    rows, bad = load_rows(folder, [{"file_name": "good.png"}, {"file_name": path}])
    assert [row["image_id"] for row in rows] == ["good.png"]
    assert len(bad) == 1 and reason in bad[0]["reason"]


def test_hub_data_set_cannot_name_files_outside_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "HUB_CACHES", (str(tmp_path / "cache"),))
    (tmp_path / "cache").mkdir()
    for name in ("cache/own.png", "private.png"):
        FLAT.save(tmp_path / name)
    images = [{"bytes": None, "path": str(tmp_path / name)} for name in ("cache/own.png", "private.png")]
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    table = Dataset.from_dict({"image": images, "question": ["a", "b"], "answer": ["x", "y"]}, features)
    monkeypatch.setattr(sources, "_read_hub", lambda *args: {"train": table, "test": table})
    args = DataArguments(dataset_name="owner/images", eval_split="test", max_bad_fraction=1.0)
    train, _ = load_vqa(args, tmp_path / "bad.jsonl")
    assert list(train["question"]) == ["a"]
    assert "outside the Hub's cache" in (tmp_path / "bad.jsonl").read_text()


@pytest.mark.parametrize(
    "value", ["", " \n", None, 3, float("nan"), [], {}, ["a"], "\0", "\ud800", "\u200b\ufeff", "\u0301"]
)
def test_question_without_text_is_listed(folder, value):
    rows, bad = load_rows(folder, [{"file_name": "good.png"}, {"file_name": "good.png", "question": value}])
    assert len(rows) == 1 and [row["reason"] for row in bad] == ["question is empty or not a text"]


@pytest.mark.parametrize(
    "value", ["", None, float("nan"), float("inf"), [], {}, [None, ""], {"text": "x"}, "\0", "\udfff"]
)
def test_answer_and_caption_without_text_are_listed(folder, value):
    for load, name in ((load_vqa, "answer"), (load_captions, "caption")):
        rows, bad = load_rows(folder, [{"file_name": "good.png"}, {"file_name": "good.png", name: value}], load)
        assert len(rows) == 1 and [row["reason"] for row in bad] == [f"{name} is empty or not a text"]


def test_caption_without_words_after_cleaning_is_dropped(folder):
    """Otherwise it would be trained on as a prompt without a caption."""
    rows, bad = load_rows(folder, [{"file_name": "good.png", "captions": ["...", "a cat"]}], load_captions)
    assert bad == []
    assert [row["caption"] for row in rows] == ["a cat"]


def test_text_keeps_its_words_and_loses_characters_that_cannot_be_predicted(folder):
    rows, _ = load_rows(
        folder, [{"file_name": "good.png", "question": "ça\0 va\ud800 ?", "answer": "\ufeffcafé\u200b"}]
    )
    assert rows[0]["question"] == "ça va ?" and rows[0]["answers"] == ["café"]


def test_ten_thousand_words_are_truncated_by_the_collators(folder, processor):
    words = "dog " * 10_000
    rows, bad = load_rows(folder, [{"file_name": "good.png", "question": words, "answer": words}])
    assert bad == [] and rows[0]["question"] == words.strip()
    batch = VqaCollator(processor)(rows)
    assert batch["input_ids"].shape == (1, 35) and batch["labels"].shape == (1, 30)
    rows, _ = load_rows(folder, [{"file_name": "good.png", "caption": words}], load_captions)
    for collate, length in ((CaptionCollator(processor, clean=False), 40), (RetrievalCollator(processor), 32)):
        assert collate(rows)["input_ids"].shape == (1, length)


@pytest.mark.parametrize("missing", [float("nan"), None, "", [1], {"a": 1}])
def test_invalid_id_is_replaced_by_one_made_from_the_image(folder, missing):
    """If these values were used as ids, all rows would have the same image."""
    names = ("good.png", "other.png")
    rows, _ = load_rows(folder, [{"file_name": name, "image_id": missing, "question_id": missing} for name in names])
    assert [row["image_id"] for row in rows] == list(names)
    assert [row["question_id"] for row in rows] == ["train-0", "train-1"]


def test_second_image_with_the_same_id_is_listed(folder):
    names = ("good.png", "./good.png", "other.png")
    rows, bad = load_rows(folder, [{"file_name": name, "image_id": 7} for name in names])
    assert len(rows) == 2
    assert [(row["row"], row["reason"]) for row in bad] == [
        (2, "image is not the one of an earlier row with the same image_id 7")
    ]


def test_repeated_question_id_is_kept_with_a_warning(folder, caplog):
    rows, bad = load_rows(folder, [{"file_name": "good.png", "question_id": number} for number in (1, 5, 5, 2)])
    assert len(rows) == 4 and bad == []
    assert "1 question_ids of the rows to train on appear in several rows, e.g. 5" in caplog.text


def test_unreadable_image_of_one_file_does_not_remove_rows_of_another(folder, tmp_path):
    """Both files number their images from 0."""
    (folder / "bad.png").write_bytes(b"")
    for name, image in (("train.jsonl", "good.png"), ("eval.jsonl", "bad.png")):
        row = {"file_name": image, "image_id": 0, "question": "what ?", "answer": "x"}
        (tmp_path / name).write_text(json.dumps(row))
    where = {"dataset_name": str(tmp_path / "train.jsonl"), "eval_dataset_name": str(tmp_path / "eval.jsonl")}
    args = DataArguments(**where, image_folder=str(folder), max_bad_fraction=1.0)
    train, evaluation = load_vqa(args, tmp_path / "bad.jsonl")
    assert [len(train), len(evaluation)] == [1, 1]
    assert [json.loads(line)["split"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == ["eval"]


GOOD_LINE = json.dumps({"file_name": "good.png", "question": "what ?", "answer": "x"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", GOOD_LINE * 2 + b"{", r"rows\.jsonl, line 3: not valid JSON"),
        ("rows.jsonl", GOOD_LINE + b'{"question": "q"\n' + GOOD_LINE, r"rows\.jsonl, line 2: not valid JSON"),
        ("rows.jsonl", GOOD_LINE + b"[1]\n", r"rows\.jsonl, line 2: expected a JSON object, found a list"),
        ("rows.jsonl", GOOD_LINE + b"\xff\n", r"rows\.jsonl, line 2: must be text in UTF-8"),
        ("rows.jsonl", GOOD_LINE + b'{"a": ' + b"9" * 5000 + b"}", r"rows\.jsonl, from line 2: .* cannot be read"),
        ("rows.jsonl", GOOD_LINE + b'{"a": ' + b"[" * 9000, r"rows\.jsonl, from line 2: .* cannot be read"),
        ("rows.jsonl", b"", "has no rows"),
        ("rows.json", b"[\n{},\n{", r"rows\.json, line 3: not valid JSON"),
        ("rows.json", b'[\n"\xff"]', r"rows\.json, line 2: must be text in UTF-8"),
        ("rows.json", b"[1]", "must be a list of objects"),
        ("rows.json", b'{"images": [1], "annotations": []}', "must be COCO captions"),
        (
            "rows.jsonl",
            GOOD_LINE + b'{"answer": "no", "answer": "yes"}',
            r"rows\.jsonl, line 2: the key 'answer'",
        ),
        (
            "rows.jsonl",
            GOOD_LINE + b'{"a": [{"x": 1, "\\u0078": 1}]}',
            r"rows\.jsonl, line 2: the key 'x' appears",
        ),
        (
            "rows.json",
            b'[{"a": "\\"{"},\n{"a": 1,\n"b": {"a": 2},\n"a": 3}]',
            r"rows\.json, line 4: the key 'a'",
        ),
        ("rows.json", b'{"images": [],\n"annotations": [],\n"images": []}', r"rows\.json, line 3: the key 'images'"),
        (
            "rows.csv",
            b"file_name,answer,answer\na.png,no,yes\n",
            r"rows\.csv, line 1: the column 'answer' appears twice",
        ),
        ("rows.csv", b'a,b\nx,y\nx,"[{""k"": 1, ""k"": 2}]"\n', r"rows\.csv, line 3: the key 'k' appears"),
        ("rows.csv", b"", "has no rows"),
        ("rows.csv", b"a,b\n\xff,x\n", "must be text in UTF-8"),
        ("rows.parquet", b"", r"rows\.parquet has no rows or is not a complete parquet file"),
        ("rows.parquet", b"PAR1 and more", r"rows\.parquet has no rows or is not a complete parquet file"),
    ],
)
def test_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_vqa(DataArguments(dataset_name=str(tmp_path / name)))


def test_saved_data_set_that_is_truncated_or_empty_is_named(tmp_path):
    Dataset.from_dict({"image": ["a"], "question": ["?"], "answer": ["x"]}).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    Dataset.from_dict({"image": [], "question": [], "answer": []}).save_to_disk(tmp_path / "empty")
    # datasets 4.0 can read the empty one
    for name, said in (("saved", "cannot be read any more"), ("empty", "has no rows|found 0")):
        with pytest.raises(ValueError, match=said):
            load_vqa(DataArguments(dataset_name=str(tmp_path / name)))


def test_id_with_two_values_in_official_files_is_refused(tmp_path):
    images = [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": []}))
    with pytest.raises(ValueError, match="two different file_name for id 7"):
        load_captions(DataArguments(dataset_name=str(tmp_path / "captions.json")))
    answers = [{"question_id": 1, "answers": [{"answer": name}]} for name in ("yes", "no")]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "train2014", "questions": []}))
    files = {"questions_file": str(tmp_path / "q.json"), "annotations_file": str(tmp_path / "a.json")}
    with pytest.raises(ValueError, match=r"a\.json has two different answers for question_id 1"):
        load_vqa(DataArguments(**files, image_folder=str(tmp_path)))


# a path as written in a row -> the file that it refers to
PATHS = {
    "a.png": "a.png",
    "./a.png": "a.png",
    "sub/../b.jpg": "b.jpg",
    "b.jpg": "b.jpg",
    "sub/c": "sub/c",
}
NO_PATHS = [
    "../outside.png",
    "/etc/hostname",
    "link.png",
    "empty.png",
    "cut.png",
    "missing.png",
    "sub",
    "http://h/a.png",
]


@pytest.fixture(scope="module")
def zoo():
    """A folder with readable images in three colors, and with unreadable ones."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "images")
        (folder / "sub").mkdir(parents=True)
        Image.new("RGB", (8, 8), (250, 0, 0)).save(folder / "a.png")
        Image.new("RGB", (1, 50), (0, 250, 0)).save(folder / "b.jpg", "PNG")
        Image.new("RGBA", (9, 7), (0, 0, 250, 9)).save(folder / "sub" / "c", "PNG")
        (folder / "empty.png").write_bytes(b"")
        (folder / "cut.png").write_bytes(UNREADABLE["cut png"])
        FLAT.save(Path(root, "outside.png"))
        os.symlink(Path(root, "outside.png"), folder / "link.png")
        yield folder


def color_of(path):
    return {"a.png": 0, "b.jpg": 1, "sub/c": 2}[PATHS[path]]


texts = st.one_of(
    st.sampled_from(["what is it ?", "dog", "a red dog", "...", "\0", "\ud800", "\u0301", "long"]).map(
        lambda text: "dog " * 10_000 if text == "long" else text
    ),
    st.text(max_size=12),
)
scalars = st.one_of(texts, st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats())
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["answer", "caption", "x"]), inner),
)
images = st.one_of(
    st.sampled_from(sorted(PATHS)),
    st.sampled_from(sorted(PATHS)),
    st.sampled_from(sorted(PATHS)),
    st.sampled_from(NO_PATHS),
    anything.filter(lambda value: not isinstance(value, str) or value not in PATHS),
)
row_strategy = st.fixed_dictionaries(
    {
        "file_name": images,
        "question": st.one_of(texts, texts, anything),
        "answers": st.one_of(texts, st.lists(texts, max_size=4), anything),
        "captions": st.one_of(texts, st.lists(texts, max_size=4), anything),
    },
    optional={
        "image_id": st.one_of(st.integers(0, 1), st.integers(0, 1), scalars, anything),
        "question_id": st.one_of(st.integers(0, 3), scalars, anything),
        "answer_type": anything,
    },
)


def letters_of(text):
    """The characters of a text that the tokenizer sees: a second implementation of _clean_text, to compare with."""
    seen = ""
    for char in text:
        kind = unicodedata.category(char)
        if char == "\ufffd" or (kind in ("Cc", "Cf", "Cs", "Co", "Cn") and not char.isspace()):
            continue
        seen += char
    seen = seen.strip()
    # accents alone are not a text
    return seen if any(not char.isspace() and unicodedata.category(char)[0] != "M" for char in seen) else ""


def texts_in(value, name):
    """The strings of a value, in order: a recursive implementation of _as_texts, to compare with."""
    if isinstance(value, dict):
        return texts_in(value.get(name), name)
    if isinstance(value, list):
        return [text for entry in value for text in texts_in(entry, name)]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return []
    if value is True or value is False:
        return ["yes" if value else "no"]
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return [text for text in [letters_of(str(value))] if text]


def usable(row, task):
    """The texts of a row that must be trained on, or None if the row must be listed as bad."""
    path = row["file_name"]
    path = path.get("path") if isinstance(path, dict) else path
    if not isinstance(path, str) or path not in PATHS:
        return None
    if task == "captioning":
        captions = [text for text in texts_in(row["captions"], "caption") if clean_caption(text)]
        return captions or None
    question = letters_of(row["question"]) if isinstance(row["question"], str) else ""
    answers = texts_in(row["answers"], "answer")
    return (question, answers) if question and answers else None


def id_of(row):
    value = row.get("image_id")
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value).encode("utf-8", "backslashreplace").decode() or None
    return None


def path_of(row):
    return row["file_name"]["path"] if isinstance(row["file_name"], dict) else row["file_name"]


def split_by_hand(rows, task):
    """(position, texts) of the rows to train on. All others must be listed as bad."""
    kept, shown = [], {}
    for position, row in enumerate(rows):
        content = usable(row, task)
        if (
            content
            and id_of(row) is not None
            and shown.setdefault(id_of(row), PATHS[row["file_name"]]) != PATHS[row["file_name"]]
        ):
            content = None
        if content:
            kept.append((position, content))
    return kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["vqa", "captioning"])
@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(row_strategy, min_size=2, max_size=12))
def test_generated_rows_are_right_or_listed_or_end_in_a_message(zoo, processor, task, rows):
    good = {"file_name": "a.png", "question": "what ?", "answers": "dog", "captions": "a dog", "image_id": "eval"}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch, f"{name}.jsonl") for name in ("train", "eval", "bad")}
        files["train"].write_text("".join(json.dumps(row) + "\n" for row in rows))
        files["eval"].write_text(json.dumps(good))
        where = {"dataset_name": str(files["train"]), "eval_dataset_name": str(files["eval"])}
        args = DataArguments(**where, image_folder=str(zoo), max_bad_fraction=1.0)
        kept = split_by_hand(rows, task)
        load = load_vqa if task == "vqa" else load_captions
        try:
            train, _ = load(args, files["bad"])
        except ValueError as error:
            # the only error that such rows may cause
            assert "No rows are left to train on" in str(error) and not kept
            return
        listed = (
            [json.loads(line)["row"] for line in files["bad"].read_text().splitlines()] if files["bad"].exists() else []
        )
        assert sorted([position for position, _ in kept] + listed) == list(range(len(rows)))
        train = list(train)
    if task == "vqa":
        assert [(row["question"], row["answers"]) for row in train] == [content for _, content in kept]
        sources = [rows[position] for position, _ in kept]
        batch = VqaCollator(processor)(train)
        assert batch["readable"].all()
        assert batch["input_ids"].shape[0] == len(train) and batch["input_ids"].shape[1] <= 35
        # [CLS], at least one word, [SEP]
        assert (batch["attention_mask"].sum(1) >= 3).all() and ((batch["labels"] != -100).sum(1) >= 3).all()
        weights = torch.zeros(len(train)).index_add(0, batch["question_index"], batch["answer_weights"])
        torch.testing.assert_close(weights, torch.ones(len(train)))
        for row, source, image in zip(train, sources, batch["image_index"].tolist(), strict=True):
            pixels = batch["pixel_values"][image].flatten(1).float().mean(1)
            assert int(pixels.argmax()) == color_of(source["file_name"]) and pixels.max() > 200, row
    else:
        together = {}
        for position, captions in kept:
            key = id_of(rows[position]) or PATHS[path_of(rows[position])]
            together.setdefault(key, (color_of(rows[position]["file_name"]), {}))[1].update(dict.fromkeys(captions))
        assert [row["caption"] for row in train] == [text for _, captions in together.values() for text in captions]
        colors = [color for color, captions in together.values() for _ in captions]
        batch, pairs = CaptionCollator(processor)(train), RetrievalCollator(processor)(train)
        assert ((batch["labels"] != -100).sum(1) >= 2).all()  # a word and [SEP]
        assert (pairs["attention_mask"].sum(1) >= 3).all()
        for part in (batch, pairs):
            means = part["pixel_values"].flatten(2).float().mean(2)[part["image_index"]]
            assert means.argmax(1).tolist() == colors and (means.max(1).values > 200).all()


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_generated_files_end_in_a_message(ending, content):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"rows{ending}")
        path.write_bytes(content)
        # no generated file has the needed columns
        with pytest.raises(ValueError):
            load_vqa(DataArguments(dataset_name=str(path)))


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cells=st.lists(st.text(max_size=10), min_size=1, max_size=5))
def test_generated_cells_of_a_csv_come_back_as_written(zoo, cells):
    with tempfile.TemporaryDirectory() as scratch:
        path, bad = Path(scratch, "rows.csv"), Path(scratch, "bad.jsonl")
        with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "question", "answer"])
            writer.writerows(["a.png", f"q {cell}", "x"] for cell in cells)
        args = {"dataset_name": str(path), "eval_dataset_name": str(path), "image_folder": str(zoo)}
        train, _ = load_vqa(DataArguments(**args, allow_image_overlap=True), bad)
        written = [letters_of(f"q {cell}".encode("utf-8", "replace").decode()) for cell in cells]
        assert list(train["question"]) == written and not bad.exists()
