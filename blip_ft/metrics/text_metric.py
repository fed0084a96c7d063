"""The form in which evaluate expects a metric of texts."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """Strings against lists of strings in the form of the evaluate library; instantiated, not loaded: works offline."""

    paper: str

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any):
        # on disk, concurrent runs on one machine would wait for each other's cache file
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__.partition("\n")[0],
            citation=self.paper,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": strings, "references": datasets.Sequence(strings)}),
        )
