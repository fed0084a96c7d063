"""Recipes in processes of their own, forked from a process that has imported the libraries: no start waits for imports.

What such a process needs of a launcher are environment variables: test_engines starts with the launchers themselves.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["blip_ft.training.run", "matplotlib.backends.backend_agg"])


class Program:
    """`python FILE FLAGS` in a session of its own, as subprocess.Popen starts it; stderr goes to a file."""

    def __init__(
        self, *words: str | Path, errors: Path, variables: dict[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.errors = errors
        environment = {**os.environ, **(variables or {})}
        arguments = ([str(word) for word in words], environment, str(errors), str(cwd or Path.cwd()))
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 100) -> tuple[int, str]:
        """The exit code, below 0 if a signal ended it, and what it wrote to stderr."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"It still runs after {timeout} s: {self.errors.read_text()[-3000:]}")
        return self.process.exitcode, self.errors.read_text()


def _run(words: list[str], environment: dict[str, str], errors: str, cwd: str) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((os.devnull, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method("fork", force=True)  # as without this file, for a loader's workers
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def start_ranks(*words: str | Path, folder: Path, variables: dict[str, str] | None = None) -> list[Program]:
    """Two processes of one run, with the variables of torchrun; their stderr is written to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # where torchrun's agent is asked for the address, there is none
    variables = {**(variables or {}), **world, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return [
        Program(
            *words,
            errors=folder / f"stderr of rank {rank}",
            variables={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def run_ranks(*words: str | Path, folder: Path, variables: dict[str, str] | None = None) -> list[tuple[int, str]]:
    """The exit code and stderr of each."""
    programs = start_ranks(*words, folder=folder, variables=variables)
    try:
        return [program.wait() for program in programs]
    finally:
        for program in programs:
            program.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
