"""Compare the speed and memory of stock transformers and blip_ft on equal work.

    python recipes/benchmark.py             everything, about fifteen minutes on two cores
    python recipes/benchmark.py --quick     less than three minutes: one round, one image, 5 questions
    python recipes/benchmark.py --only steps --output table.md
    python recipes/benchmark.py --family blip-2    9 GiB of memory, about ten minutes on two cores
    python recipes/benchmark.py --family blip-2 --quick     seconds: a tiny model

Both run in one process and take turns; the table has medians, with minimum and maximum in brackets. The models have the
architecture of Salesforce/blip-vqa-base and the same random weights. Questions have 12 tokens and no padding, because
stock ignores the padding mask; answers have 4 tokens. Before the first measurement, the losses of both models must be
equal. A step is forward and backward; the optimizer is left out, because it is the same for both. On CUDA, times are
measured by events of the GPU.

With --family blip-2, the architecture is that of Salesforce/blip2-opt-2.7b, in bf16. LoRA adapters on q_proj and v_proj
of the language model are trained, and everything else is frozen. Prompts have 16 tokens, answers 4. With "cached
features", ours reads the Q-Former's outputs instead of images; with "not packed", each question has a row of its own.
"""

import argparse
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from benchmark_blip2 import Blip2Pair, blip2_opt_2_7b, tiny_blip2
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipConfig, BlipImageProcessor
from transformers.models.blip import modeling_blip

from blip_ft.arguments import DataArguments
from blip_ft.data.images import encode_row_images
from blip_ft.data.loading import load_vqa
from blip_ft.data.sampling import GroupedSampler
from blip_ft.data.tables import number_images
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering

QUESTION_TOKENS, ANSWER_TOKENS = 12, 4


