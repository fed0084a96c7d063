"""Processors of BLIP-2 and InstructBLIP, and the texts that they write: the ids of LAVIS."""

import json
import shutil
from contextlib import suppress

import pytest
from golden_blip2 import T5, change_json, every_family, expected_of, questions_of
from safetensors.torch import load_file, save_file

from blip_ft.arguments.families import family_of
from blip_ft.data.text_formats import texts_of
from blip_ft.models import ModelLoader, load_model


@every_family
def test_processor_of_another_family_is_refused(golden, family, copied, processor):
    others = {
        "blip2_opt": ("blip2_t5", "instructblip_vicuna"),
        "blip2_t5": ("blip2_opt", "instructblip_vicuna"),
        "instructblip_vicuna": ("blip2_opt", "instructblip_t5"),
        "instructblip_t5": ("blip2_t5", "instructblip_vicuna"),
    }
    for other in others[family]:
        folder = copied(other)
        shutil.copy(golden / family / "config.json", folder)
        with pytest.raises(ValueError, match=r"The tokenizer of .*Copy the processor's files from the checkpoint"):
            ModelLoader(str(folder))._prepare()
        shutil.rmtree(folder)
    folder = copied(family)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (folder / file).unlink()
    processor.save_pretrained(folder)
    with pytest.raises(
        ValueError, match="BertTokenizer.* is not for .*BLIP.*it has no end token. Copy the processor's"
    ):
        ModelLoader(str(folder))._prepare()


@pytest.mark.parametrize("family", ["instructblip_vicuna", "instructblip_t5"])
def test_instructblip_without_its_second_tokenizer_is_refused(copied, family):
    folder = copied(family)
    shutil.rmtree(folder / "qformer_tokenizer")
    with pytest.raises(ValueError, match="for the Q-Former, in the folder qformer_tokenizer, does not match"):
        load_model(str(folder))


