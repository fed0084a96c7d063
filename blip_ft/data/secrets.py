"""Keep tokens and passwords out of messages and logs."""

from __future__ import annotations

import logging
import re

from huggingface_hub.utils.logging import get_logger


def hide_secrets(text: str) -> str:
    """text without tokens, and without the user and password of any URL in it."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", text)
    # an HTTP library that finds a header malformed quotes it
    return re.sub(r"Bearer \S+|hf_\w{30,}", "(token)", text)


def _hide_in_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = hide_secrets(record.getMessage()), ()
    return True


# huggingface_hub logs each failed request with its whole URL; its own handlers come before those of the root
for _handler in get_logger("huggingface_hub").handlers:
    _handler.addFilter(_hide_in_record)
