"""Read JSON, JSON lines and CSV files. Each error names the file and the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip_ft.data.tables import Row


def read_json_lines(path: Path) -> Iterable[Row]:
    """The objects of a jsonl file. Raises: ValueError for a line that is not a JSON object in UTF-8."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            # without rstrip, the error of a truncated line would name the next line
            row = parse_json(line.rstrip(), path, number)
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found a {type(row).__name__}.")
            yield row


def read_csv(path: Path) -> Iterable[Row]:
    """The rows of a csv file. A cell like ["a dog", "dog"] becomes a list. Raises: ValueError for a malformed row."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            names = reader.fieldnames or []
            if repeated := [name for name in names if names.count(name) > 1]:
                raise _duplicate(path, reader.line_num, "column", repeated[0])
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} values, one per column."
                    )
                yield {name: _parse_cell(value, path, reader.line_num) for name, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}).") from error


def parse_json(content: bytes, path: str | Path, line: int = 1) -> Any:
    """Parse JSON in UTF-8.

    Args:
        line: the line of the file in which content begins, for error messages.
    Raises: ValueError if content is not valid JSON or an object has the same key twice.
    """
    try:
        return json.loads(text := content.decode("utf-8-sig"), object_pairs_hook=_object_of_pairs)
    except _DuplicateKey as error:
        key, lines_before = _find_duplicate_key(text)
        raise _duplicate(path, line + lines_before, "key", key) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: must be text in UTF-8 ({error.reason}).") from error
    # a number with thousands of digits, or thousands of nested brackets
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, from line {line}: JSON cannot be read ({error}).") from error


class _DuplicateKey(ValueError):
    """A JSON object has the same key twice. json.loads would silently keep the last value."""


def _duplicate(path: str | Path, line: int, kind: str, name: str) -> ValueError:
    return ValueError(
        f"{path}, line {line}: the {kind} {name!r} appears twice, and one value would be lost. Remove or rename one."
    )


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _DuplicateKey
    return values


def _find_duplicate_key(text: str) -> tuple[str, int]:
    """The first key that appears twice in one JSON object, and the number of lines before its second appearance."""
    open_objects: list[set[str]] = []
    for token in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', text):
        if token[0] == "{":
            open_objects.append(set())
        elif token[0] == "}":
            open_objects.pop()
        elif token[2]:
            key = json.loads(token[1])
            if key in open_objects[-1]:
                return key, text.count("\n", 0, token.start())
            open_objects[-1].add(key)
    raise AssertionError("json found a duplicate key that this search did not find")


def _parse_cell(value: str, path: Path, line: int) -> Any:
    """A cell that is a JSON list becomes a list; any other cell stays a string."""
    if value.startswith("["):
        try:
            return json.loads(value, object_pairs_hook=_object_of_pairs)
        except _DuplicateKey as error:
            raise _duplicate(path, line, "key", _find_duplicate_key(value)[0]) from error
        except (ValueError, RecursionError):
            pass
    return value
