"""A web page to try a checkpoint: ask questions about an image, write a caption for it, or rank texts.

    python recipes/app.py
        loads outputs/vqa, the result of recipes/vqa.py, and serves http://127.0.0.1:7860
    python recipes/app.py --model_name_or_path FOLDER_OR_HUB_ID
        loads any checkpoint or adapter; its task determines the page
    MODEL_ID=you/your-model python app.py
        the same file can be the app.py of a Space

Requires gradio: pip install -r requirements-app.txt. The page loads nothing from other servers.
"""

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.hf_argparser import HfArg

from blip_ft.arguments import Settings
from blip_ft.arguments.families import family_of
from blip_ft.cli import parse, start_recipe
from blip_ft.data.images import IMAGE_FORMATS, longest_side, open_image, resize_to_uint8
from blip_ft.data.text_formats import texts_of_checkpoint
from blip_ft.data.texts import clean_caption, encode_texts
from blip_ft.modeling import inference
from blip_ft.modeling.checkpoint_files import longest_text
from blip_ft.modeling.registry import task_of_model
from blip_ft.models import load_model

logger = logging.getLogger("blip_ft.app")

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

# what you may want to edit
MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 50_000_000
MAX_LINES = 64  # questions or texts per request
MAX_ANSWER_TOKENS = 20
MAX_CAPTION_TOKENS = 16  # of BLIP, without the prompt
SECONDS_KEPT = 3600  # for uploaded images

# colors come from the theme, which follows the dark mode of the browser
CSS = """
#result { overflow-x: auto; }
#result table { width: 100%; border-width: 0; }
#result tr, #result th, #result td { border-width: 0 0 1px; border-color: var(--border-color-primary); }
#result th, #result td { padding: .5em; }
#result td:first-child { overflow-wrap: anywhere; }
#result td:last-child, #result th:last-child { text-align: right; }
#result meter { display: block; width: 100%; min-width: 4em; }
#result .message { padding: .8em; border-left: 4px solid var(--color-accent); }
"""


@dataclass
class App(Settings):
    _argument_group_name = "Page"

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Hub id or folder of a checkpoint or adapter. Default: the environment variable MODEL_ID, or outputs/vqa.",
    )
    host: str | None = HfArg(
        default=None,
        help="Address to listen on. Default: GRADIO_SERVER_NAME, or 127.0.0.1, which only this machine can reach.",
    )
    port: int | None = HfArg(
        default=None, help="Port to listen on. Default: GRADIO_SERVER_PORT, or the first free one from 7860."
    )
    share: bool = HfArg(default=False, help="Open the page to everyone through a tunnel of gradio.live.")


def main() -> None:
    (args,) = parse(App)
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError(f"The page requires gradio: pip install -r requirements-app.txt ({error})") from error
    name = args.model_name_or_path or os.environ.get("MODEL_ID") or "outputs/vqa"
    if name == "outputs/vqa" and not Path(name).exists():
        raise ValueError(
            f"There is no checkpoint in {name}. Give --model_name_or_path FOLDER_OR_HUB_ID, or train one first: "
            "accelerate launch --quiet recipes/vqa.py"
        )
    loaded = load_model(name, merge=True)
    blocks = build_page(name, loaded["model"], loaded["processor"])
    names = own_names(args.host)
    # a Space can only be reached through the Hub's proxy, which uses other names
    middleware = [] if gr.utils.get_space() else [(OwnNamesOnly, (), {"names": names})]
    blocks.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        max_file_size=MAX_FILE_SIZE,
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=["settings"],
        run_history=False,
        enable_monitoring=False,
        app_kwargs={"middleware": middleware},
        prevent_thread_lock=True,
    )
    if blocks.share_url:
        names.add(host_of(blocks.share_url))
    blocks.block_thread()


