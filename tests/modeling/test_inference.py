"""Ranking images and texts against each other, and how sure a model is of what it writes."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from blip_ft.arguments.families import BLIP
from blip_ft.data.text_formats import texts_of
from blip_ft.data.texts import encode_prompt
from blip_ft.modeling.blip.base import sequence_probabilities
from blip_ft.modeling.blip.captioning import BlipForConditionalGeneration
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.modeling.inference import (
    SeededChoice,
    caption,
    caption_several,
    embed_texts,
    encode_questions,
    match_texts,
    rank_pairs,
    rank_texts,
    sampling,
)

OWNER = np.array([0, 0, 1, 2, 2, 2, 3])  # the image of each of seven texts


@pytest.fixture
def ranked(golden):
    """Runs rank_pairs as the trainer does, two images a batch, and gives what a slow computation is made of."""
    model = BlipForImageTextRetrieval.from_pretrained(golden / "retrieval")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 90, (7, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(3, 7, (7, 1), generator=generator)).long()

    def collect(predict, description, unreadable=()):
        with torch.no_grad():
            batches = [predict(model, {"pixel_values": pixels[rows]}, rows) for rows in ([0, 1], [2, 3])]
        return [
            None if row in unreadable else result for row, result in enumerate(result for b in batches for result in b)
        ]

    return model, pixels, ids * mask, mask, collect


def test_ranking_equals_scoring_every_pair(ranked):
    model, pixels, ids, mask, collect = ranked
    with torch.no_grad():
        stock = [
            model(pixels[[image]].repeat(7, 1, 1, 1), ids, mask, use_itm_head=True).itm_score[:, 1]
            for image in range(4)
        ]
        wanted = model(pixels, ids, mask, image_index=torch.arange(4), use_itm_head=False).itm_score.numpy()
    logits = torch.stack(stock).numpy()
    cosines, for_texts, for_images = rank_pairs(collect, OWNER, ids, mask, k=2)
    np.testing.assert_allclose(cosines, wanted, atol=1e-6)
    for image in range(4):
        best = np.argsort(-wanted[image])[:2]
        np.testing.assert_allclose(for_texts[image, best], (wanted + logits)[image, best], atol=1e-5)
        assert np.isneginf(np.delete(for_texts[image], best)).all()
    for text in range(7):
        best = np.argsort(-wanted[:, text])[:2]
        np.testing.assert_allclose(for_images[best, text], (wanted + logits)[best, text], atol=1e-5)
        assert np.isneginf(np.delete(for_images[:, text], best)).all()


def test_unreadable_image_is_found_by_nothing_and_finds_nothing(ranked):
    _, _, ids, mask, collect = ranked
    scores = rank_pairs(lambda *args: collect(*args, unreadable=(2,)), OWNER, ids, mask, k=100)
    for matrix in scores:
        assert np.isneginf(matrix[2]).all() and np.isneginf(matrix[:, 3:6]).all()
        assert np.isfinite(np.delete(matrix, 2, axis=0)[:, [0, 1, 2, 6]]).all()
    with pytest.raises(ValueError, match="None of the images to evaluate on can be read"):
        rank_pairs(lambda *args: collect(*args, unreadable=range(4)), OWNER, ids, mask, k=1)


def test_probability_of_an_answer_is_the_product_of_its_tokens_whatever_the_beams(golden):
    """By hand: one row at a time without padding, token by token, through the decoder's own head."""
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    model.text_decoder.label_smoothing = 0.1
    text = model.config.text_config
    states = torch.randn(3, 5, text.encoder_hidden_size)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    for num_beams in (1, 3):
        ids = model.generate_answers((states, mask), max_length=7, num_beams=num_beams, do_sample=False)
        # a row that ends early, as generate pads it, one that is cut, and one as it came
        ids[0, 2:] = torch.tensor([text.sep_token_id] + [text.pad_token_id] * (ids.shape[1] - 3))
        ids[1] = torch.where(ids[1] == text.sep_token_id, 9, ids[1])
        wanted = []
        for row, state, seen in zip(ids, states, mask, strict=True):
            product = 1.0
            for place in range(1, len(row)):
                with torch.no_grad():
                    hidden = model.text_decoder.bert(
                        input_ids=row[None, :place], encoder_hidden_states=state[None, seen.bool()], is_decoder=True
                    ).last_hidden_state
                    logits = model.text_decoder.cls(hidden)[0, -1]
                product *= torch.softmax(logits, 0)[row[place]].item()
                if row[place] == text.sep_token_id:
                    break
            wanted.append(product)
        found = model.sequence_probabilities((states, mask), ids, text.sep_token_id)
        np.testing.assert_allclose(found.detach(), wanted, rtol=1e-4)


def test_probability_of_a_caption_does_not_count_its_prompt(golden, processor):
    model = BlipForConditionalGeneration.from_pretrained(golden / "captioning")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        texts = texts_of(processor, BLIP, "conditional_generation")
        _, (first, _) = caption(model, texts, pixels, texts.generation(12, 2, min_length=5))
        states = model.encode_images(pixels).last_hidden_state
        prompt = torch.tensor([encode_prompt("a picture of ", processor.tokenizer)] * 2)
        ids = model.generate_captions(states, prompt, max_length=12, min_length=5, num_beams=2, do_sample=False)
        whole, given = (
            sequence_probabilities(model, part, 1, texts.end_token_id, states)[0].item() for part in (ids, ids[:, :4])
        )
    assert first == pytest.approx(whole / given, rel=1e-4)


