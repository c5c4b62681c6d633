"""Captioned images to shards, in images per second: `prepare` on Ray beside a torch DataLoader with as many processes.

Both read a JPEG, decode it, pad it with grey to a square, resize it (bicubic) to 336, encode it (JPEG 95, 4:4:4),
tokenise its caption and write a WebDataset tar. The bytes of the images are equal, which is checked. The DataLoader's
workers do all but the writing, which its main process does. Both are timed without their start: from the first tenth of
the DataLoader's samples, and from the first shard of each of our workers, to the end.

Part 1: images of 640 x 480, decoded exactly. Part 2: photos of 4000 x 3000, ours with scaled decoding, whose error is
printed. VILA_BENCH_IMAGES (20 000) and VILA_BENCH_ROUNDS (3) make it smaller.
"""

import io
import json
import os
import secrets
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from result import result
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset

from vila_ops.artifacts import store
from vila_ops.cluster import ALLOCATOR
from vila_ops.config import Mixture, Resources, TextFormat
from vila_ops.config.images import ImageReading, Webp
from vila_ops.data.images import Fit, square
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.packages.normalisation import HALVES
from vila_ops.packages.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[1]
IMAGES = int(os.environ.get("VILA_BENCH_IMAGES", "20000"))
ROUNDS = int(os.environ.get("VILA_BENCH_ROUNDS", "3"))
WORKERS = 2
SIDE, IMAGE_TOKENS = 336, 576
GREY = (127, 127, 127)
"""Half of 255, rounded down: the mean colour of the recipe's random tower."""
TARGET, TARGET_SCALED = 1.0, 2.5
DISTINCT, DISTINCT_PHOTOS = 200, 12
SHARDS = 12 * WORKERS


