"""Keep tokens and passwords out of error messages and logs."""

from __future__ import annotations

import logging
import re

from huggingface_hub.utils.logging import get_logger


def hide_secrets(text: str) -> str:
    """Replace tokens in the text, and remove user and password from its URLs."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", text)
    # HTTP libraries quote a malformed header in their errors
    return re.sub(r"Bearer \S+|hf_\w{30,}", "(token)", text)


def _hide_in_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = hide_secrets(record.getMessage()), ()
    return True


# huggingface_hub logs the full URL of each failed request, and its own handlers run before the root logger's
for _handler in get_logger("huggingface_hub").handlers:
    _handler.addFilter(_hide_in_record)