class OwnNamesOnly:
    """ASGI middleware that refuses requests whose Host is not a name of this page or an IP address.

    Another website can let its own name resolve to this machine (DNS rebinding). The browser of a visitor would then
    let that website read this page.
    """

    def __init__(self, app: Any, names: set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse  # comes with gradio

        answer = self.app
        if scope["type"] in ("http", "websocket"):
            asked = host_of("//" + dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
            if asked not in self.names and not is_address(asked):
                text = f"This page does not accept the host name {asked!r}. Open it by its IP address, or set "
                answer = PlainTextResponse(f"{text}GRADIO_ROOT_PATH=https://THE.NAME and start it again.", 421)
        await answer(scope, receive, send)


def own_names(host: str | None) -> set[str]:
    """The names of this machine, and that of a proxy in front of it, which GRADIO_ROOT_PATH gives."""
    machine = socket.gethostname()
    given = (host, os.environ.get("GRADIO_SERVER_NAME"), host_of(os.environ.get("GRADIO_ROOT_PATH", "")))
    return {name.lower() for name in ("localhost", machine, f"{machine}.local", *given) if name}


def host_of(url: str) -> str:
    """The host of a URL in lower case, without port; "" if the URL has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


# rows of a result table: strings, and a score
Rows = list[tuple[list[str], float]]


def answer(model: Any, processor: ProcessorMixin, pixels: torch.Tensor, text: str) -> Rows:
    questions = lines_of(text)
    family = family_of(model.config)
    texts = texts_of_checkpoint(processor, model.config, "vqa")
    room = MAX_ANSWER_TOKENS if family.reads_prompts else 0  # one network reads the question and its answer
    batch = texts.encode_questions(questions, longest_text(model.config) - room)
    batch |= {"pixel_values": pixels, "image_index": torch.zeros(len(questions), dtype=torch.long)}
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    generation = texts.generation(MAX_ANSWER_TOKENS, family.defaults["vqa"]["generation_num_beams"])
    answers = inference.answer(model, texts, inference.encode_questions(model, batch), generation)
    return [([question, text], score) for question, text, score in zip(questions, *answers, strict=True)]


def write_caption(model: Any, processor: ProcessorMixin, pixels: torch.Tensor, text: str) -> Rows:
    prompt, family = " ".join(text.split()), family_of(model.config)
    defaults = family.defaults["conditional_generation"]
    texts = texts_of_checkpoint(processor, model.config, "conditional_generation", prompt)
    prompt_length = len(texts.encode_caption_prompts(1)["input_ids"][0])
    new_tokens = defaults["generation_max_length"] if family.reads_prompts else MAX_CAPTION_TOKENS
    if prompt_length + new_tokens > longest_text(model.config):
        raise ValueError("The beginning of the caption is too long. Use a few words.")
    length = new_tokens if family.reads_prompts else prompt_length + new_tokens
    generation = texts.generation(
        length,
        defaults["generation_num_beams"],
        min_length=defaults["generation_min_length"],
        repetition_penalty=defaults["repetition_penalty"],
    )
    captions = inference.caption(model, texts, pixels, generation)
    begin = "" if family.reads_prompts else prompt  # a caption of BLIP continues its prompt
    return [([f"{begin} {text}".strip()], score) for text, score in zip(*captions, strict=True)]


def rank(model: Any, processor: ProcessorMixin, pixels: torch.Tensor, text: str) -> Rows:
    texts = lines_of(text)
    longest = model.config.text_config.max_position_embeddings
    tokens = encode_texts([clean_caption(text) for text in texts], processor.tokenizer, longest)
    (ranked,) = inference.rank_texts(model, pixels, inference.embed_texts(model, **tokens), **tokens, k=len(texts))
    return [([texts[place]], score) for place, score in ranked]


def lines_of(text: str) -> list[str]:
    """The distinct lines."""
    lines = list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))
    if not 0 < len(lines) <= MAX_LINES:
        raise ValueError(f"Write 1 to {MAX_LINES} lines of text below the image; found {len(lines)}.")
    return lines


class Page(NamedTuple):
    # model, processor, pixels (1, 3, height, width), text
    run: Callable[[Any, ProcessorMixin, torch.Tensor, str], Rows]
    heading: str
    label: str  # of the text field
    text: str  # default of the text field
    button: str
    columns: tuple[str, ...]
    note: str = ""


PROBABILITY = "probability"
PAGES = {
    "vqa": Page(
        *(answer, "Ask about an image", "Questions, one per line", "what is in the image?", "Ask"),
        columns=("question", "answer", PROBABILITY),
    ),
    "conditional_generation": Page(
        *(write_caption, "Describe an image", "Beginning of the caption", "a picture of", "Describe"),
        columns=("caption", PROBABILITY),
    ),
    "image_text_retrieval": Page(
        *(rank, "Which text fits the image?", "Texts, one per line", "", "Rank"),
        columns=("text", "score"),
        note="Score: cosine + matching logit. Compare scores only for the same image.",
    ),
}


def build_page(name: str, model: Any, processor: ProcessorMixin) -> Any:
    """The gradio Blocks for the task of the model."""
    import gradio as gr

    task = task_of_model(model)
    page = PAGES[task]
    if task == "conditional_generation":
        page = page._replace(text=texts_of_checkpoint(processor, model.config, task).prompt.strip())
    with gr.Blocks(title=page.heading, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as blocks:
        gr.HTML(f"<h1>{page.heading}</h1><p>{escape(name)}</p>")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", height=320, buttons=[])
                # gr.Image would open the file itself, and not report what is wrong with it
                image.preprocess = lambda payload: payload and payload.path
                text = gr.Textbox(page.text, label=page.label, lines=3, max_length=10_000)
                button = gr.Button(page.button, variant="primary")
            with gr.Column():
                result = gr.HTML(elem_id="result")

        button.click(partial(try_image, page, model, processor), [image, text], result, api_name="try")
    return blocks


def try_image(page: Page, model: Any, processor: ProcessorMixin, path: str | None, text: str) -> str:
    """HTML of the result or of an error message. Texts of users and models are escaped."""
    start = time.perf_counter()
    try:
        image = read_image(path, longest_side(processor.image_processor))
        with torch.no_grad():
            pixels = resize_to_uint8([image], processor.image_processor).to(model.device)
            rows = page.run(model, processor, pixels, text)
    except ValueError as error:
        return f'<p class="message">{escape(str(error))}</p>'
    lines = ["".join(f"<th>{column}</th>" for column in page.columns)]
    for texts, score in rows:
        is_share = page.columns[-1] == PROBABILITY
        number = f'{score:.1%}<meter value="{score:.4f}"></meter>' if is_share else f"{score:.2f}"
        cells = [*(escape(text) or "<em>(nothing)</em>" for text in texts), number]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    seconds = time.perf_counter() - start
    return f"<table>{table}</table><p>{seconds:.2f} seconds on {model.device.type}. {page.note}</p>"


def read_image(path: str | None, size: int) -> Image.Image:
    """The image, upright and in RGB. Raises: ValueError with a message for the user."""
    if path is None:
        raise ValueError("Add an image first.")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as header:
            too_large = header.width * header.height > MAX_PIXELS
        if not too_large:
            return open_image(path, size)
    except Image.DecompressionBombError:
        pass
    # decoders raise many kinds of errors on broken input
    except Exception as error:
        logger.warning("%s cannot be read: %s", path, error)
        raise ValueError(f"This file is damaged, or not one of {', '.join(IMAGE_FORMATS)}. Try another.") from error
    raise ValueError(f"This image has more than {MAX_PIXELS // 10**6} million pixels. Make it smaller.")


if __name__ == "__main__":
    start_recipe(main)
