"""blip_ft.models: loading, freezing, counting, adapters and answering, as a user calls them."""

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import AutoPeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BlipConfig, PreTrainedModel
from transformers.models.blip import modeling_blip

from blip_ft.arguments import ModelArguments, PeftArguments
from blip_ft.data import demo
from blip_ft.data.images import resize_to_uint8
from blip_ft.data_pipeline import DataPipeline
from blip_ft.modeling import inference
from blip_ft.modeling.adapters import add_lora, count_parameters, freeze_model, unfreeze_model
from blip_ft.modeling.blip.captioning import BlipForConditionalGeneration
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.modeling.checkpoint_files import require_positions
from blip_ft.models import (
    ModelLoader,
    build_small_blip,
    generate_answer_blip,
    get_device,
    get_model_info,
    get_model_size_mb,
    load_model,
    load_model_from_path,
    move_model_to_device,
    prepare_inputs_for_blip,
    print_model_summary,
    save_model,
)
from blip_ft.training.setup import build_meta_model


def answers_of(model):
    inputs = {
        "pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32),
        "input_ids": torch.tensor([[101, 6, 7, 102], [101, 8, 5, 102]]),
        "labels": torch.tensor([[126, 28, 102], [126, 9, 102]]),
    }
    return model(**inputs).loss.item()


def test_load_gives_model_processor_and_its_parts(checkpoint):
    loaded = load_model(str(checkpoint), device="cpu")
    assert type(loaded["model"]) is BlipForQuestionAnswering and not loaded["model"].training
    assert loaded["tokenizer"] is loaded["processor"].tokenizer
    assert loaded["image_processor"] is loaded["processor"].image_processor
    assert list(load_model(str(checkpoint), load_processor=False)) == ["model"]


def test_task_chooses_the_class(golden, checkpoint, processor, tmp_path):
    BlipForConditionalGeneration.from_pretrained(golden / "captioning").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))["model"]) is BlipForConditionalGeneration
    loaded = load_model(str(checkpoint), task="conditional_generation", allow_new_weights=True)
    assert type(loaded["model"]) is BlipForConditionalGeneration


def test_resized_model_and_processor_agree(checkpoint):
    loaded = load_model(str(checkpoint), image_size=48)
    pixels = resize_to_uint8([Image.new("RGB", (10, 20))], loaded["image_processor"])
    assert pixels.shape == (1, 3, 48, 48)
    assert loaded["model"].encode_images(pixels).last_hidden_state.shape[1] == 37


def test_adapter_folder_loads_with_its_base_and_merges_without_changing_the_loss(checkpoint, tmp_path):
    model = load_model(str(checkpoint))["model"]
    base_loss = answers_of(model)
    adapted = add_lora(model, PeftArguments(use_peft=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.eval().save_pretrained(tmp_path)
    loss = answers_of(adapted)
    assert abs(loss - base_loss) > 1e-3
    assert answers_of(load_model(str(tmp_path))["model"]) == pytest.approx(loss, abs=1e-5)
    merged = load_model(str(tmp_path), merge=True)["model"]
    assert type(merged) is BlipForQuestionAnswering
    assert answers_of(merged) == pytest.approx(loss, abs=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"]["parent_library"] == "transformers.models.blip.modeling_blip"


def test_default_lora_leaves_the_tied_head_alone(checkpoint):
    adapted = add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True))
    touched = {
        name.split(".lora_")[0].split("model.", 1)[1] for name, _ in adapted.named_parameters() if "lora_" in name
    }
    assert not any(".cls." in name for name in touched)
    # 2 vision layers x 4, and 2 layers of encoder and decoder x (2 attentions x 4 + 2)
    assert len(touched) == 2 * 4 + 2 * 2 * 10


def test_lora_target_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ValueError, match="lora_target_modules must name linear layers"):
        add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True, lora_target_modules=["q_proj"]))


def test_freezing_matches_whole_dotted_parts_and_counts(checkpoint, caplog):
    model = load_model(str(checkpoint))["model"]
    total = count_parameters(model)["total"]
    assert total == sum(p.numel() for p in model.parameters()) == count_parameters(model)["trainable"]
    freeze_model(model, ["encoder.layer.0"])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(".encoder.layer.0." in name for name in frozen)
    freeze_model(model)
    assert count_parameters(model) == {
        "total": total,
        "trainable": 0,
        "frozen": total,
        "total_millions": total / 1e6,
        "trainable_millions": 0.0,
    }
    unfreeze_model(model, ["text_decoder"])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"text_decoder"}
    unfreeze_model(model, ["classifier"])
    assert "No parameter matches classifier; the parts of the model are vision_model, text_encoder" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_model_answers_and_keeps_its_tied_head(checkpoint, bits):
    loaded = load_model(str(checkpoint), **{f"load_in_{bits}bit": True}, device="cpu")
    model = loaded["model"]
    head = model.text_decoder.cls.predictions.decoder
    assert type(head) is torch.nn.Linear
    assert head.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
    # packed parameters are counted as unpacked ones
    assert count_parameters(model)["total"] == count_parameters(load_model(str(checkpoint))["model"])["total"]
    ids = model.generate(torch.tensor([[101, 6, 7, 102]]), torch.randn(1, 3, 32, 32), max_length=6)
    assert ids[0, 0] == 126 and ids.shape[1] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "mutually exclusive"),
        ({"task": "detection"}, "task must be one of vqa"),
        ({"model_type": "vilt"}, "model_type must be one of auto, blip"),
    ],
)
def test_arguments_that_cannot_work_are_refused(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(checkpoint), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:7"}, "The device cuda:7 does not exist.*finds 0 CUDA devices.*device=None"),
        ({"torch_dtype": "float8"}, "dtype must be a torch dtype, its name, e.g. bfloat16"),
    ],
)
def test_device_and_dtype_that_are_not_there_are_refused(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(checkpoint), **arguments)