def blip_base() -> BlipConfig:
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    ids = {"vocab_size": 30524, "bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 102}
    text = {**size, **ids, "encoder_hidden_size": 768, "max_position_embeddings": 512, "label_smoothing": 0.1}
    # with the default standard deviation of 1e-10 the loss would not depend on the images
    vision = {**size, "image_size": 384, "patch_size": 16, "initializer_range": 0.02}
    return BlipConfig(vision_config=vision, text_config=text)


class Pair:
    """The stock model and ours with the same weights, and the same work for both.

    Args:
        num_images: images in each batch.
    """

    def __init__(self, config: BlipConfig, device: torch.device, num_images: int) -> None:
        torch.manual_seed(0)
        self.device, self.num_images = device, num_images
        self.ours = BlipForQuestionAnswering(config).to(device)
        self.stock = modeling_blip.BlipForQuestionAnswering(config).to(device)
        self.stock.load_state_dict(self.ours.state_dict())
        size, self.vocabulary = config.vision_config.image_size, config.text_config.vocab_size
        self.decoder_start = config.text_config.bos_token_id
        self.pixels = torch.randn(num_images, 3, size, size, device=device)

    def batches(self, questions: int) -> dict[str, dict[str, torch.Tensor]]:
        """The inputs of each model for `questions` questions per image."""
        image_index = torch.arange(self.num_images, device=self.device).repeat_interleave(questions)
        ids = torch.randint(1, 100, (len(image_index), QUESTION_TOKENS), device=self.device)
        answers = torch.randint(1, 100, (len(image_index), ANSWER_TOKENS), device=self.device)
        answers[:, 0] = self.decoder_start
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": answers}
        repeated = {"pixel_values": self.pixels[image_index], "decoder_input_ids": answers}
        return {
            "stock": {**repeated, **text},
            "ours": {"pixel_values": self.pixels, "image_index": image_index, **text},
        }

    def step(self, name: str, batch: dict[str, torch.Tensor], bf16: bool = False) -> float:
        model = getattr(self, name).train()
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    def require_equal_losses(self) -> None:
        batches = self.batches(questions=2)
        stock, ours = (self.step(name, batches[name]) for name in ("stock", "ours"))
        ours /= ANSWER_TOKENS - 1  # our loss is a sum over the tokens of an answer, that of stock a mean
        if abs(stock - ours) > 1e-4:
            raise ValueError(f"The models do different work: the loss of stock is {stock:.5f}, ours is {ours:.5f}.")


def seconds(work: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round. They take turns; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                spent = start.elapsed_time(end) / 1000
            else:
                begun = time.perf_counter()
                run()
                spent = time.perf_counter() - begun
            if number:
                taken[name].append(spent)
    return taken


def row(work: str, taken: dict[str, list[float]], scale: float = 1.0, unit: str = "s") -> str:
    """A line of the table. scale: factor of all numbers, e.g. 1 / questions."""

    def cell(values: list[float]) -> str:
        low, middle, high = (scale * f(values) for f in (min, median, max))
        return f"{middle:.3g} {unit} ({low:.3g} to {high:.3g})"

    ratio = median(taken["stock"]) / median(taken["ours"])
    return f"| {work} | {cell(taken['stock'])} | {cell(taken['ours'])} | {ratio:.2f} x |"


def matmul_rate(config: BlipConfig, device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of the machine, in operations per second, for a matrix product of the vision model's shape."""
    width, inner = config.vision_config.hidden_size, config.vision_config.intermediate_size
    rows = 2 * ((config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1)
    rows *= 16 if device.type == "cuda" else 1
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(width, inner, device=device, dtype=dtype)
    best = min(seconds({"mm": lambda: left @ right}, device, rounds=20)["mm"])
    return 2 * rows * width * inner / best


def steps(pair: Pair, config: BlipConfig, rounds: int, questions_per_image: Sequence[int] = (1, 5, 13)) -> list[str]:
    lines = []
    for bf16 in (False, True):
        dtype = torch.bfloat16 if bf16 else torch.float32
        rate = matmul_rate(config, pair.device, dtype)
        for questions in questions_per_image:
            batches = pair.batches(questions)
            work = {name: lambda n=name, b=batches, h=bf16: pair.step(n, b[n], h) for name in batches}
            taken = seconds(work, pair.device, rounds)
            precision = "bf16" if bf16 else "fp32"
            label = f"step, {questions} question{'s' * (questions > 1)} per image, {precision}, per question"
            lines.append(row(label, taken, 1 / (questions * pair.num_images)))
            if questions == 5:
                # the counter does not count fused attention, so the math kernel does the same operations
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    pair.step("ours", batches["ours"])
                share = counter.get_total_flops() / median(taken["ours"]) / rate
                rates = f"{rate / 1e9:.0f} GFLOP/s, ours reaches"
                lines.append(f"| matmul rate, {str(dtype).removeprefix('torch.')} | {rates} | {100 * share:.0f} % | |")
    return lines


def frozen(pair: Pair, rounds: int) -> list[str]:
    """A step after the first epoch: stock with a frozen vision model, ours with cached image features."""
    batches = pair.batches(questions=5)
    for model in (pair.stock, pair.ours):
        model.vision_model.requires_grad_(False)
    with torch.no_grad():
        batches["ours"]["image_states"] = pair.ours.encode_images(batches["ours"].pop("pixel_values")).last_hidden_state
    taken = seconds({name: lambda n=name: pair.step(n, batches[n]) for name in batches}, pair.device, rounds)
    for model in (pair.stock, pair.ours):
        model.vision_model.requires_grad_(True)
    label = "step, frozen vision, ours with cached features, 5 questions per image, fp32, per question"
    return [row(label, taken, 0.2 / pair.num_images)]


def answers(pair: Pair, rounds: int) -> list[str]:
    batches = pair.batches(questions=5)
    work = {}
    for name, batch in batches.items():
        inputs = {
            key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask", "image_index") if key in batch
        }
        model = getattr(pair, name).eval()
        # no answer ends early, so both generate the same number of tokens
        settings = {"num_beams": 3, "max_length": 10, "min_length": 10, "do_sample": False}
        work[name] = lambda m=model, i=inputs, s=settings: m.generate(**i, **s)
    taken = seconds(work, pair.device, rounds)
    return [row("answers, 3 beams, 5 questions per image, fp32, per question", taken, 0.2 / pair.num_images)]


def image_decoding(config: BlipConfig, rounds: int) -> list[str]:
    """Decoding and resizing on one core. Stock returns floats; ours returns bytes, which the device normalizes."""
    size = config.vision_config.image_size
    processor = BlipImageProcessor(size={"height": size, "width": size})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = []
    for width, height in ((640, 480), (4000, 3000)):
        encoded = smooth_noise(width, height)
        rows = [{"image_id": "", "image": {"bytes": encoded, "path": None}}]
        work = {
            "stock": lambda e=encoded: processor(Image.open(io.BytesIO(e)), return_tensors="pt"),
            "ours": lambda r=rows: encode_row_images(r, processor),
        }
        taken = seconds(work, torch.device("cpu"), 5 * rounds)
        label = f"JPEG of {width} x {height} ({len(encoded) // 1024} kB) to {size} x {size}"
        lines.append(row(label, taken, 1000, "ms"))
        per_second = [f"{1 / median(taken[name]):.0f}" for name in ("stock", "ours")]
        lines.append(f"| the same, images per second and core | {per_second[0]} | {per_second[1]} | |")
    torch.set_num_threads(threads)
    return lines


def smooth_noise(width: int, height: int) -> bytes:
    """A JPEG of quality 90 with detail at all scales, like a photograph."""
    generator, content = np.random.default_rng(0), np.zeros((height, width, 3))
    for cells, weight in ((8, 0.5), (32, 0.25), (128, 0.15), (512, 0.1)):
        shape = (max(2, height * cells // 2048), max(2, width * cells // 2048), 3)
        coarse = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        content += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    file = io.BytesIO()
    Image.fromarray(content.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def blip2_steps(pair: Blip2Pair, rounds: int) -> list[str]:
    lines = []
    for questions in (1, 5):
        batches = pair.batches(questions)
        taken = seconds({name: partial(pair.step, name, batch) for name, batch in batches.items()}, pair.device, rounds)
        for name in list(batches)[1:]:
            way = name.removeprefix("ours")
            label = f"step, {questions} question{'s' * (questions > 1)} per image{way}, bf16, per question"
            compared = {"stock": taken["stock"], "ours": taken[name]}
            lines.append(row(label, compared, 1 / (questions * pair.num_images)))
    return lines


def used_memory(device: torch.device) -> float:
    """MiB, of the process or of the GPU."""
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else status_of_process("VmRSS")


def weights(pair: Blip2Pair) -> list[str]:
    """Memory of the model with and without what cached features replace. The pair cannot encode images afterwards."""
    lines = []
    before = used_memory(pair.device), bytes_of(pair.ours) / 2**20
    pair.free_image_encoder()
    after = used_memory(pair.device), bytes_of(pair.ours) / 2**20
    what = "memory of the process", "weights"
    for name, stock, ours in zip(what, before, after, strict=True):
        label = f"{name}; ours: cached features, vision model and Q-Former freed"
        lines.append(f"| {label} | {stock / 1024:.2f} GiB | {ours / 1024:.2f} GiB | {100 * ours / stock:.0f} % |")
    return lines


def bytes_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def peak_memory(name: str, pair: Pair | Blip2Pair) -> float:
    """MiB that one step with 5 questions per image needs in addition to the model, including gradients."""
    batch = pair.batches(questions=5)[name]
    if pair.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pair.step(name, batch)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = status_of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which creating the models has set
    pair.step(name, batch)
    return status_of_process("VmHWM") - before


def memory(pair: Pair | Blip2Pair, precision: str, flags: Sequence[str] = ()) -> list[str]:
    """flags: those that make a new process build the same pair."""
    if pair.device.type == "cuda":
        peaks = {name: peak_memory(name, pair) for name in ("stock", "ours")}
    else:  # each in a process of its own, which has only one peak
        command = [sys.executable, __file__, *flags, "--images", str(pair.num_images), "--peak"]
        peaks = {
            name: float(subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout.split()[-1])
            for name in ("stock", "ours")
        }
    stock, ours = (f"{peaks[name] / 1024:.2f} GiB" for name in ("stock", "ours"))
    label = f"peak memory in addition to the model, step, 5 questions per image, {precision}"
    return [f"| {label} | {stock} | {ours} | {100 * peaks['ours'] / peaks['stock']:.0f} % |"]


def status_of_process(name: str) -> float:
    """MiB of memory that the process uses now (VmRSS) or used at most (VmHWM). Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def order() -> list[str]:
    lines = []
    for number in (10_000, 1_000_000):
        images = np.arange(number) // 5
        before, begun = status_of_process("VmRSS"), time.perf_counter()
        rows = iter(GroupedSampler(images, 32, seed=0))
        next(rows)
        spent = time.perf_counter() - begun
        lines.append(
            f"| order of an epoch, {number:,} rows | | {spent:.2g} s, {status_of_process('VmRSS') - before:.0f} MiB | |"
        )
    return lines


def memory_with_rows(number: int) -> float:
    """MiB that the process uses after `number` questions are read and ordered: ten answers each, five per image."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in range(100):
            Image.new("RGB", (8, 8)).save(folder / f"{image}.png")
        with (folder / "metadata.jsonl").open("w") as file:
            for position in range(number):
                row = {
                    "file_name": f"{position // 5 % 100}.png",
                    "image_id": position // 5,
                    "question": f"what is the thing with the number {position} doing here?",
                    "answers": ["a dog"] * 7 + ["cat", "puppy", f"dog {position}"],
                }
                file.write(json.dumps(row) + "\n")
        rows, _ = load_vqa(DataArguments(dataset_name=name))
        next(iter(GroupedSampler(number_images(rows), 32, seed=0)))
        return status_of_process("VmRSS")


def loading() -> list[str]:
    command = [sys.executable, __file__, "--rows"]
    few, many = (
        float(subprocess.run([*command, number], capture_output=True, text=True, check=True).stdout.split()[-1])
        for number in ("10000", "1000000")
    )
    return [f"| memory for reading 1,000,000 rows of jsonl, more than for 10,000 | | {many - few:.0f} MiB | |"]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "blip_ft"))
    return f"{name}; {versions}; {date.today()}"


def blip_groups(pair: Pair, config: BlipConfig, quick: bool) -> dict[str, Callable[[], list[str]]]:
    rounds = 1 if quick else 3
    groups = {
        "steps": lambda: steps(pair, config, rounds, (5,) if quick else (1, 5, 13)),
        "frozen": lambda: frozen(pair, rounds),
        "answers": lambda: answers(pair, rounds),
        "images": lambda: image_decoding(config, rounds),
        "memory": lambda: memory(pair, "fp32"),
        "order": order,
        "loading": loading,
    }
    if quick:
        del groups["loading"]
    return groups


def blip2_groups(pair: Blip2Pair, quick: bool) -> dict[str, Callable[[], list[str]]]:
    flags = ["--family", "blip-2", "--device", str(pair.device), *["--quick"] * quick]
    return {
        "steps": lambda: blip2_steps(pair, 1 if quick else 3),
        "memory": lambda: memory(pair, "bf16", flags),
        "weights": lambda: weights(pair),
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("blip", "blip-2"), default="blip", help="Default: blip.")
    parser.add_argument(
        "--quick", action="store_true", help="One round, one image; blip: 5 questions only, blip-2: a tiny model."
    )
    parser.add_argument(
        "--only",
        default="",
        help="Measure one group: steps, frozen, answers, images, memory, order or loading; of blip-2 steps, memory or "
        "weights.",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="Default: cuda if there is a GPU, else cpu.")
    parser.add_argument(
        "--images", type=int, help="Images per batch. Default: 2, with --quick or blip-2 1; on CUDA 32."
    )
    parser.add_argument("--output", type=Path, help="File to write the table to as well.")
    parser.add_argument("--peak", choices=("stock", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    if args.rows:
        print(memory_with_rows(args.rows))
        return
    device, is_blip = torch.device(args.device), args.family == "blip"
    images = args.images or (32 if device.type == "cuda" else 2 if is_blip and not args.quick else 1)
    config = blip_base() if is_blip else tiny_blip2() if args.quick else blip2_opt_2_7b()
    pair = (Pair if is_blip else Blip2Pair)(config, device, images)
    if args.peak:
        print(peak_memory(args.peak, pair))
        return
    pair.require_equal_losses()
    groups = blip_groups(pair, config, args.quick) if is_blip else blip2_groups(pair, args.quick)
    lines = [
        f"{machine(device)}; images per batch: {images}",
        "",
        "| work | stock | ours | ratio |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name, group in groups.items():
        if args.only in name:
            found = group()
            lines += found
            print("\n".join(found), flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