def remove_image_token(folder):
    """As in checkpoints from before transformers 4.46."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    settings.pop("extra_special_tokens", None)
    settings.pop("image_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    change_json(folder / "processor_config.json", num_query_tokens=None)


@pytest.mark.parametrize("family", ["blip2_opt", *T5])
def test_old_checkpoint_gets_its_image_token_and_number_of_queries(golden, family, copied, answers_of):
    folder = copied(family)
    remove_image_token(folder)
    loaded = load_model(str(folder))
    config = loaded["model"].config
    assert (
        config.image_token_index == loaded["tokenizer"].convert_tokens_to_ids("<image>") < config.text_config.vocab_size
    )
    assert loaded["processor"].num_query_tokens == 4
    answers = answers_of(family, loaded["model"], loaded["processor"])
    assert answers == [text.strip() for text in expected_of(golden, family)["vqa"]["generated"]]


def test_image_token_beyond_the_embedding_is_no_fault_of_the_tokenizer(copied, answers_of, caplog, golden):
    folder = copied("blip2_opt")
    remove_image_token(folder)
    # as on the Hub before `<image>` was added: as many rows as words
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "embed_tokens" in name or "lm_head" in name]:
        weights[name] = weights[name][:360].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config={**text, "vocab_size": 360})
    loaded = load_model(str(folder))
    assert len(loaded["tokenizer"]) == 361 and "has no row for the token <image>" in caplog.text
    assert loaded["model"].config.image_token_index is None
    answers = answers_of("blip2_opt", loaded["model"], loaded["processor"])
    assert answers == [text.strip() for text in expected_of(golden, "blip2_opt")["vqa"]["generated"]]


def test_missing_pad_token_becomes_the_end_token(copied):
    folder = copied("blip2_opt")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_model(str(folder))["tokenizer"]
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


@every_family
@pytest.mark.parametrize(("name", "task"), [("vqa", "vqa"), ("captioning", "conditional_generation")])
def test_texts_give_the_ids_of_lavis(golden, family, name, task):
    loader = ModelLoader(str(golden / family))
    _, config, _ = loader._prepare()
    inputs, expected = load_file(golden / family / "inputs.safetensors"), expected_of(golden, family)
    texts = texts_of(loader.processor, family_of(config), task)
    rows = len(expected[name]["prompts"])
    if task == "vqa":
        assert [texts.prompt.replace("{}", question) for question in questions_of(golden, family)] == (
            expected[name]["prompts"]
        )
        tokens = texts.encode_questions(questions_of(golden, family), 96)
    else:
        assert {texts.prompt} == set(expected[name]["prompts"])
        tokens = texts.encode_caption_prompts(rows)
    assert tokens.keys() == {
        key.removeprefix(f"{name}_")
        for key in inputs
        if "input_ids" in key or "attention_mask" in key
        if key.startswith(f"{name}_")
    }
    for key, ids in tokens.items():
        assert ids.tolist() == inputs[f"{name}_{key}"].tolist()
    labels = texts.encode_answers([f" {answer} " for answer in expected[name]["answers"]], 96)
    assert labels.tolist() == inputs[f"{name}_labels"].tolist()
    assert texts.end_token_id == expected["end_token_id"]
    assert texts.decode(labels.clamp(min=0)) == expected[name]["answers"]


@every_family
def test_long_texts_are_cut_and_still_begin_and_end_as_trained(golden, family):
    loader = ModelLoader(str(golden / family))
    config = loader._prepare()[1]
    texts, tokenizer = texts_of(loader.processor, family_of(config), "vqa"), loader.processor.tokenizer
    whole = texts.encode_questions(["is it a cat? " * 30], 10**6)["input_ids"][0].tolist()
    cut = texts.encode_questions(["is it a cat? " * 30], 40)
    ids = cut["input_ids"][0].tolist()
    assert len(ids) == 40 < len(whole)
    if family in T5:
        assert ids == whole[-40:] and ids[-1] == tokenizer.eos_token_id
    else:
        assert ids == [whole[0], *whole[-39:]] and ids[0] == tokenizer.bos_token_id
    if "instruct" in family:
        own = loader.processor.qformer_tokenizer
        ids = cut["qformer_input_ids"][0].tolist()
        assert len(ids) == 40 and (ids[0], ids[-1]) == (own.cls_token_id, own.sep_token_id)
        assert own.decode(ids[-3:-1]) == own.decode(own("Short Answer:", add_special_tokens=False)["input_ids"][-2:])
    labels = texts.encode_answers(["a big red dog on a sofa " * 9, "two"], 5)
    assert labels.shape == (2, 5) and labels[0, -1] == texts.end_token_id
    # the tokenizer is saved with the checkpoint: no cut and no padding may stay in it
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


@every_family
def test_prompts_that_cannot_work_are_refused(golden, family):
    loader = ModelLoader(str(golden / family))
    config = loader._prepare()[1]
    texts = texts_of(loader.processor, family_of(config), "vqa")
    with pytest.raises(ValueError, match="max_question_tokens 4 leaves no room for a question"):
        texts.require_room_for_questions(4, 10)
    with pytest.raises(ValueError, match="question_prompt needs {} where the question goes, found 'Answer:'"):
        texts_of(loader.processor, family_of(config), "vqa", "Answer:")


RUNS_CODE = """
import pathlib
pathlib.Path("MARK").write_text("ran")
from transformers import BertTokenizerFast
class Tokenizer(BertTokenizerFast): pass
"""


def test_code_in_the_folder_of_the_second_tokenizer_is_neither_run_nor_asked_about(copied, tmp_path, monkeypatch):
    def asked(*args):
        raise AssertionError(f"asked on stdin: {args}")

    monkeypatch.setattr("builtins.input", asked)
    folder = copied("instructblip_t5")
    for place in (folder, folder / "qformer_tokenizer"):
        (place / "code.py").write_text(RUNS_CODE.replace("MARK", str(tmp_path / "ran")))
        change_json(place / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]})
    for trusted in (False, True):
        with suppress(ValueError):
            load_model(str(folder), trust_remote_code=trusted)
    assert not (tmp_path / "ran").exists()