def test_folder_that_cannot_be_loaded_says_what_it_lacks(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="The folder /no/such/folder does not exist"):
        load_model("/no/such/folder")
    with pytest.raises(ValueError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        load_model("owner/no-such-model")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="found: notes.txt"):
        load_model(str(tmp_path))
    BlipConfig.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors.*found: config.json, notes.txt"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="The loader said"):
        load_model(str(tmp_path))


def test_checkpoint_that_is_not_blip_is_named_with_what_is_supported(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="type 'bert'. Supported: blip for vqa, conditional_generation, image_text.*blip-2 for vqa"
    ):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "newer", "auto_map": {"AutoModel": "code.Model"}}')
    with pytest.raises(ValueError, match="type 'newer'.*its own code, which is never run here"):
        load_model(str(tmp_path))


def test_full_disk_is_named(checkpoint, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BlipForQuestionAnswering, "from_pretrained", full)
    with pytest.raises(ValueError, match="The disk is full.*HF_HOME"):
        load_model(str(checkpoint))


HUB_FAILURES = """
import http.server, json, logging, os, tempfile, threading, time

CODES = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "empty": (404, "EntryNotFound")}

class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        status, error = next((code for name, code in CODES.items() if name in self.path), (404, "RepoNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD
    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
endpoint = f"http://tester:pass@word@127.0.0.1:{server.server_port}"
os.environ.update(HF_ENDPOINT=endpoint, HF_HOME=tempfile.mkdtemp(), HF_HUB_DISABLE_XET="1")
from blip_ft.models import load_model

logging.basicConfig()
messages = {}
for name in (*CODES, "down"):
    if name == "down":
        server.shutdown(), server.server_close()
        time.sleep = lambda seconds: None  # huggingface_hub retries five times
    try:
        load_model(f"owner/{name}")
    except ValueError as error:
        messages[name] = str(error)
print(json.dumps(messages))
"""


def test_hub_failures_tell_name_access_and_network_apart():
    # in a separate process, because huggingface_hub reads HF_ENDPOINT only when it is imported
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", HUB_FAILURES],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    messages = json.loads(done.stdout.splitlines()[-1])
    assert "not a model on the Hub that you can access. Check the spelling (owner/name)" in messages["missing"]
    assert "Accept its terms on its Hub page, and set HF_TOKEN" in messages["gated"]
    assert "is on the Hub, but a required file is missing" in messages["empty"]
    assert "http://127.0.0.1" in messages["down"] and "Check the network" in messages["down"]
    assert "thrown while requesting HEAD http://127.0.0.1" in done.stderr
    assert "tester" not in done.stdout + done.stderr and "@word" not in done.stdout + done.stderr


def test_loader_hands_out_its_parts_once_loaded(checkpoint):
    loader = ModelLoader(str(checkpoint), model_type="blip", task="vqa", device="cpu")
    for part in (loader.get_model, loader.get_processor, loader.get_tokenizer, loader.get_image_processor):
        with pytest.raises(ValueError, match=r"call load\(\) first"):
            part()
    loaded = loader.load(load_processor=True)
    assert loader.get_model() is loaded["model"] and loader.get_processor() is loaded["processor"]
    assert loader.get_tokenizer() is loaded["tokenizer"] and loader.get_image_processor() is loaded["image_processor"]
    assert list(ModelLoader.MODEL_REGISTRY["blip"]) == ["vqa", "conditional_generation", "image_text_retrieval"]


def test_model_loads_without_the_files_of_a_processor(golden):
    assert list(load_model(str(golden / "vqa"), load_processor=False, device=None)) == ["model"]
    with pytest.raises(ValueError, match="the processor's files"):
        load_model(str(golden / "vqa"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "torch.bfloat16"])
