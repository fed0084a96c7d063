"""Unreadable images are found, and readable images are checked only once."""

import pytest
from PIL import Image
from three_images import ROWS, load_all, save_three_images, write_metadata

from blip_ft.arguments import DataArguments
from blip_ft.data.loading import load_vqa

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


def test_readable_images_are_checked_again_only_if_they_change(folder, monkeypatch):
    write_metadata(folder, ROWS)
    load_vqa(DataArguments(dataset_name=str(folder)))
    opened = []
    monkeypatch.setattr(
        Image, "open", lambda *args, real=Image.open, **kwargs: opened.append(1) or real(*args, **kwargs)
    )
    load_vqa(DataArguments(dataset_name=str(folder)))
    assert opened == []
    (folder / "b.png").write_bytes(b"broken now")
    with pytest.raises(ValueError, match="1 of 4 rows"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_truncated_image_passes_the_header_check_but_not_the_full_check(folder, tmp_path):
    Image.effect_noise((64, 64), 50).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    write_metadata(folder, ROWS)
    assert len(load_all(dataset_name=str(folder), check_images="header")) == 4
    with pytest.raises(ValueError, match=r"2 of 4 rows"):
        load_vqa(DataArguments(dataset_name=str(folder)))


def test_suggested_bad_fraction_is_large_enough(folder):
    # 0.29 * 100 is 28.999999999999996
    write_metadata(folder, [{**ROWS[number % 3], "question": "" if number < 29 else "q"} for number in range(100)])
    with pytest.raises(ValueError, match=r"--max_bad_fraction 0\.29$"):
        load_vqa(DataArguments(dataset_name=str(folder)))
    train, held_out = load_vqa(DataArguments(dataset_name=str(folder), max_bad_fraction=0.29))
    assert len(train) + len(held_out) == 71
