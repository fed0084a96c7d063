"""How each family of models reads questions and captions, and writes answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BlipProcessor, InstructBlipProcessor, PreTrainedTokenizerBase, ProcessorMixin

from blip_ft.arguments.families import BLIP, Family, family_of
from blip_ft.data.texts import (
    IGNORED,
    clean_question,
    decode_texts,
    encode_labels,
    encode_prompt,
    encode_texts,
    require_order,
    require_room,
)

Tensors = dict[str, torch.Tensor]

COPY_PROCESSOR = "Copy the processor's files from the checkpoint that this one was fine-tuned from."


class BlipTexts:
    """Texts of BLIP: BERT's tokens, [CLS] first and [SEP] last.

    Args:
        prompt: text of a question, {} stands for the question; or the beginning of every caption.
        clean_questions: whether questions are cleaned before they are read.
    """

    family = BLIP

    def __init__(self, processor: BlipProcessor, prompt: str, clean_questions: bool) -> None:
        self.tokenizer, self.prompt, self.clean_questions = processor.tokenizer, prompt, clean_questions
        self.end_token_id: int = self.tokenizer.sep_token_id

    def encode_questions(self, questions: Sequence[str], max_tokens: int) -> Tensors:
        """input_ids and attention_mask, (num_questions, question_length), truncated to max_tokens."""
        if self.clean_questions:
            questions = [clean_question(question) for question in questions]
        return encode_texts(fill_prompt(self.prompt, questions), self.tokenizer, max_tokens)

    def encode_answers(self, answers: Sequence[str], max_tokens: int) -> torch.Tensor:
        """labels (num_answers, answer_length), -100 on padding."""
        return encode_labels(answers, self.tokenizer, max_tokens)

    def encode_captions(self, captions: Sequence[str], max_tokens: int, readable: torch.Tensor) -> Tensors:
        """Prompts and captions to learn; readable (num_captions,) is False for captions that do not count.

        Returns: input_ids, attention_mask and labels (num_captions, length) of prompt and caption, -100 on the prompt.
        """
        tokens = encode_texts([self.prompt + caption for caption in captions], self.tokenizer, max_tokens)
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
        labels[:, : len(encode_prompt(self.prompt, self.tokenizer))] = IGNORED
        labels[~readable] = IGNORED
        return {**tokens, "labels": labels}

    def encode_caption_prompts(self, number: int) -> Tensors:
        """input_ids (number, prompt_length): [CLS] and the prompt, without [SEP]."""
        return {"input_ids": torch.tensor([encode_prompt(self.prompt, self.tokenizer)] * number)}

    def decode(self, token_ids: torch.Tensor) -> list[str]:
        """The text of each row up to its end token."""
        return decode_texts(token_ids, self.tokenizer, self.end_token_id)

    def generation(self, max_length: int, num_beams: int, **settings: Any) -> dict[str, Any]:
        """Arguments of generate. max_length: number of tokens, with prompt, first and last token."""
        return {"max_length": max_length, "num_beams": num_beams, "do_sample": False, **settings}

    def require_room_for_questions(self, max_question_tokens: int, *answer_lengths: int | None) -> None:
        """Raise ValueError if the prompt leaves no room for a question. Answers are read by another network."""
        require_room_for_question(self.prompt, self.tokenizer, max_question_tokens)

    def require_room_for_captions(self, max_caption_tokens: int | None, max_length: int, min_length: int) -> None:
        """Raise ValueError if the prompt leaves no room for a word and [SEP]. All lengths include the prompt."""
        prompt_length = len(encode_prompt(self.prompt, self.tokenizer))
        require_room(self.prompt, prompt_length, max_caption_tokens, max_length, min_length)


class PromptTexts:
    """Texts of BLIP-2 and InstructBLIP: a prompt that the language model reads, and an answer that it writes.

    Args:
        prompt: text before an answer, {} stands for the question; or the text before every caption.
        penalties: further arguments of generate.
        clean_questions: whether questions are cleaned before they are put into the prompt.
    Source: LAVIS models/blip2_models/blip2_opt.py, blip2_t5.py and blip2_vicuna_instruct.py. Unlike it, a long prompt
        is truncated on the left in all families, so that it still ends as trained.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        family: Family,
        prompt: str,
        penalties: dict[str, float],
        clean_questions: bool,
    ) -> None:
        self.penalties, self.clean_questions = penalties, clean_questions
        self.family, self.processor, self.tokenizer, self.prompt = family, processor, processor.tokenizer, prompt
        self.end_token_id = end_token_id(self.tokenizer, family)
        self.space = " " if family.end else ""  # OPT's tokens of words begin with their space

    def encode_questions(self, questions: Sequence[str], max_tokens: int) -> Tensors:
        """input_ids and attention_mask (num_questions, prompt_length); for InstructBLIP also of its Q-Former.

        A placeholder in a question, as LLaVA's data has it, is left out: the image comes before the prompt.
        """
        questions = [question.replace("<image>", "").strip() for question in questions]
        if self.clean_questions:
            questions = [clean_question(question) for question in questions]
        return encode_prompts(self.processor, fill_prompt(self.prompt, questions), max_tokens)

    def encode_answers(self, answers: Sequence[str], max_tokens: int) -> torch.Tensor:
        """labels (num_answers, answer_length): answers with their end token, -100 on padding."""
        texts = [self.space + answer.strip() for answer in answers]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*row[: max_tokens - 1], self.end_token_id]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def encode_captions(self, captions: Sequence[str], max_tokens: int, readable: torch.Tensor) -> Tensors:
        """A prompt for each caption, and the captions as its answers; see encode_questions and encode_answers.

        Returns also question_index and answer_weights (num_captions,), 0 where readable is False.
        """
        return {
            **self.encode_caption_prompts(len(captions)),
            "labels": self.encode_answers(captions, max_tokens),
            "question_index": torch.arange(len(captions)),
            "answer_weights": readable.float(),
        }

    def encode_caption_prompts(self, number: int) -> Tensors:
        """As encode_questions, with the prompt of captions in each row."""
        return encode_prompts(self.processor, [self.prompt] * number, self.tokenizer.model_max_length)

    def decode(self, token_ids: torch.Tensor) -> list[str]:
        """The text of each row up to its end token."""
        return decode_texts(token_ids, self.tokenizer, self.end_token_id)

    def generation(self, max_length: int, num_beams: int, **settings: Any) -> dict[str, Any]:
        """Arguments of generate. max_length: number of new tokens."""
        settings = self.penalties | settings
        if "min_length" in settings:
            settings["min_new_tokens"] = settings.pop("min_length")
        if num_beams == 1:
            settings.pop("length_penalty", None)  # it compares beams
        # configs on the Hub name wrong tokens for Vicuna v1.1; its tokenizer is right
        tokens = {"eos_token_id": self.end_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        return {"max_new_tokens": max_length, "num_beams": num_beams, "do_sample": False, **tokens, **settings}

    def require_room_for_questions(self, max_question_tokens: int, *answer_lengths: int | None) -> None:
        """Raise ValueError if the prompt leaves no room for a question, or a question none for its answer."""
        require_room_for_question(self.prompt, self.tokenizer, max_question_tokens)
        self._require_positions("max_question_tokens", max_question_tokens, answer_lengths)

    def require_room_for_captions(self, max_caption_tokens: int | None, max_length: int, min_length: int) -> None:
        """Raise ValueError if the prompt leaves no room for a caption. No length includes the prompt."""
        require_order(min_length, max_length)
        prompt_length = len(self.tokenizer(self.prompt)["input_ids"])
        self._require_positions(f"the prompt {self.prompt!r}", prompt_length, (max_caption_tokens, max_length))

    def _require_positions(self, what: str, length: int, answer_lengths: Sequence[int | None]) -> None:
        longest, needed = self.tokenizer.model_max_length, length + max(number or 0 for number in answer_lengths)
        if needed > longest:
            raise ValueError(
                f"Beside the image the model reads at most {longest} tokens of a prompt and its answer, but {what} "
                f"({length} tokens) and the longest answer ({needed - length}) need {needed}. Shorten one of them."
            )


Texts = BlipTexts | PromptTexts


def texts_of(
    processor: ProcessorMixin, family: Family, task: str, prompt: str | None = None, clean_questions: bool = False
) -> Texts:
    """The texts of a family for one task. prompt: None is the family's.

    Raises: ValueError if the prompt of questions has no place for the question.
    """
    prompt = family.prompts[task] if prompt is None else prompt
    if task == "vqa" and "{}" not in prompt:
        raise ValueError(f"question_prompt needs {{}} where the question goes, found {prompt!r}.")
    if family.reads_prompts:
        return PromptTexts(processor, family, prompt, family.penalties.get(task, {}), clean_questions)
    return BlipTexts(processor, prompt, clean_questions)


def texts_of_checkpoint(
    processor: ProcessorMixin,
    config: Any,
    task: str,
    prompt: str | None = None,
    clean_questions: bool | None = None,
) -> Texts:
    """The texts of a checkpoint, given its config.

    Args:
        prompt: None is that of its training, or else the family's.
        clean_questions: None is as in its training, or else False.
    """
    if prompt is None:
        prompt = getattr(config, "prompt", None)
    if clean_questions is None:
        clean_questions = getattr(config, "clean_questions", False)
    return texts_of(processor, family_of(config), task, prompt, clean_questions)


def encode_prompts(processor: ProcessorMixin, prompts: Sequence[str], max_tokens: int) -> Tensors:
    """Prompts of BLIP-2 and InstructBLIP: input_ids and attention_mask (num_prompts, length), padded on the right.

    For InstructBLIP also qformer_input_ids and qformer_attention_mask. The processor itself would put `<image>` before
    the padding, and count max_tokens without the image.
    """
    tokens = encode_texts(prompts, processor.tokenizer, max_tokens)
    if isinstance(processor, InstructBlipProcessor):
        tokenizer = processor.qformer_tokenizer
        own = encode_texts(prompts, tokenizer, min(max_tokens, tokenizer.model_max_length))
        tokens |= {f"qformer_{name}": tensor for name, tensor in own.items()}
    return tokens


def require_room_for_question(prompt: str, tokenizer: PreTrainedTokenizerBase, max_question_tokens: int) -> None:
    """Raise ValueError if the prompt alone fills max_question_tokens, so that each question would be cut off."""
    fixed = len(tokenizer(prompt.replace("{}", ""))["input_ids"])
    if fixed >= max_question_tokens:
        raise ValueError(
            f"max_question_tokens {max_question_tokens} leaves no room for a question: the prompt {prompt!r} needs "
            f"{fixed} tokens. Set --max_question_tokens to {fixed + 1} or more, or shorten --question_prompt."
        )


def fill_prompt(prompt: str, questions: Sequence[str]) -> list[str]:
    return [prompt.replace("{}", question) for question in questions]


def end_token_id(tokenizer: PreTrainedTokenizerBase, family: Family) -> int:
    """Id of the token that ends an answer."""
    if family.end is None:
        return tokenizer.eos_token_id
    return tokenizer(family.end, add_special_tokens=False)["input_ids"][0]


def require_family(tokenizer: PreTrainedTokenizerBase, family: Family, name: str) -> None:
    """Raise ValueError for a tokenizer that does not write the special tokens of the family's language model."""
    ids, end = tokenizer("a", add_special_tokens=True)["input_ids"], tokenizer.eos_token_id
    of_end = [] if family.end is None else tokenizer(family.end, add_special_tokens=False)["input_ids"]
    problem = None
    if end is None:
        problem = "it has no end token"
    elif family.end and (len(of_end) != 1 or tokenizer.decode(of_end) != family.end):
        problem = f"{family.end!r}, which ends its answers, must be one token, and is {len(of_end)}"
    elif family.language_model == "t5" and ids[-1] != end:
        problem = f"its texts must end with {tokenizer.eos_token}, and do not"
    elif family.language_model != "t5" and ids[-1] == end:
        problem = f"its texts must not end with {tokenizer.eos_token}, and do"
    if problem:
        raise ValueError(
            f"The tokenizer of {name} ({type(tokenizer).__name__}) is not for {family.name} with the language model "
            f"{family.language_model}: {problem}. {COPY_PROCESSOR}"
        )
