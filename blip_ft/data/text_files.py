"""Read JSON and CSV files, and name the line of what is wrong in them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip_ft.data.tables import Row


def read_json_lines(path: Path) -> Iterable[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = parse_json(line.rstrip(), path, number)  # else one cut short ends in the next line
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: needs an object in braces, found a {type(row).__name__}.")
            yield row


def parse_json(content: bytes, path: str | Path, line: int = 1) -> Any:
    """line: where content begins in the file."""
    try:
        return json.loads(text := content.decode("utf-8-sig"), object_pairs_hook=_object_of_pairs)
    except _RepeatedKey as error:
        key, lines_before = _first_repeated_key(text)
        raise _stands_twice(path, line + lines_before, "key", key) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: must be text in UTF-8 ({error.reason}).") from error
    # a number of thousands of digits, or a thousand brackets within each other
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, from line {line}: JSON that cannot be read ({error}).") from error


class _RepeatedKey(ValueError):
    """An object of JSON has a key twice. json would keep the last value without a word."""


def _stands_twice(path: str | Path, line: int, kind: str, name: str) -> ValueError:
    return ValueError(
        f"{path}, line {line}: the {kind} {name!r} stands there twice, and one of the two would be lost. Remove or "
        "rename one."
    )


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> Row:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _RepeatedKey
    return values


def _first_repeated_key(text: str) -> tuple[str, int]:
    """The first key of JSON that stands twice in an object, and the lines before its second place."""
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
    raise AssertionError("json has found a repeated key, and the same text has none")


def read_csv(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            names = reader.fieldnames or []
            if repeated := [name for name in names if names.count(name) > 1]:
                raise _stands_twice(path, reader.line_num, "column", repeated[0])
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: needs {len(reader.fieldnames)} values, one for each column."
                    )
                yield {name: _list_in_csv(value, path, reader.line_num) for name, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}).") from error


def _list_in_csv(value: str, path: Path, line: int) -> Any:
    """A cell like ["a dog", "dog"] is a list; csv has no other way to hold one."""
    if value.startswith("["):
        try:
            return json.loads(value, object_pairs_hook=_object_of_pairs)
        except _RepeatedKey as error:
            raise _stands_twice(path, line, "key", _first_repeated_key(value)[0]) from error
        except (ValueError, RecursionError):
            pass
    return value
