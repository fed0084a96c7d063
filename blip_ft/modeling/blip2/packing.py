"""Rows of a decoder-only language model that share an image prefix: each prefix and each prompt is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from blip_ft.data.texts import IGNORED

NONE = -1  # "no question": the prefix; "no answer": a prompt


@dataclass
class Packed:
    """Prompts and answers in rows that begin with an image prefix; see pack.

    Args:
        input_ids: (rows, length), the tokens after the prefix; 0 on padding.
        position_ids: (rows, prefix + length). They restart at `prefix` for each prompt, and after it for each answer.
        mask: (rows, prefix + length) of 0 and 1 if no row has two prompts or two answers. Otherwise
            (rows, 1, prefix + length, prefix + length), True where a position reads another.
        target_row, target_column: (num_targets,), the position in (rows, prefix + length) that predicts each target.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    target_row: torch.Tensor
    target_column: torch.Tensor


def pack(
    prefix: int,
    row_of_question: torch.Tensor,
    num_rows: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    question_index: torch.Tensor,
    multiple: int = 1,
) -> Packed:
    """Lay out [prefix][prompt 1][its answers][prompt 2]... in each row.

    A position reads what comes before it and belongs to the prefix, to its own question's prompt, or to its own answer.
    The first token of an answer is predicted by the last token of the prompt, which its answers share. The last token
    of an answer predicts nothing, and is left out.

    Args:
        prefix: number of positions of the image.
        row_of_question: (num_questions,), from 0 to num_rows - 1.
        input_ids, attention_mask: (num_questions, prompt_length).
        labels: (num_answers, answer_length), -100 on padding, which is on the right.
        question_index: (num_answers,).
        multiple: the length of the rows is a multiple of this number.
    """
    lengths = attention_mask.sum(1)
    tokens = _list_tokens(row_of_question, lengths, input_ids, attention_mask, labels, question_index)
    row, column = tokens.row, tokens.column
    length = prefix + (int(column.max()) + 1 if len(column) else 0)
    length += -length % multiple

    def scatter(values: torch.Tensor, fill: int) -> torch.Tensor:
        return values.new_full((num_rows, length - prefix), fill).index_put((row, column), values)

    # padding asks a question that does not exist, so that it reads the prefix only: a row of False would give NaN
    questions, answers = scatter(tokens.question, NONE - 1), scatter(tokens.answer, NONE)
    is_branched = any(bool((index.bincount() > 1).any()) for index in (row_of_question, question_index))
    starts = torch.arange(prefix, device=row.device).expand(num_rows, -1)
    no_question = torch.full_like(starts, NONE)
    counted = labels != IGNORED
    return Packed(
        input_ids=scatter(tokens.id, 0),
        position_ids=torch.cat([starts, prefix + scatter(tokens.position, 0)], 1),
        mask=(
            _branch_mask(torch.cat([no_question, questions], 1), torch.cat([no_question, answers], 1))
            if is_branched
            else torch.cat([torch.ones_like(starts), (questions >= 0).long()], 1)
        ),
        target_row=row_of_question[question_index][:, None].expand(labels.shape)[counted],
        target_column=prefix + _predictors(tokens, lengths, labels, question_index)[counted],
    )


class _Tokens(NamedTuple):
    """The tokens of all rows, one after the other; each entry is (num_tokens,). answer: NONE in a prompt."""

    id: torch.Tensor
    position: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


def _list_tokens(
    row_of_question: torch.Tensor,
    lengths: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    question_index: torch.Tensor,
) -> _Tokens:
    """lengths: (num_questions,) of the prompts. Other arguments as in pack."""
    counted = labels != IGNORED
    read = counted.clone()
    read[:, :-1] &= counted[:, 1:]  # a token is read if another one follows
    read[:, -1] = False
    question, place = attention_mask.nonzero(as_tuple=True)
    answer, answer_place = read.nonzero(as_tuple=True)
    ids = torch.cat([input_ids[question, place], labels[answer, answer_place]])
    position = torch.cat([place, lengths[question_index[answer]] + answer_place])
    owner = torch.cat([question, question_index[answer]])
    part = torch.cat([torch.full_like(question, NONE), answer])
    row = row_of_question[owner]
    order = torch.arange(len(ids), device=ids.device)
    for key in (part, owner, row):  # the last sort decides first
        order = order[key[order].argsort(stable=True)]
    row = row[order]
    in_row = row.bincount()
    column = torch.arange(len(ids), device=ids.device) - (in_row.cumsum(0) - in_row)[row]
    return _Tokens(ids[order], position[order], owner[order], part[order], row, column)


def _predictors(
    tokens: _Tokens, lengths: torch.Tensor, labels: torch.Tensor, question_index: torch.Tensor
) -> torch.Tensor:
    """(num_answers, answer_length), the column, without the prefix, whose state predicts each label."""
    is_prompt_end = (tokens.answer == NONE) & (tokens.position == lengths[tokens.question] - 1)
    prompt_end = torch.full_like(lengths, -1)  # of an empty prompt: the prefix's last position
    prompt_end[tokens.question[is_prompt_end]] = tokens.column[is_prompt_end]
    column_of_token = torch.zeros_like(labels)
    is_answer = tokens.answer != NONE
    place = tokens.position - lengths[tokens.question]
    column_of_token[tokens.answer[is_answer], place[is_answer]] = tokens.column[is_answer]
    return torch.cat([prompt_end[question_index][:, None], column_of_token[:, :-1]], 1)


def _branch_mask(questions: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """(rows, 1, length, length), True where a position reads another. questions, answers: (rows, length)."""
    length = questions.shape[1]
    is_before = torch.ones(length, length, dtype=torch.bool, device=questions.device).tril()
    same_question = (questions[:, None] == NONE) | (questions[:, None] == questions[:, :, None])
    same_answer = (answers[:, None] == NONE) | (answers[:, None] == answers[:, :, None])
    return (is_before & same_question & same_answer)[:, None]
