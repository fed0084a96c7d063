"""Push checkpoints during training, and continue if a push fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from blip_ft.results.push import describe_hub_error, limit_waiting

logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """The Trainer with our model card. As long as `card` is None, errors of the Hub are logged and not raised."""

    card: ModelCard | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `card`. A push calls this after it has saved the weights, when PEFT may have changed README.md."""
        if self.card and self.is_world_process_zero():
            self.card.save(Path(self.args.output_dir) / "README.md")

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        limit_waiting()
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # HTTP, TLS, the rules of the Hub
            if self.card:
                raise
            logger.warning("Nothing is pushed during training, only at the end. %s", describe_hub_error(error))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.hub_model_id is None:
            return
        self._warn_of_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """The Trainer pushes checkpoints in the background and does not read the outcome."""
        if self.hub_model_id is None or self.push_in_progress is None:
            return
        done = [job for job in self.push_in_progress.jobs if job.done()]
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if not job.done()]
        for error in filter(None, (job.exception() for job in done)):
            logger.warning("A checkpoint was not pushed; training continues. %s", describe_hub_error(error))
