"""BLIP for image-text retrieval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.blip import modeling_blip
from transformers.utils import can_return_tuple

from blip_ft.modeling.blip.base import IGNORED, BlipBase
from blip_ft.modeling.blip.contrastive import draw_negatives, gather, nearest_is_right


@dataclass
class BlipImageTextRetrievalOutput(modeling_blip.BlipImageTextMatchingModelOutput):
    """The output of transformers' class, with the features, the losses and the accuracy added."""

    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    in_batch_accuracy: torch.Tensor | None = None


class BlipForImageTextRetrieval(BlipBase, modeling_blip.BlipForImageTextRetrieval):
    """Image-text matching and similarity as in transformers, and the loss of the original."""

    # the loss is a mean over the pairs of a batch, so the Trainer averages it over accumulation and processes
    accepts_loss_kwargs = False
    start_token_setting = "itm_start_token"

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        use_itm_head: bool = True,
        negatives: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> BlipImageTextRetrievalOutput:
        """Compute scores, and with image_ids also the loss.

        The loss is loss_itc (contrastive, over batch and queue) + loss_itm (matching). A text and its image form one
        pair, and both losses are means over pairs. In training mode the pairs are added to the queue afterwards. All
        processes share their pairs as negatives; the number of pairs may differ between processes.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor returns it, or uint8.
            input_ids, attention_mask: (num_texts, length), [CLS] first.
            image_ids: (num_images,) int64. The same image has the same id in the whole data set, because pairs of one
                image are positives of each other, never negatives.
            image_index: (num_texts,), the image of each text. None: one text per image.
            use_itm_head: if True, itm_score is (num_texts, 2), the logits of "no match" and "match". If False, and
                always with image_ids, itm_score is (num_images, num_texts), the cosine similarities.
            negatives: (2, num_texts), the negatives to use; None draws them. Row 0: the pair whose image is combined
                with this text. Row 1: the pair whose text is combined with this image. -1: no negative. Pairs are
                numbered over all processes, in rank order.
        Source: BLIP models/blip_retrieval.py, negative_all_rank.
        """
        vision = self.encode_images(pixel_values, interpolate_pos_encoding, **kwargs)
        image_states = vision.last_hidden_state
        image_features = text_features = None
        losses = {}
        if use_itm_head and image_ids is None:
            states = self.encode_pairs(image_states, input_ids, attention_mask, image_index, **kwargs)
            score = self.itm_head(states[:, 0])
        else:
            states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
            image_features, text_features = self.project_images(image_states), self.project_texts(states)
            score = image_features @ text_features.T
        if image_ids is not None:
            keys = self._momentum_features(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
            features = (image_features, text_features, *keys)
            losses = self._losses(
                image_states, features, input_ids, attention_mask, image_ids, image_index, negatives, **kwargs
            )
        return BlipImageTextRetrievalOutput(
            itm_score=score,
            last_hidden_state=image_states,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            question_embeds=states,
            image_features=image_features,
            text_features=text_features,
            **losses,
        )

    @torch.no_grad()
    def _momentum_features(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        interpolate_pos_encoding: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (num_images, width) and (num_texts, width) from the momentum encoder."""
        if self.contrastive is None:
            raise ValueError(
                "The loss needs a queue and momentum weights: set model.contrastive = Contrastive(model) before "
                "training, or leave out image_ids to get scores only."
            )
        # the model's own dropout and stochastic depth are active here, as in the original; a layer drops only if its
        # weights require a gradient. Do not swap parameter.data instead: autocast would keep using its cached casts of
        # the model's weights
        momentum_weights = self.contrastive.momentum_weights.items()
        keys = functional_call(
            self,
            {name: weight.to(self.dtype).detach().requires_grad_() for name, weight in momentum_weights},
            (pixel_values, input_ids, attention_mask),
            {"use_itm_head": False, "interpolate_pos_encoding": interpolate_pos_encoding},
        )
        return keys.image_features, keys.text_features

    def project_images(self, image_states: torch.Tensor) -> torch.Tensor:
        """Project image states from encode_images to features (num_images, width) of length 1.

        The dot product of an image's and a text's features is their cosine similarity.
        """
        return F.normalize(self.vision_proj(image_states[:, 0]), dim=-1)

    def project_texts(self, text_states: torch.Tensor) -> torch.Tensor:
        """Project the states of text_encoder without images to features (num_texts, width) of length 1."""
        return F.normalize(self.text_proj(text_states[:, 0]), dim=-1)

    def _losses(
        self,
        image_states: torch.Tensor,
        features: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_ids: torch.Tensor,
        image_index: torch.Tensor | None,
        negatives: torch.Tensor | None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Compute loss, loss_itc, loss_itm, and in_batch_accuracy in percent.

        features: (num_images, width) and (num_texts, width) from the model, then both from the momentum encoder.
        """
        contrastive, num_images, num_texts = self.contrastive, len(image_states), len(input_ids)
        if len(image_ids) != num_images:
            raise ValueError(f"image_ids needs one id for each of {num_images} images, found {len(image_ids)} ids.")
        if self._drop_trivial_index(image_index, num_images, num_texts) is None:
            image_index = torch.arange(num_texts, device=input_ids.device) * num_images // num_texts
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        image_features, text_features, image_keys, text_keys = features

        # row i of the tensors below is the pair of text i and its image; all_... contains the pairs of all processes
        all_states, first_image = gather(image_states)
        all_ids, all_images = gather(torch.stack([image_ids[image_index], image_index + first_image], 1))[0].unbind(1)
        all_texts, first_text = gather(torch.stack([input_ids, attention_mask], 1))  # (all pairs, 2, longest)
        own = torch.arange(first_text, first_text + num_texts, device=input_ids.device)
        pairs = torch.stack([image_features[image_index], text_features, image_keys[image_index], text_keys], 1)
        pairs = pairs.to(contrastive.image_queue.dtype)  # (num_texts, 4, width)
        all_pairs, _ = gather(pairs.detach())
        all_image_features, all_text_features, all_image_keys, all_text_keys = all_pairs.unbind(1)
        # full precision: rounding errors of a cosine are divided by the temperature
        with torch.autocast(pairs.device.type, enabled=False):
            loss_itc = contrastive.loss(*pairs.unbind(1), all_ids[own])
            same = all_ids[own, None] == all_ids
            towards_images = all_text_features[own] @ all_image_features.T / contrastive.temperature
            towards_texts = all_image_features[own] @ all_text_features.T / contrastive.temperature
            in_batch_accuracy = nearest_is_right((towards_images, towards_texts), same)
            if negatives is None:
                negatives = torch.stack([draw_negatives(towards_images, same), draw_negatives(towards_texts, same)])
        if self.training:
            contrastive.enqueue(all_image_keys, all_text_keys, all_ids)

        # each text with its image, each text with a wrong image, each image with a wrong text. A negative of -1 takes
        # the last pair, whose label is then ignored
        other_images, other_texts = negatives
        images, image_index = all_images[torch.cat([own, other_images, own])].unique(return_inverse=True)
        input_ids, attention_mask = all_texts[torch.cat([own, own, other_texts])].unbind(1)
        states = self.encode_pairs(all_states[images], input_ids, attention_mask, image_index, **kwargs)
        labels = torch.cat([torch.ones_like(own), torch.where(negatives.flatten() < 0, IGNORED, 0)])
        loss_itm = F.cross_entropy(self.itm_head(states[:, 0]), labels)
        return {
            "loss": loss_itc + loss_itm,
            "loss_itc": loss_itc,
            "loss_itm": loss_itm,
            "in_batch_accuracy": in_batch_accuracy,
        }