def test_weights_come_in_the_dtype_asked_for_and_answer(checkpoint, dtype):
    by_either_name = [load_model(str(checkpoint), **{name: dtype}) for name in ("torch_dtype", "dtype")]
    named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    assert {parameter.dtype for loaded in by_either_name for parameter in loaded["model"].parameters()} == {named}
    loaded, full = by_either_name[0], load_model(str(checkpoint))["model"]
    state = loaded["model"].state_dict()
    assert all(torch.equal(state[name], weight.to(named)) for name, weight in full.state_dict().items())
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    states, wanted = (m.encode_images(pixels.to(m.dtype)).last_hidden_state.float() for m in (loaded["model"], full))
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(states, wanted, atol=0.05, rtol=0.05)
    answers = generate_answer_blip(loaded["model"], loaded["processor"], RED, QUESTIONS)
    words = set(loaded["tokenizer"].get_vocab())
    assert len(answers) == 3 and all(answers) and {word for answer in answers for word in answer.split()} <= words


def test_device_map_places_and_answers(checkpoint):
    plain, mapped = load_model(str(checkpoint)), load_model(str(checkpoint), device_map="auto")
    assert answers_of(mapped["model"]) == pytest.approx(answers_of(plain["model"]))
    # layers that a map must not split are found by the names of our classes
    names = {type(module).__name__ for module in plain["model"].modules()}
    assert {"BlipEncoderLayer", "BlipTextLayer"} <= names & set(plain["model"]._no_split_modules)


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter on the checkpoint for visual question answering."""
    folder = tmp_path_factory.mktemp("adapter")
    add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True)).save_pretrained(folder)
    return folder


def change_json(path, **values):
    content = json.loads(path.read_text())
    for key, value in values.items():
        *outer, last = key.split("__")
        inner = content[outer[0]] if outer else content
        inner[last] = value
    path.write_text(json.dumps(content))


def change_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["base", "adapter"])
def test_weights_that_are_not_finite_are_refused_by_name(copy, adapter, tmp_path, of, value):
    path, name = copy / "model.safetensors", "vision_model.encoder.layers.0.self_attn.qkv.weight"
    folder = copy
    if of == "adapter":
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        path = folder / "adapter_model.safetensors"
        name = f"base_model.model.{name.removesuffix('weight')}lora_A.weight"
    change_weights(path, lambda tensors: tensors[name].view(-1)[7].fill_(value))
    with pytest.raises(ValueError, match=rf"NaN or infinite, in \S*{name.removesuffix('.weight')}"):
        load_model(str(folder))


def cut_vocabulary(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: number for word, number in content["model"]["vocab"].items() if number > 90}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [lambda folder: (folder / "tokenizer.json").unlink(), cut_vocabulary])
def test_tokenizer_without_the_words_of_the_weights_is_refused(copy, image_folder, damage):
    damage(copy)
    with pytest.raises(ValueError, match=r"was trained with 126 to 128. Check that tokenizer.json or vocab.txt exists"):
        load_model(str(copy))
    with pytest.raises(ValueError, match="copy the tokenizer's files from the checkpoint"):
        build_meta_model("vqa", ModelArguments(model_name_or_path=str(copy)), PeftArguments())
    pipeline = DataPipeline({"model_name_or_path": str(copy), "dataset_name": str(image_folder)})
    with pytest.raises(ValueError, match="Check that tokenizer.json"):
        pipeline.setup()


def drop(prefix):
    return lambda folder: change_weights(
        folder / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)],
    )


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (drop("text_encoder.encoder.layer.1."), "no weights for text_encoder.encoder.layer.1, which"),
        (drop("vision_model.encoder.layers.0.mlp.fc1.b"), "no weights for vision_model.encoder.layers.0.mlp.fc1.bias,"),
        (drop(""), "no weights for text_decoder, text_encoder, vision_model, which"),
        (
            lambda folder: change_json(folder / "config.json", text_config__num_hidden_layers=3),
            "no weights for text_decoder.bert.encoder.layer.2, text_encoder.encoder.layer.2, which",
        ),
        (
            lambda folder: change_json(folder / "config.json", vision_config__num_hidden_layers=1),
            "its weights of vision_model.encoder.layers.1 would not be used",
        ),
    ],
)
def test_missing_and_surplus_weights_are_refused_by_the_names_of_their_parts(copy, caplog, damage, parts):
    damage(copy)
    with pytest.raises(ValueError, match=re.escape(parts)) as refusal:
        load_model(str(copy))
    assert "add --allow_new_weights (load_model: allow_new_weights=True)" in str(refusal.value)
    assert isinstance(load_model(str(copy), allow_new_weights=True)["model"], BlipForQuestionAnswering)
    assert parts in caplog.text


def test_checkpoint_of_another_task_needs_allow_new_weights(checkpoints, recipe, image_folder, caplog):
    name = str(checkpoints["captioning"])
    flags = ["--model_name_or_path", name, "--dataset_name", str(image_folder), "--max_steps", "1"]
    flags += ["--per_device_train_batch_size", "2"]
    with pytest.raises(SystemExit):
        recipe(*flags)
    assert "no weights for text_encoder, which would be randomly initialized" in caplog.text
    recipe(*flags, "--allow_new_weights")
    with pytest.raises(SystemExit):
        recipe(*flags, "--allow_new_weights", "--use_peft", output_dir=image_folder.parent / "none")
    assert "new weights would be lost" in caplog.text


@pytest.mark.parametrize("task", ["vqa", "captioning", "retrieval"])
def test_weights_that_stock_writes_or_leaves_out_are_neither_missing_nor_surplus(checkpoints, tmp_path, task):
    """Checkpoints of 2022 contain position_ids and the tied head; those saved today contain neither."""
    folder = Path(shutil.copytree(checkpoints[task], tmp_path / task))
    model = load_model(str(folder))["model"]
    state = {**model.state_dict(), **{name: t for name, t in model.named_buffers() if "position_ids" in name}}
    assert len(state) > len(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    again = load_model(str(folder))["model"].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_adapter_of_another_task_or_base_is_refused(checkpoints, adapter, tmp_path):
    with pytest.raises(ValueError, match="is an adapter for the task vqa and cannot be used for conditional_gen"):
        load_model(str(adapter), task="conditional_generation")
    with pytest.raises(ValueError, match="is an adapter for the task vqa"):
        build_meta_model("image_text_retrieval", ModelArguments(model_name_or_path=str(adapter)), PeftArguments())
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    change_json(path, base_model_name_or_path=str(checkpoints["captioning"]))
    with pytest.raises(ValueError, match="captioning.*no weights for text_encoder"):
        load_model(str(folder))
    # a base of the same shapes for another task, a base of other shapes, and a base with more layers
    BlipForConditionalGeneration.from_pretrained(checkpoints["captioning"]).save_pretrained(tmp_path / "base")
    change_json(path, base_model_name_or_path=str(checkpoints["captioning"]), auto_mapping=None)
    with pytest.raises(ValueError, match=r"does not fit its base .*no layers for its weights of \S*text_encoder"):
        load_model(str(folder))
    for file in checkpoints["vqa"].iterdir():
        shutil.copy(file, tmp_path / "base")
    change_json(path, base_model_name_or_path=str(tmp_path / "base"))
    change_json(tmp_path / "base" / "config.json", vision_config__intermediate_size=64)
    with pytest.raises(ValueError, match=r"vision_model.encoder.layers.\d\S+ have different shapes"):
        load_model(str(folder))
    change_json(tmp_path / "base" / "config.json", vision_config__num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"it has no weights for \S+vision_model.encoder.layers.2, and"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["word_embeddings"], "word_embeddings is a layer of type Embedding"),
        (["query", "LayerNorm"], "LayerNorm"),
        (["query", "q_proj"], "q_proj matches none"),
        (["query", "decoder"], "decoder matches none. The head .cls, lm_head. cannot"),
    ],
)
def test_lora_target_that_is_no_linear_layer_is_refused_before_weights_load(checkpoint, targets, message):
    arguments = PeftArguments(use_peft=True, lora_target_modules=targets)
    with pytest.raises(ValueError, match=rf"lora_target_modules must name linear layers(.|\n)*{message}"):
        build_meta_model("vqa", ModelArguments(model_name_or_path=str(checkpoint)), arguments)


def test_lora_target_with_tied_weights_is_refused(checkpoint):
    model = load_model(str(checkpoint))["model"]
    layers = model.vision_model.encoder.layers
    layers[0].mlp.fc1.weight = layers[1].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"layers.0.mlp.fc1 shares its weights with another part"):
        add_lora(model, PeftArguments(use_peft=True, lora_target_modules=["fc1"]))
    convolution = add_lora(
        load_model(str(checkpoint))["model"], PeftArguments(use_peft=True, lora_target_modules=["patch_embedding"])
    )
    assert count_parameters(convolution)["trainable"] > 0


def test_freezing_a_tied_part_freezes_the_shared_weights(checkpoint):
    model = load_model(str(checkpoint))["model"]
    shared = model.text_decoder.bert.embeddings.word_embeddings.weight
    freeze_model(model, "text_decoder.cls.predictions.decoder.weight")
    assert count_parameters(model)["frozen"] == shared.numel() and not shared.requires_grad
    unfreeze_model(model, "text_decoder.cls.predictions.decoder")
    assert count_parameters(model)["frozen"] == 0
    arguments = ModelArguments(model_name_or_path=str(checkpoint), freeze="text_decoder.cls.predictions.decoder")
    meta_model, _ = build_meta_model("vqa", arguments, PeftArguments())
    assert not meta_model.text_decoder.bert.embeddings.word_embeddings.weight.requires_grad
    with pytest.raises(ValueError, match="freeze names text_decoder.cls.predictions.decoder, where nothing is trained"):
        build_meta_model("vqa", arguments, PeftArguments(use_peft=True))


def test_padding_stands_on_the_right_whatever_the_checkpoint_says(copy, checkpoint, image_folder):
    change_json(copy / "tokenizer_config.json", padding_side="left", truncation_side="left")
    answers = []
    for folder in (checkpoint, copy):
        loaded = load_model(str(folder))
        assert loaded["tokenizer"].padding_side == loaded["tokenizer"].truncation_side == "right"
        images = [str(image_folder / f"{number}.png") for number in range(4)] * 3
        questions = [question for question in QUESTIONS for _ in range(4)]
        answers.append(generate_answer_blip(loaded["model"], loaded["processor"], images, questions))
    assert answers[0] == answers[1]
    pipeline = DataPipeline({"model_name_or_path": str(copy), "dataset_name": str(image_folder)})
    pipeline.setup()
    assert pipeline.processor.tokenizer.padding_side == "right"


RUNS_CODE = """
import pathlib
pathlib.Path("MARK").write_text("ran")
from transformers import BertTokenizerFast, BlipProcessor, BlipConfig, BlipImageProcessor
class Tokenizer(BertTokenizerFast): pass
class Processor(BlipProcessor): pass
class Config(BlipConfig): pass
class ImageProcessor(BlipImageProcessor): pass
"""


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(copy, image_folder, tmp_path, monkeypatch, caplog):
    def asked(*args):
        raise AssertionError(f"asked on stdin: {args}")

    monkeypatch.setattr("builtins.input", asked)
    (copy / "code.py").write_text(RUNS_CODE.replace("MARK", str(tmp_path / "ran")))
    everything = {
        "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
        "AutoProcessor": "code.Processor",
        "AutoConfig": "code.Config",
        "AutoImageProcessor": "code.ImageProcessor",
        "AutoModel": "code.Model",
    }
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        change_json(copy / file, auto_map=everything)
    # names of classes that transformers does not have
    for names in (
        {},
        {"tokenizer_class": "Tokenizer"},
        {"tokenizer_class": "Tokenizer", "processor_class": "Processor"},
    ):
        change_json(copy / "tokenizer_config.json", **names)
        for load in (load_model, partial(load_model, trust_remote_code=True)):
            try:
                load(str(copy))
            except ValueError as error:
                assert "trust_remote_code" not in str(error)
        pipeline = DataPipeline({"model_name_or_path": str(copy), "dataset_name": str(image_folder)})
        with suppress(ValueError):
            pipeline.setup()
    assert not (tmp_path / "ran").exists()
    assert "trust_remote_code has no effect" in caplog.text


def test_every_call_that_loads_says_that_no_code_is_trusted():
    """PEFT's classes and our own do not run code; code in the text of the model card is not a call."""
    root = Path(__file__).parent.parent
    calls = [
        (path.name, ast.unparse(node))
        for path in [*root.glob("blip_ft/**/*.py"), *root.glob("recipes/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "get_config_dict")
    ]
    assert {name for name, _ in calls} == {"checkpoint_files.py", "models.py", "weight_checks.py"}, (
        "load a checkpoint with load_model"
    )
    for _, call in calls:
        # ModelLoader sets trust_remote_code=False in kwargs
        assert "trust_remote_code': False" in call or "kwargs" in call or "settings" in call or "PeftConfig" in call, (
            call
        )
    loader = ModelLoader("somewhere", trust_remote_code=True)
    assert loader.kwargs["trust_remote_code"] is False


def test_weights_saved_as_whole_numbers_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    name = "text_encoder.encoder.layer.0.output.dense.weight"
    save_file(weights | {name: weights[name].long()}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"integer weights in {name}"):
        load_model(str(copy))


CONFIG_VALUES = [
    ("config.json", "text_config__hidden_size", "768"),
    ("config.json", "text_config__num_attention_heads", 0),
    ("config.json", "vision_config__num_attention_heads", -1),
    ("config.json", "text_config__bos_token_id", 128),
    ("config.json", "text_config__bos_token_id", None),
    ("config.json", "text_config__hidden_act", "no_such"),
    ("config.json", "text_config__layer_norm_eps", float("inf")),
    ("config.json", "vision_config__image_mean", 0.5),
    ("config.json", "vision_config__image_size", []),
    ("config.json", "vision_config__patch_size", 0),
    ("config.json", "vision_config__hidden_size", 10**12),
    ("config.json", "vision_config", []),
    ("config.json", "architectures", 1),
    ("config.json", "dtype", "x"),
    ("config.json", "question_start_token", "dec"),
    ("config.json", "quantization_config", 4),
    ("config.json", "auto_map", 3),
    ("processor_config.json", "image_processor", 1),
    ("processor_config.json", "image_processor__image_std", [1, 2]),
    ("processor_config.json", "image_processor__image_std", [0, 0, 0]),
    ("tokenizer_config.json", "model_max_length", "x"),
    ("adapter_config.json", "r", "16"),
    ("adapter_config.json", "r", 10**12),
    ("adapter_config.json", "lora_alpha", None),
    ("adapter_config.json", "lora_alpha", float("nan")),
    ("adapter_config.json", "lora_dropout", "x"),
    ("adapter_config.json", "bias", 1),
    ("adapter_config.json", "target_modules", 7),
    ("adapter_config.json", "target_modules", ["q_proj"]),
    ("adapter_config.json", "peft_type", []),
    ("adapter_config.json", "auto_mapping", "x"),
    ("adapter_config.json", "base_model_name_or_path", 3),
    ("adapter_config.json", "init_lora_weights", 5),
    ("adapter_config.json", "megatron_config", "x"),
]


@pytest.mark.parametrize(("file", "key", "value"), CONFIG_VALUES)
def test_config_value_of_the_wrong_kind_is_one_message(copy, adapter, tmp_path, file, key, value):
    folder = copy
    if file == "adapter_config.json":
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_json(folder / file, **{key: value})
    with pytest.raises(ValueError, match=rf"{file}|different shapes|no weights"):
        load_model(str(folder))


def test_config_that_is_no_object_is_one_message(copy, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for path in (copy / "config.json", folder / "adapter_config.json"):
        for content in ("[]", "3", "null", '"x"', "{", ""):
            path.write_text(content)
            with pytest.raises(ValueError, match=r"config.json"):
                load_model(str(path.parent))


@pytest.mark.parametrize(
    ("task", "flag"),
    [
        ("vqa", "max_question_tokens"),
        ("vqa", "max_answer_tokens"),
        ("captioning", "max_caption_tokens"),
        ("captioning", "generation_max_length"),
        ("retrieval", "max_caption_tokens"),
    ],
)
def test_texts_longer_than_the_positions_are_refused_before_weights_load(
    checkpoints, recipe, image_folder, caplog, monkeypatch, task, flag
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    folder = ["--model_name_or_path", str(checkpoints[task]), "--dataset_name", str(image_folder)]
    with pytest.raises(SystemExit):
        recipe(*folder, f"--{flag}", "65", task=task)
    assert f"at most 64 tokens (max_position_embeddings in config.json), found {flag} 65. Set at most" in caplog.text


def test_prediction_of_texts_longer_than_the_positions_is_refused(checkpoint):
    with pytest.raises(ValueError, match="found max_question_tokens 65"):
        require_positions(load_model(str(checkpoint))["model"].config, SimpleNamespace(max_question_tokens=65))


def test_small_model_from_nothing_saves_a_checkpoint_and_learns(recipe, image_folder, tmp_path):
    rows = [json.loads(line) for line in (image_folder / "metadata.jsonl").read_text().splitlines()]
    texts = [row[column] for row in rows for column in ("question", "answer")]
    torch.manual_seed(0)
    model, processor = build_small_blip("vqa", [*texts, "Łódź, 東京"], image_size=32, width=64, max_tokens=40)
    assert model.vision_model.embeddings.num_patches == 16
    assert processor.tokenizer.unk_token_id not in processor.tokenizer("東京 łódź What color unheard-of 7").input_ids
    assert processor.tokenizer.tokenize("what color") == ["what", "color"]
    save_model(model, tmp_path / "small", processor=processor)
    again = load_model(str(tmp_path / "small"))
    assert all(torch.equal(again["model"].state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    data = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_train_batch_size", "8"]
    settings = ["--max_steps", "40", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
    folder = recipe("--model_name_or_path", str(tmp_path / "small"), *data, *settings)
    # without the image, at most half of the answers about dogs and a quarter of the colors can be right
    assert json.loads((folder / "all_results.json").read_text())["eval_vqa_accuracy"] == 100


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 60}, "multiple of patch_size, found 60 and 8"),
        ({"width": 130}, "multiple of num_heads, found 130 and 4"),
        ({"task": "detection"}, "task must be one of vqa"),
    ],
)
def test_small_model_of_sizes_that_do_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        build_small_blip(**{"task": "vqa", "texts": ["a dog"], **sizes})


RED, BLUE = (Image.new("RGB", (40, 36), color) for color in ("red", "blue"))
QUESTIONS = ["what color is it ?", "is it a dog ?", "how many dogs are there in the image at the left ?"]


def test_answers_to_a_list_are_those_of_one_by_one(checkpoint, image_folder, tmp_path):
    loaded = load_model(str(checkpoint))
    model, processor = loaded["model"], loaded["processor"]
    images = [RED, str(image_folder / "2.png"), RED, BLUE, str(image_folder / "2.png")]
    questions = [QUESTIONS[number % 3] for number in range(5)]
    several = []
    hook = model.vision_model.register_forward_pre_hook(lambda module, args: several.append(len(args[0])))
    answers = generate_answer_blip(model=model, processor=processor, image=images, question=questions)
    assert sum(several) == 3
    hook.remove()
    alone = [generate_answer_blip(model, processor, *pair) for pair in zip(images, questions, strict=True)]
    assert answers == alone and len(set(answers)) > 1
    assert generate_answer_blip(model, processor, RED, questions) == [
        generate_answer_blip(model, processor, RED, question) for question in questions
    ]
    assert generate_answer_blip(model, processor, [RED, BLUE], questions[0]) == [answers[0], answers[3]]
    small = {"images_at_once": 2, "questions_at_once": 1}
    assert inference.answer_questions(model, processor, images, questions, 20, 3, **small) == answers


def test_answering_leaves_dropout_out_and_the_mode_as_it_was(checkpoint):
    loaded = load_model(str(checkpoint), dropout=0.5)
    model = loaded["model"].train()
    answers = {generate_answer_blip(model, loaded["processor"], RED, QUESTIONS[0]) for _ in range(5)}
    assert len(answers) == 1 and model.training


def test_answering_refuses_uneven_lists_and_other_models(checkpoint):
    loaded = load_model(str(checkpoint))
    with pytest.raises(ValueError, match="2 images and 3 questions"):
        generate_answer_blip(loaded["model"], loaded["processor"], [RED, BLUE], QUESTIONS)
    stock = modeling_blip.BlipForQuestionAnswering.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"found transformers\.models\.blip.*Load it with load_model"):
        generate_answer_blip(stock, loaded["processor"], RED, QUESTIONS[0])


def test_prepared_inputs_are_those_of_the_processor(checkpoint):
    processor = load_model(str(checkpoint))["processor"]
    one = prepare_inputs_for_blip(processor=processor, images=RED, texts=QUESTIONS[0], device="cpu")
    many = prepare_inputs_for_blip(processor, [RED, BLUE.convert("L"), RED], QUESTIONS)
    assert one["pixel_values"].shape == (1, 3, 32, 32) and many["pixel_values"].shape == (3, 3, 32, 32)
    torch.testing.assert_close(many["pixel_values"][:1], one["pixel_values"])
    length = int(one["attention_mask"].sum())
    assert many["attention_mask"].sum(1)[0] == length < many["input_ids"].shape[1]
    assert many["input_ids"][0, :length].tolist() == one["input_ids"][0].tolist()
    with pytest.raises(ValueError, match="1 images and 3 texts"):
        prepare_inputs_for_blip(processor, RED, QUESTIONS)


def test_saved_model_loads_by_path_with_either_class(checkpoint, tmp_path):
    loaded = load_model(str(checkpoint))
    save_model(model=loaded["model"], save_path=tmp_path, tokenizer=loaded["tokenizer"], processor=loaded["processor"])
    for model_class in (BlipForQuestionAnswering, modeling_blip.BlipForQuestionAnswering):
        model = load_model_from_path(model_path=tmp_path, model_class=model_class, device="cpu")
        assert isinstance(model, model_class) and not model.training
        assert answers_of(model) == answers_of(loaded["model"])
    again = load_model(str(tmp_path))
    assert again["tokenizer"](QUESTIONS[1]).input_ids == loaded["tokenizer"](QUESTIONS[1]).input_ids
    with pytest.raises(ValueError, match="model_class must be one of BlipForQuestionAnswering"):
        load_model_from_path(tmp_path, modeling_blip.BlipModel)


def test_adapter_that_was_loaded_saves_for_stock_again(checkpoint, tmp_path):
    add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True)).save_pretrained(tmp_path / "first")
    save_model(load_model_from_path(tmp_path / "first", BlipForQuestionAnswering), tmp_path / "second")
    AutoPeftModel.from_pretrained(tmp_path / "second")


