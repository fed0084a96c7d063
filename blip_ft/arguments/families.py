"""What distinguishes the families of models: prompts, end tokens, what is trained, and defaults of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# task -> the name of its recipe
RECIPES = {"vqa": "vqa", "conditional_generation": "captioning", "image_text_retrieval": "retrieval"}

NOTHING = "none"  # of --freeze


@dataclass(frozen=True)
class Family:
    """The settings of one family and language model; family_of finds them.

    Args:
        name: as in papers.
        language_model: text_config.model_type of its config.
        prompts: task, a key of RECIPES -> text before an answer or caption; {} stands for the question.
        end: text of the token that ends an answer, after `space` and the answer. None: the tokenizer's own end token.
        reads_prompts: the language model reads a prompt and writes the answer. False: BLIP, with its own decoder.
        freeze: what is frozen by default if no adapter is trained.
        lora_targets: layers with an adapter by default, names or a regular expression.
        defaults: task -> values of settings that the recipes leave to the family.
        penalties: task -> further arguments of generate.
        unquantized: layers that keep their precision in 8 and 4 bits. None: the embeddings and the layers tied to them.
    """

    name: str
    language_model: str
    prompts: dict[str, str]
    lora_targets: str | tuple[str, ...]
    defaults: dict[str, dict[str, Any]]
    reads_prompts: bool = True
    end: str | None = None
    freeze: str = ""
    penalties: dict[str, dict[str, float]] = field(default_factory=dict)
    unquantized: tuple[str, ...] | None = None


# all linear layers of attention and feed-forward. Not the head: it is tied to the embeddings, so merging changes both
BLIP_LORA_TARGETS = ("query", "key", "value", "dense", "qkv", "projection", "fc1", "fc2")

BLIP = Family(
    name="BLIP",
    language_model="blip_text_model",
    prompts={"vqa": "{}", "conditional_generation": "a picture of "},
    lora_targets=BLIP_LORA_TARGETS,
    reads_prompts=False,
    defaults={
        # configs/vqa.yaml of BLIP: 16 GPUs x 16 images, 2e-5, 10 epochs; 3 beams
        "vqa": {
            "label_smoothing": 0.1,
            "learning_rate": 2e-5,
            "num_train_epochs": 10,
            "warmup_steps": 0,
            "max_question_tokens": 35,
            "max_answer_tokens": 30,
            "generation_max_length": 10,
            "generation_num_beams": 3,
        },
        # configs/caption_coco.yaml of BLIP: 8 GPUs x 32 images, 1e-5, 5 epochs; 3 beams, 5 to 20 tokens
        "conditional_generation": {
            "label_smoothing": 0.1,
            "learning_rate": 1e-5,
            "num_train_epochs": 5,
            "warmup_steps": 0,
            "max_caption_tokens": 40,
            "generation_max_length": 20,
            "generation_min_length": 5,
            "generation_num_beams": 3,
            "repetition_penalty": 1.0,
        },
        # configs/retrieval_coco.yaml of BLIP; LAVIS blip/train/retrieval_coco_ft.yaml has 2e-5 and decay 0.04
        "image_text_retrieval": {
            "label_smoothing": 0.1,
            "learning_rate": 1e-5,
            "num_train_epochs": 6,
            "warmup_steps": 0,
        },
    },
)

# LAVIS projects/blip2/train/caption_coco_ft.yaml: 1e-5, 5 epochs, 1000 steps of warm-up, which are 9 % of its run
_LAVIS = {"label_smoothing": 0.0, "learning_rate": 1e-5, "num_train_epochs": 5, "warmup_steps": 0.09}

# small, and all that the language model knows of an image comes through the first two
_UNQUANTIZED = ("qformer", "language_projection", "lm_head")

# layers of the language model only, never the head
_OPT_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_LLAMA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_T5_TARGETS = r".*language_model\..*\.(q|k|v|o|wi|wi_0|wi_1|wo)"


def _blip2(language_model: str, lora_targets: str, length_penalty: float, end: str | None = None) -> Family:
    """BLIP-2. Sources in LAVIS: models/blip2_models/blip2_opt.py:68-89 and 282-349, blip2_t5.py:296-304,
    projects/blip2/eval/vqav2_zeroshot_opt_eval.yaml, projects/blip2/train/caption_coco_ft.yaml.
    """
    return Family(
        name="BLIP-2",
        language_model=language_model,
        prompts={"vqa": "Question: {} Short answer:", "conditional_generation": "a photo of"},
        lora_targets=lora_targets,
        end=end,
        freeze="language_model",
        penalties={"vqa": {"length_penalty": length_penalty}},
        unquantized=_UNQUANTIZED,
        defaults={
            "vqa": {
                **_LAVIS,
                "max_question_tokens": 32,
                "max_answer_tokens": 32,
                "generation_max_length": 10,
                "generation_num_beams": 5,
            },
            "conditional_generation": {
                **_LAVIS,
                "max_caption_tokens": 32,
                "generation_max_length": 30,
                "generation_min_length": 8,
                "generation_num_beams": 5,
                "repetition_penalty": 1.0,
            },
        },
    )


def _instructblip(language_model: str, lora_targets: str, answer_tokens: int) -> Family:
    """InstructBLIP. Sources in LAVIS: models/blip2_models/blip2_vicuna_instruct.py:365-379,
    projects/instructblip/qa_okvqa_vicuna7b_eval.yaml, projects/instructblip/caption_coco_vicuna7b_eval_test.yaml.
    """
    return Family(
        name="InstructBLIP",
        language_model=language_model,
        prompts={"vqa": "Question: {} Short Answer:", "conditional_generation": "A short image caption."},
        lora_targets=lora_targets,
        # LAVIS freezes visual_encoder, and trains ln_vision, here post_layernorm
        freeze="language_model,vision_model.embeddings,vision_model.encoder",
        penalties={"vqa": {"length_penalty": -1.0, "repetition_penalty": 1.5}},
        unquantized=_UNQUANTIZED,
        defaults={
            "vqa": {
                **_LAVIS,
                "max_question_tokens": 128,
                "max_answer_tokens": 256,
                "generation_max_length": answer_tokens,
                "generation_num_beams": 5,
            },
            "conditional_generation": {
                **_LAVIS,
                "max_caption_tokens": 256,
                "generation_max_length": 80,
                "generation_min_length": 10,
                "generation_num_beams": 5,
                "repetition_penalty": 1.5,
            },
        },
    )


# model_type and text_config.model_type of config.json
FAMILIES: dict[tuple[str, str], Family] = {
    ("blip", "blip_text_model"): BLIP,
    ("blip-2", "opt"): _blip2("opt", _OPT_TARGETS, length_penalty=0.0, end="\n"),
    ("blip-2", "t5"): _blip2("t5", _T5_TARGETS, length_penalty=-1.0),
    ("instructblip", "llama"): _instructblip("llama", _LLAMA_TARGETS, answer_tokens=9),
    ("instructblip", "t5"): _instructblip("t5", _T5_TARGETS, answer_tokens=10),
}


def family_of(config: Any) -> Family:
    """The family of a model's config. Raises: ValueError for a language model that is not supported."""
    kind = config.model_type, config.text_config.model_type
    if kind not in FAMILIES:
        known = ", ".join(f"{model} with {text}" for model, text in FAMILIES)
        raise ValueError(f"{kind[0]} with the language model {kind[1]} is not supported; supported: {known}.")
    return FAMILIES[kind]


def fill_defaults(family: Family, task: str, longest: int, *arguments: Any) -> None:
    """Set the settings that are None to the family's defaults, in place.

    Args:
        longest: number of tokens that a text of this model can have; no default is larger. Of a prompt and an answer
            that one network reads, each default is at most half of it.
        arguments: dataclasses.
    """
    longest = longest // 2 if family.reads_prompts else longest
    for part in arguments:
        for name, value in family.defaults[task].items():
            if getattr(part, name, 0) is None:
                setattr(part, name, min(value, longest) if name.endswith("_tokens") else value)


def frozen_parts(family: Family, freeze: str | None, use_peft: bool) -> Sequence[str]:
    """Names of the parts that --freeze names, or the family's default."""
    if freeze is None:
        freeze = "" if use_peft else family.freeze
    names = [name.strip() for name in freeze.split(",") if name.strip()]
    return [] if names == [NOTHING] else names