def main() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="vila") as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        import ray  # reads these

        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {**ALLOCATOR, "PYTHONPATH": str(ROOT)}},
        )
        try:
            small = source(folder / "small", draw=image, distinct=DISTINCT, count=IMAGES)
            photos = source(folder / "photos", draw=photo, distinct=DISTINCT_PHOTOS, count=max(48, IMAGES // 50))
            warm = source(folder / "warm", draw=image, distinct=8, count=64)
            run_ours(warm, folder / "out", decode="exact")
            exact = rounds(small, folder / "out", decode="exact")
            scaled = rounds(photos, folder / "out", decode="scaled")
        finally:
            ray.shutdown()
        worst, mean = error(photos)
    ours, peer = (statistics.median(exact[name]) for name in ("ours", "peer"))
    fast, slow = (statistics.median(scaled[name]) for name in ("ours", "peer"))
    camera = {
        "ours": round(fast, 1), "peer": round(slow, 1), "ratio": round(fast / slow, 3), "target": TARGET_SCALED,
        "max_error": worst, "mean_error": round(mean, 3), "rates": scaled,
    }  # fmt: skip
    ok = ours / peer >= TARGET and fast / slow >= TARGET_SCALED
    more = {"images": IMAGES, "workers": WORKERS, "rates": exact, "camera": camera}
    result("preprocess", ours=ours, peer=peer, target=TARGET, ok=ok, unit="images/s", **more)


def rounds(files: Path, out: Path, *, decode: str) -> dict[str, list[float]]:
    """Rates of both, alternating; the images of the first round of exact decoding are compared."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(ROUNDS):
        rate, written = run_peer(files, out)
        rates["peer"].append(rate)
        theirs = dict(images(written, first=DISTINCT))
        rate, shards = run_ours(files, out, decode=decode)
        rates["ours"].append(rate)
        if decode == "exact" and number == 0:
            same = [data == theirs[drawn] for drawn, data in images(shards[0], first=DISTINCT)]
            if not all(same):
                raise RuntimeError(f"{sum(same)} of {len(same)} images are equal")
        print(decode, {name: round(rate[-1], 1) for name, rate in rates.items()}, flush=True)
    return {name: [round(rate, 1) for rate in of_one] for name, of_one in rates.items()}


def run_ours(files: Path, out: Path, *, decode: str) -> tuple[float, list[Path]]:
    """Images per second of `prepare` on the running Ray, and the shards."""
    shutil.rmtree(out, ignore_errors=True)
    count = sum(1 for _ in (files / "records.jsonl").open())
    mixture = Mixture.model_validate(
        {
            "name": "bench",
            "sources": {"own": {"kind": "jsonl", "path": str(files), "render": "caption"}},
            "images": {"encoding": {"kind": "jpeg"}, "decode": decode},
            "shard_bytes": max(2**16, count * 58_000 // SHARDS),
        }
    )
    places = {name: str(out / name) for name in ("store", "data", "cache")}
    import ray

    address = ray.get_runtime_context().gcs_address
    resources = Resources.model_validate(
        {"launch": "ray", "ray_address": address, "storage": places, "prepare": {"num_workers": WORKERS}}
    )
    prepare(mixture, text(), resources)
    manifests = sorted((out / "store/shard").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    sealed = [path.stat().st_mtime for path in manifests]
    counts = [store.read_manifest(str(path.parent))["facts"]["num_samples"] for path in manifests]
    seconds = sealed[-1] - sealed[WORKERS - 1]
    rate = sum(counts[WORKERS:]) / seconds if len(counts) > WORKERS else 0.0
    return rate, sorted((out / "store/shard").rglob("shard.tar"))


class Captions(Dataset[dict[str, Any]]):
    """The peer: a data set as a team without vila-ops would write it."""

    def __init__(self, files: Path) -> None:
        self.files = files
        self.lines = (files / "records.jsonl").read_text().splitlines()
        self.tokenizer = build_tokenizer(text().language_model, chat_template="chatml", cache=files)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = json.loads(self.lines[index])
        image, caption = record["turns"][0]["parts"]
        with Pillow.open(self.files / image["image"]) as opened:
            rgb = opened.convert("RGB")
        side = max(rgb.size)
        padded = Pillow.new("RGB", (side, side), GREY)
        padded.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        out = io.BytesIO()
        padded.resize((SIDE, SIDE), Pillow.Resampling.BICUBIC).save(out, "JPEG", quality=95, subsampling=0)
        ids = self.tokenizer(caption["text"], add_special_tokens=False)["input_ids"]
        return {"id": record["id"], "input_ids": [1] + [3] * IMAGE_TOKENS + ids + [2], "image": out.getvalue()}


def run_peer(files: Path, out: Path) -> tuple[float, Path]:
    """Images per second of a DataLoader that fills a tar, and the tar."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    captions = Captions(files)
    loader: Any = DataLoader(captions, batch_size=16, num_workers=WORKERS, collate_fn=list, prefetch_factor=4)
    skip, done, started = len(captions) // 10, 0, 0.0
    with tarfile.open(out / "peer.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for batch in loader:
            if not started and done >= skip:
                started, skip = time.monotonic(), done
            for sample in batch:
                image = sample.pop("image")
                for suffix, data in (("json", json.dumps(sample).encode()), ("0.jpg", image)):
                    info = tarfile.TarInfo(f"{sample['id']}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                done += 1
        seconds = time.monotonic() - started
    return (done - skip) / seconds, out / "peer.tar"


def images(shard: Path, *, first: int) -> Iterator[tuple[int, bytes]]:
    """For the first samples of a shard: the number of its distinct image, and the encoded square."""
    with tarfile.open(shard) as tar:
        drawn = 0
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            if member.name.endswith(".json"):
                drawn = int(json.load(file)["id"]) % DISTINCT
            else:
                yield drawn, file.read()
                first -= 1
            if not first:
                return


def text() -> TextFormat:
    return TextFormat.model_validate(
        {
            "language_model": {"kind": "random", "tokenizer": str(ROOT / "tests/tiny/tokenizer")},
            "vision_tower": {"kind": "random"},
            "chat_template": "chatml",
            "image_size": SIDE,
            "image_tokens": IMAGE_TOKENS,
            "max_tokens": 2048,
        }
    )


def source(folder: Path, *, draw: Callable[[int], Pillow.Image], distinct: int, count: int) -> Path:
    """A folder of `count` captioned images, of which `distinct` are different files."""
    folder.mkdir(parents=True)
    for number in range(distinct):
        draw(number).save(folder / f"{number:03d}.jpg", quality=85)
    with (folder / "records.jsonl").open("w") as out:
        for number in range(count):
            words = f"A temple by a lake, or a flower in the sun, number {number}, taken on a clear day in spring."
            parts = [{"image": f"{number % distinct:03d}.jpg"}, {"text": words}]
            about = {"object": f"thing {number}", "category": "", "licence": "CC0-1.0", "provenance": "benchmark"}
            out.write(json.dumps({"id": str(number), **about, "turns": [{"role": "document", "parts": parts}]}) + "\n")
    return folder


def image(seed: int) -> Pillow.Image:
    """A crop of a real photo at 640 x 480, mirrored or not, brighter or darker."""
    draw = np.random.default_rng(seed)
    photos = load_sample_images().images
    whole = Pillow.fromarray(photos[seed % len(photos)])
    width = int(draw.integers(400, whole.width))
    height = width * 2 // 3
    left, top = int(draw.integers(0, whole.width - width)), int(draw.integers(0, whole.height - height))
    part = whole.resize((640, 480), Pillow.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return _shaded(np.asarray(part), draw)


def photo(seed: int) -> Pillow.Image:
    """Real photos tiled with mirrored edges: 4000 x 3000 with detail down to the pixel."""
    draw = np.random.default_rng(seed)
    tile = load_sample_images().images[seed % 2]
    tile = np.concatenate([tile, tile[:, ::-1]], axis=1)
    tile = np.tile(np.concatenate([tile, tile[::-1]]), (5, 5, 1))
    left, top = (int(draw.integers(0, limit)) for limit in (640, 427))
    return _shaded(tile[top : top + 3000, left : left + 4000], draw)


def _shaded(array: NDArray[np.uint8], draw: np.random.Generator) -> Pillow.Image:
    array = array[:, ::-1] if draw.integers(2) else array
    return Pillow.fromarray(np.clip(array * draw.uniform(0.7, 1.2), 0, 255).astype(np.uint8))


SCALED = ImageReading(decode="scaled")


def error(photos: Path) -> tuple[int, float]:
    """Largest and mean difference, of 255, between squares of scaled and of exact decoding."""
    worst, means = 0, []
    make = partial(square, size=SIDE, fit=Fit("pad", HALVES[0]), encoding=Webp())
    for file in sorted(photos.glob("*.jpg")):
        data = file.read_bytes()
        one, two = (np.asarray(Pillow.open(io.BytesIO(d)), np.int16) for d in (make(data), make(data, reading=SCALED)))
        worst = max(worst, int(np.abs(one - two).max()))
        means.append(float(np.abs(one - two).mean()))
    return worst, statistics.fmean(means)


if __name__ == "__main__":
    main()