def test_device_size_and_information_agree_with_the_parameters(checkpoint):
    model = load_model(str(checkpoint))["model"]
    assert get_device(move_model_to_device(model, "cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="The device cuda:0 does not exist"):
        move_model_to_device(model, "cuda:0")
    tensors = [*model.parameters(), *model.buffers()]
    assert get_model_size_mb(model) == sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
    freeze_model(model, freeze_layers=["vision_model"])
    counts = count_parameters(model)
    assert get_model_info(model) == {
        "model_class": "BlipForQuestionAnswering",
        "task": "vqa",
        "total_parameters": counts["total"],
        "total_parameters_millions": counts["total"] / 1e6,
        "trainable_parameters": counts["trainable"],
        "trainable_parameters_millions": counts["trainable"] / 1e6,
        "size_mb": get_model_size_mb(model),
        "device": "cpu",
        "dtype": "float32",
        "image_size": 32,
        "is_adapter": False,
    }


def test_summary_prints_a_row_for_each_part(checkpoint, capsys):
    model = load_model(str(checkpoint))["model"]
    freeze_model(model, ["vision_model"])
    print_model_summary(model)
    header, *rows, total = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["part", "parameters", "trainable", "size", "dtype", "device"]
    assert [row[0] for row in rows] == ["vision_model", "text_encoder", "text_decoder"]
    numbers = [int(row[1].replace(",", "")) for row in (*rows, total)]
    assert sum(numbers[:-1]) == numbers[-1] == count_parameters(model)["total"]
    assert rows[0][2] == "0" and total[-2:] == ["float32", "cpu"]
    print_model_summary(model, detailed=True)
    assert "\n  text_decoder.cls " in capsys.readouterr().out


@pytest.mark.parametrize("cls", [BlipForConditionalGeneration, BlipForImageTextRetrieval])
def test_type_and_task_are_read_from_the_checkpoint(golden, processor, tmp_path, cls):
    cls(BlipConfig.from_pretrained(golden / "vqa")).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for model_type in (None, "auto", "blip"):
        assert type(load_model(str(tmp_path), model_type=model_type)["model"]) is cls


def test_hand_written_loop_learns_eight_rows_and_writes_them_back(checkpoint, image_folder, tmp_path):
    settings = {"model_name_or_path": str(checkpoint), "dataset_name": str(image_folder), "eval_split": "test"}
    config = tmp_path / "vqa_config.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()) + "dataloader_num_workers: 0\n")
    pipeline = DataPipeline(config)
    pipeline.setup()
    train_loader = pipeline.get_train_dataloader()
    result = load_model(str(checkpoint), model_type="blip", task="vqa", device="cpu", load_processor=True)
    model = result["model"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        for batch in train_loader:
            loss = model(
                pixel_values=batch["pixel_values"],
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=batch["labels"],
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_model(model=model, save_path=tmp_path / "mine", tokenizer=result["tokenizer"], processor=result["processor"])
    loaded, rows = load_model(str(tmp_path / "mine")), pipeline.train_rows
    answers = generate_answer_blip(
        loaded["model"], loaded["processor"], [row["path"] for row in rows["image"]], rows["question"]
    )
    assert len(rows) == 8 and answers == [answer for [answer] in rows["answers"]]


def test_eight_bits_answer_as_full_precision_does(demo_run):
    rows = demo.load_demo()["validation"].select(range(200))
    full, small = (load_model(str(demo_run("vqa")), device="cpu", load_in_8bit=bits) for bits in (False, True))
    images = [image["bytes"] for image in rows["image"]]
    answers, others = (
        generate_answer_blip(loaded["model"], loaded["processor"], images, rows["question"]) for loaded in (full, small)
    )
    assert sum(a == b for a, b in zip(answers, others, strict=True)) >= 190


def test_freezing_nothing_changes_nothing_and_a_string_is_one_name(checkpoint):
    model = load_model(str(checkpoint))["model"]
    freeze_model(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_model(model, "text_encoder.encoder.layer.0")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(name.startswith("text_encoder.encoder.layer.0.") for name in frozen)


def test_unfreezing_an_adapted_model_trains_the_adapter_alone(checkpoint):
    adapted = add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True))
    freeze_model(adapted)
    unfreeze_model(adapted)
    assert {"lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == {True}


def test_merged_adapter_can_be_trained(checkpoint, tmp_path):
    add_lora(load_model(str(checkpoint))["model"], PeftArguments(use_peft=True), "main").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "main"
    merged = load_model(str(tmp_path), merge=True)["model"]
    assert count_parameters(merged)["frozen"] == 0
    merged.train()(
        torch.randn(1, 3, 32, 32), torch.tensor([[101, 5, 102]]), labels=torch.tensor([[101, 5, 102]])
    ).loss.backward()


def test_answering_takes_arrays_and_paths_and_comes_back_from_errors(checkpoint, image_folder):
    loaded = load_model(checkpoint)
    model, processor = loaded["model"].train(), loaded["processor"]
    image = Image.open(image_folder / "1.png")
    answers = [generate_answer_blip(model, processor, opened, QUESTIONS[0]) for opened in (image, np.asarray(image))]
    assert answers[0] == answers[1] == generate_answer_blip(model, processor, [image], [QUESTIONS[0]] * 2)[1]
    with pytest.raises(ValueError, match="found a float"):
        generate_answer_blip(model, processor, 1.5, QUESTIONS[0])
    assert model.training
    long = prepare_inputs_for_blip(processor, image, "dog " * 1000)
    assert long["input_ids"].shape[1] == model.config.text_config.max_position_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_weights_saved_in_few_bits_answer_and_train_when_loaded_again(checkpoint, tmp_path, dtype):
    first = load_model(str(checkpoint), load_in_8bit=True, torch_dtype=dtype)
    save_model(first["model"], tmp_path, processor=first["processor"])
    again = load_model(str(tmp_path))
    answers = [generate_answer_blip(part["model"], part["processor"], RED, QUESTIONS) for part in (first, again)]
    assert answers[0] == answers[1]