def test_ranked_texts_are_those_of_the_largest_sum(ranked):
    model, pixels, ids, mask, collect = ranked
    _, for_texts, _ = rank_pairs(collect, OWNER, ids, mask, k=3)
    with torch.no_grad():
        features = embed_texts(model, ids, mask, texts_at_once=2)
        best = rank_texts(model, pixels, features, ids, mask, k=3)
    for row, found in enumerate(best):
        order = np.argsort(-for_texts[row])[:3]
        assert [place for place, _ in found] == order.tolist()
        np.testing.assert_allclose([score for _, score in found], for_texts[row, order], atol=1e-5)


def test_questions_are_encoded_as_by_the_model_from_images_or_their_states(golden):
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa").eval()
    pixels, index = torch.randn(2, 3, 32, 32), torch.tensor([1, 0, 1])
    ids = torch.randint(1, 90, (3, 5))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_index": index}
    with torch.no_grad():
        image_states = model.encode_images(pixels).last_hidden_state
        wanted = model.encode_pairs(image_states, ids, tokens["attention_mask"], index)
        for images in ({"pixel_values": pixels}, {"image_states": image_states}):
            states, mask = encode_questions(model, {**images, **tokens})
            assert torch.equal(states, wanted) and mask is tokens["attention_mask"]


def test_drawn_captions_depend_on_seed_image_and_number_alone(golden, processor):
    model = BlipForConditionalGeneration.from_pretrained(golden / "captioning").eval()
    texts = texts_of(processor, BLIP, "conditional_generation")
    pixels = torch.randn(3, 32, 32).repeat(3, 1, 1, 1)

    def draw(rows, number, seed=0):
        ids = [f"{row}.png" for row in rows]
        draws = sampling(seed, ids, number, 20, model.device)
        generation = texts.generation(20, 1, min_length=5, repetition_penalty=1.1, logits_processor=draws)
        with torch.no_grad():
            return caption_several(model, texts, pixels[rows], generation, number)

    together = draw([0, 1, 2], 3)
    assert len({text for own in together for text in own}) == 9
    assert draw([2, 0], 2) == [together[2][:2], together[0][:2]]
    assert draw([0, 1, 2], 3, seed=1) != together


def test_drawn_tokens_have_their_probabilities_among_the_most_probable():
    """The share of each token in 4,000 rows with the same scores, against the definition of top_p."""
    probabilities = torch.tensor([0.02, 0.4, 0.03, 0.3, 0.05, 0.2])  # 0.4 + 0.3 + 0.2 reach 0.9
    draws = sampling(0, [str(number) for number in range(4000)], 1, 1, torch.device("cpu"))
    scores = draws(torch.zeros(4000, 0, dtype=torch.long), probabilities.log().expand(4000, -1))
    assert (scores.isfinite().sum(1) == 1).all()
    shares = scores.isfinite().float().mean(0)
    wanted = torch.tensor([0, 0.4, 0, 0.3, 0, 0.2]) / 0.9
    # three standard deviations of a share are at most 0.024
    torch.testing.assert_close(shares, wanted, atol=0.024, rtol=0)
    assert (shares[wanted == 0] == 0).all()
    # only the 50 most probable of 100 tokens: top_p alone would leave 90 of them
    draws = sampling(0, [str(number) for number in range(4000)], 1, 1, torch.device("cpu"))
    chosen = draws(torch.zeros(4000, 0, dtype=torch.long), torch.linspace(0, 0.01, 100).expand(4000, -1)).argmax(1)
    assert chosen.min() >= 50 and chosen.unique().numel() > 40


def test_draws_come_after_the_penalty_and_the_minimum_length(golden, processor):
    """A draw of 0 always takes the most probable token: the texts are those of greedy search with both settings."""
    model = BlipForConditionalGeneration.from_pretrained(golden / "captioning").eval()
    texts = texts_of(processor, BLIP, "conditional_generation")
    pixels = torch.randn(4, 3, 32, 32)
    for settings in ({"min_length": 15, "repetition_penalty": 3.0}, {"min_length": 5, "repetition_penalty": 1.0}):
        greedy = texts.generation(20, 1, **settings)
        first = LogitsProcessorList([SeededChoice(torch.zeros(4, 20))])
        with torch.no_grad():
            wanted = caption_several(model, texts, pixels, greedy, 1)
            assert caption_several(model, texts, pixels, greedy | {"logits_processor": first}, 1) == wanted


def test_match_of_many_texts_equals_scoring_every_pair(ranked):
    model, pixels, ids, mask, _ = ranked
    with torch.no_grad():
        wanted = model(pixels[OWNER], ids, mask).itm_score.softmax(-1)[:, 1].tolist()
        found = match_texts(model, pixels, ids, mask, torch.from_numpy(OWNER), texts_at_once=3)
    assert found == pytest.approx(wanted, rel=1e-4)
