"""Push to the Hub, and describe what to do if that fails."""

from __future__ import annotations

import shlex

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from blip_ft.data.secrets import hide_secrets

# exit code of a run that saved its result but could not push it
NOT_PUSHED = 3

# without a limit, huggingface_hub waits forever for an answer
SECONDS_TO_WAIT = 60

# huggingface_hub does not upload files named in .gitignore: these contain the user's rows, images, paths or pickles
GITIGNORE = (
    "predictions.jsonl\ntest_predictions.jsonl\nbad_rows.jsonl\nreport.html\nevents.out.tfevents.*\ntraining_args.bin\n"
)


def limit_waiting() -> None:
    """Raise an error if the Hub accepts a request and does not answer."""
    get_session().timeout = SECONDS_TO_WAIT


def upload_command(folder: str, repository: str, private: bool | None, revision: str | None) -> str:
    """The shell command that pushes the result of a run in folder."""
    words = ["hf", "upload", repository, folder, "--exclude", "checkpoint-*"]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def describe_hub_error(error: BaseException) -> str:
    """An error of the Hub on one line, with advice, and without any token."""
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    said = f"{type(error).__name__}: {error}" + (f" ({answer})" if answer and answer is not error else "")
    if answer is None and not isinstance(error, ValueError):
        advice = f"Check the network and HF_ENDPOINT (now {constants.ENDPOINT})."
    elif answer and answer.response.status_code in (401, 403):
        advice = "Check that HF_TOKEN is set and has write access to this repository."
    else:
        advice = ""
    # hide secrets before cutting, which could leave half a token
    return hide_secrets(f"{hide_secrets(' '.join(said.split()))[:400].rstrip('.')}. {advice}".strip())
