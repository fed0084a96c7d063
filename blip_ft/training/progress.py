"""What the Trainer shows while it trains."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback

from blip_ft.arguments import BlipTrainingArguments


class ProgressLog(ProgressCallback):
    """Shows a bar, except under disable_tqdm, and prints logged figures as numbers.

    The callbacks of transformers 5.23 print them as strings: {'loss': '10.4'}.
    """

    def on_train_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm)
        self.current_step = 0

    def on_log(
        self, args: BlipTrainingArguments, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in logs.items()}
            shown.pop("total_flos", None)
            self.training_bar.write(str(shown))
