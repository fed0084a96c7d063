"""The page to try a checkpoint: its functions, its server, and its use in a browser."""

import base64
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import httpx
import pytest
import torch
from conftest import GOLDEN, RECIPES
from PIL import Image
from programs import free_port

from blip_ft.arguments.families import BLIP, family_of
from blip_ft.data.images import open_image, resize_to_uint8
from blip_ft.data.text_formats import texts_of
from blip_ft.data.texts import encode_texts
from blip_ft.modeling import inference
from blip_ft.models import load_model

APP = RECIPES / "app.py"
GOOD = "seconds on cpu"
HOSTILE = "<img src=x onerror=alert(1)> ${1+1} {{1}}"


@pytest.fixture(scope="module")
def app() -> dict:
    """What stands in recipes/app.py, by name."""
    return runpy.run_path(str(APP))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A good image and some bad ones."""
    folder = tmp_path_factory.mktemp("images")
    Image.effect_noise((60, 40), 90).convert("RGB").save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.new("1", (8000, 8000)).save(folder / "large.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    turned = Image.Exif()
    turned[274] = 6
    image = Image.open(folder / "good.png")
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=turned)
    return folder


@pytest.fixture
def try_image(app, checkpoints, images):
    """Runs what the button does, and returns HTML; and the model, its processor and the image good.png for it."""

    def start(task: str):
        loaded = load_model(checkpoints[task], device="cpu")
        model, processor = loaded["model"], loaded["processor"]
        page = app["PAGES"][app["task_of_model"](model)]

        def run(text: str, image: str | None = "good.png", page=page) -> str:
            return app["try_image"](page, model, processor, image and str(images / image), text)

        pixels = resize_to_uint8([open_image(images / "good.png")], processor.image_processor)
        return run, model, processor, pixels

    return start


def test_each_question_gets_the_answer_of_inference(try_image, images):
    run, model, processor, _ = try_image("vqa")
    questions = ["what color is it ?", "is it a dog ?"]
    html = run("\n".join([*questions, "", questions[0]]))
    answers = inference.answer_questions(model, processor, [str(images / "good.png")] * 2, questions)
    for question, answer in zip(questions, answers, strict=True):
        assert html.count(f"<td>{question}</td><td>{answer}</td>") == 1
    assert GOOD in html


def test_caption_goes_on_where_it_is_told_to_begin(try_image):
    run, model, processor, pixels = try_image("captioning")
    for prompt, length in (("a picture of", 20), ("", 17)):
        texts = texts_of(processor, BLIP, "conditional_generation", prompt)
        (text,), (score,) = inference.caption(model, texts, pixels, texts.generation(length, 3, min_length=5))
        html = run(f" {prompt}\n")
        assert f"<td>{f'{prompt} {text}'.strip()}</td><td>{score:.1%}" in html
    assert "The beginning of the caption is too long" in run("the dog " * 30)


def load_for(task: str, name: str) -> tuple:
    loaded = load_model(GOLDEN / name, task=task, device="cpu")
    return loaded["model"], loaded["processor"]


@pytest.mark.parametrize("name", ["blip2_opt", "instructblip_t5"])
def test_questions_to_blip2_are_asked_in_the_prompt_of_the_model(app, images, name):
    model, processor = load_for("vqa", name)
    model.config.prompt = "Q: {} A:"
    questions, image = ["what color is it ?", "is it a dog ?"], str(images / "good.png")
    html = app["try_image"](app["PAGES"]["vqa"], model, processor, image, "\n".join(questions))
    answers = inference.answer_questions(model, processor, [image] * 2, questions, num_beams=5)
    for question, answer in zip(questions, answers, strict=True):
        assert f"<td>{question}</td><td>{answer or '<em>(nothing)</em>'}</td>" in html
    assert GOOD in html
    assert GOOD in app["try_image"](app["PAGES"]["vqa"], model, processor, image, "what is it " * 900)


@pytest.mark.parametrize(
    ("name", "prompt"), [("blip2_opt", "a photo of"), ("instructblip_vicuna", "A short image caption.")]
)
def test_page_for_captions_begins_with_the_prompt_of_the_model(app, images, name, prompt):
    gr = pytest.importorskip("gradio")
    model, processor = load_for("conditional_generation", name)
    for trained, shown in ((None, prompt), ("a large dog ", "a large dog")):
        model.config.prompt = trained
        blocks = app["build_page"](name, model, processor)
        (text,) = (block.value for block in blocks.blocks.values() if isinstance(block, gr.Textbox))
        assert text == shown
    page, image = app["PAGES"]["conditional_generation"], str(images / "good.png")
    html = app["try_image"](page, model, processor, image, prompt)
    texts = texts_of(processor, family_of(model.config), "conditional_generation")
    most, least, penalty = (30, 8, 1.0) if name == "blip2_opt" else (80, 10, 1.5)  # of the family
    generation = texts.generation(most, 5, min_length=least, repetition_penalty=penalty)
    pixels = resize_to_uint8([open_image(image)], processor.image_processor)
    (caption,), (probability,) = inference.caption(model, texts, pixels, generation)
    assert f"<td>{escape(caption)}</td><td>{probability:.1%}" in html  # without the prompt
    assert "too long" in app["try_image"](page, model, processor, image, "the dog " * 300)


def test_texts_are_ranked_as_by_scoring_each_pair(try_image):
    run, model, processor, pixels = try_image("retrieval")
    texts = ["a dog on the grass", "a cat", "two people riding horse", "a city street with bus and car"]
    tokens = encode_texts(texts, processor.tokenizer, 64)
    with torch.no_grad():
        pairs = {"pixel_values": pixels.repeat(4, 1, 1, 1), **tokens}
        scores = model(**pairs, use_itm_head=True).itm_score[:, 1] + model(**pairs, use_itm_head=False).itm_score[0]
    html = run("\n".join(texts))
    rows = [f"<td>{texts[place]}</td><td>{scores[place]:.2f}</td>" for place in scores.argsort(descending=True)]
    assert [html.index(row) for row in rows] == sorted(html.index(row) for row in rows)


def test_image_is_turned_upright(try_image):
    run, *_ = try_image("vqa")
    question = "what color is it ?"
    assert run(question, "turned.png").split("seconds")[0][:-5] == run(question).split("seconds")[0][:-5]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "Add an image first"),
        ("truncated.png", "damaged"),
        ("text.png", "damaged"),
        ("empty.png", "damaged"),
        ("postscript.png", "damaged"),
        ("large.png", "more than 50 million pixels"),
        ("bomb.png", "more than 50 million pixels"),
    ],
)
def test_bad_image_ends_in_a_message(try_image, image, message):
    run, *_ = try_image("vqa")
    assert message in run("what color is it ?", image)


@pytest.mark.parametrize("text", ["", " \n", "a\n" + "\n".join(map(str, range(64)))])
def test_no_line_and_too_many_end_in_a_message(try_image, text):
    run, *_ = try_image("vqa")
    assert "Write 1 to 64 lines" in run(text)


def test_what_users_and_models_write_is_no_markup(app, try_image):
    run, *_ = try_image("vqa")
    page = app["PAGES"]["vqa"]._replace(run=lambda *args: [([HOSTILE, HOSTILE], 0.5)])
    assert run("").count("<img") == run(HOSTILE, page=page).count("<img") == 0
    assert run(HOSTILE, page=page).count("&lt;img src=x") == 2


def test_without_checkpoint_or_gradio_one_message_says_what_to_do(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL_ID", raising=False)
    monkeypatch.setattr(sys, "argv", [str(APP)])
    for missing, message in (({}, "There is no checkpoint in outputs/vqa"), ({"gradio": None}, "requirements-app.txt")):
        for module, value in missing.items():
            monkeypatch.setitem(sys.modules, module, value)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(APP), run_name="__main__")
        assert end.value.code == 1 and message in caplog.text


@pytest.fixture
def launch(monkeypatch, tmp_path, checkpoint):
    """Starts a copy of the page in this process, and returns its address and gradio's Blocks."""
    import gradio

    launched = []

    def start(*flags: str, **environment) -> tuple[str, gradio.Blocks]:
        port = free_port()
        shutil.copy(APP, tmp_path / "app.py")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["app.py", *flags, *(["--port", str(port)] if flags else [])])
        monkeypatch.setattr(gradio.Blocks, "block_thread", lambda blocks: launched.append(blocks))
        for name, value in {"MODEL_ID": checkpoint, "GRADIO_SERVER_PORT": port, **environment}.items():
            monkeypatch.setenv(name, str(value))
        runpy.run_path("app.py", run_name="__main__")
        return f"http://127.0.0.1:{port}", launched[0]

    yield start
    for blocks in launched:
        blocks.close()


