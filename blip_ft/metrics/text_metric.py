"""Base class of the text metrics, with the interface of the evaluate library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """A metric that compares strings with lists of strings. Instances are created directly, so it works offline."""

    paper: str

    def __init__(self, **kwargs: Any):
        # not on disk, where concurrent runs on one machine would wait for each other's cache file
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__.partition("\n")[0],
            citation=self.paper,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": strings, "references": datasets.Sequence(strings)}),
        )