def test_space_runs_the_file_alone_and_listens_where_the_space_says(launch):
    url, blocks = launch(GRADIO_SERVER_NAME="0.0.0.0", SYSTEM="spaces", SPACE_ID="you/space")
    url = url.replace("127.0.0.1", "127.0.0.2")
    assert httpx.get(url).status_code == httpx.get(url, headers={"Host": "you-space.hf.space"}).status_code == 200
    assert not blocks.analytics_enabled and blocks.share_url is None
    upload = {"files": ("large.png", bytes(21_000_000), "image/png")}
    assert httpx.post(f"{url}/gradio_api/upload", files=upload).status_code == 413


def test_page_answers_to_its_own_names_only(launch, monkeypatch):
    """A browser takes a foreign page's own name for this machine when that page's DNS says so."""
    tunnel = "https://0a1b2c.gradio.live"
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda *args, **kwargs: tunnel)
    url, _ = launch("--share", "--host", "127.0.0.1", GRADIO_ROOT_PATH="https://proxy.example:8443/path")
    port = url.rsplit(":", 1)[1]
    own = ["127.0.0.1", "localhost", "[::1]", "192.0.2.7", socket.gethostname(), "proxy.example", "0a1b2c.gradio.live"]
    foreign = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.gradio.live", "[", ""]
    paths = ["/", "/config", "/gradio_api/info"]

    def ask(host: str, path: str, method: str = "GET") -> int:
        headers = {"Host": host, "Origin": f"http://{host}"}
        return httpx.request(method, url + path, headers=headers).status_code

    for host in own:
        for named in (host, f"{host}:{port}", host.upper()):
            assert [ask(named, path) for path in paths] == [200] * len(paths), named
    for host in foreign:
        for named in (host, f"{host}:{port}"):
            assert [ask(named, path) for path in paths] == [421] * len(paths), named
            assert ask(named, "/gradio_api/upload", "POST") == ask(named, "/gradio_api/queue/join", "POST") == 421
    answer = httpx.get(url, headers={"Host": "<b>evil</b>"})
    assert answer.headers["content-type"].startswith("text/plain") and "GRADIO_ROOT_PATH=" in answer.text


@pytest.fixture(scope="module")
def browser():
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (binary and driver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory):
    """The page as `python recipes/app.py --model_name_or_path ... --port ...` serves it."""
    port, folder = free_port(), tmp_path_factory.mktemp("app")
    command = [sys.executable, str(APP), "--model_name_or_path", str(checkpoint), "--port", str(port)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}/"
    try:
        end = time.monotonic() + 120
        while f"Running on local URL:  {address[:-1]}" not in (text := (folder / "log").read_text()):
            assert process.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        yield address
        assert process.poll() is None, "the server has ended"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.browser
def test_page_in_a_browser(browser, url, checkpoint, images, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    def find(selector: str):
        return WebDriverWait(browser, 30).until(lambda _: browser.find_elements(By.CSS_SELECTOR, selector))[0]

    def resize(width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def screenshot(name: str) -> None:
        png = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        (tmp_path / name).write_bytes(base64.b64decode(png["data"]))

    def try_image(name: str, wanted: str) -> str:
        for remove in browser.find_elements(By.CSS_SELECTOR, "[aria-label='Remove Image']"):
            remove.click()
        find("input[type=file]").send_keys(str(images / name))
        find("[aria-label='Remove Image']")
        find("button.primary").click()
        WebDriverWait(browser, 30).until(lambda _: wanted in find("#result").text)
        return find("#result").text

    resize(1280)
    browser.get(url)
    questions = ["what color is it ?", HOSTILE]
    find("textarea").clear()
    find("textarea").send_keys("\n".join(questions))
    text = try_image("good.png", GOOD)
    screenshot("1280.png")
    loaded = load_model(checkpoint, device="cpu")
    asked = [str(images / "good.png")] * 2
    answers = inference.answer_questions(loaded["model"], loaded["processor"], asked, questions)
    for question, answer in zip(questions, answers, strict=True):
        assert f"{question} {answer}" in text
    assert not browser.find_elements(By.CSS_SELECTOR, "#result img")

    try_image("text.png", "damaged")
    try_image("bomb.png", "million pixels")
    screenshot("bad.png")
    assert try_image("good.png", GOOD).split(GOOD)[0][:-5] == text.split(GOOD)[0][:-5]
    resize(390)
    screenshot("390.png")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
    with pytest.raises(OSError):  # any other address of this machine
        socket.create_connection(("127.0.0.2", int(url.rsplit(":", 1)[1].rstrip("/"))), timeout=5)
