"""Quantises the language model of a LLaVA folder to 4 bits by AWQ: `python awq.py MODEL DATASET OUT`.

MODEL is a folder of `vila-ops export --out`; DATASET a sealed dataset for this model, whose samples with images
calibrate. Runs in an environment of llm-compressor's own, without vila-ops: docs/interop.md says how.
"""

import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from huggingface_hub import save_torch_state_dict
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlavaForConditionalGeneration

SAMPLES = 256
"""Samples that calibrate; the AWQ paper takes 128 or more."""
LAYERS = r"re:.*language_model\.layers\.\d+\."
MAPPINGS = [
    AWQMapping(f"{LAYERS}{scaled}$", [f"{LAYERS}{one}$" for one in balanced])
    for scaled, balanced in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )
]
"""Which layer's outputs are scaled for which layers after it, in a Llama and its like. llm-compressor's own mappings
match layers of the tower too."""
KEPT = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head.*"]
"""What is not quantised, under the names of every program that reads the folder."""


def main() -> None:
    """Quantise, and write a folder for vLLM."""
    source, dataset, out = map(Path, sys.argv[1:])
    if out.exists():
        sys.exit(f"{out} exists; give a folder that does not")
    if not torch.accelerator.is_available():  # llm-compressor 0.14 pins memory all the same, which fails then
        IntermediatesCache.pin_memory = lambda *_: None
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    processor = AutoProcessor.from_pretrained(source)
    batches = [batch(ids, processor.image_processor(images, return_tensors="pt")) for ids, images in samples(dataset)]
    decoder = model.model.language_model.layers
    group = next(size for size in (128, 64, 32) if all(n % size == 0 for n in widths(decoder)))
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        processor=processor,
        dataset=DataLoader(batches, batch_size=None),
        recipe=[
            AWQModifier(mappings=MAPPINGS),
            QuantizationModifier(config_groups={"language_model": scheme}, ignore=KEPT),
        ],
        sequential_targets=[type(decoder[0]).__name__],
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as draft:
        model.save_pretrained(draft, save_compressed=True)
        write(source, Path(draft), out)


def samples(dataset: Path) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """Tokens and images of training samples, in the format of docs/formats.md."""
    files = dataset / json.loads((dataset / "manifest.json").read_text())["data"]
    rows = [row for row in pq.read_table(files / "index.parquet").to_pylist() if row["num_images"]]
    train = [row for row in rows if row["split"] == "train"]
    for row in random.Random(0).sample(train, min(SAMPLES, len(train))):
        with (files / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            with tarfile.open(fileobj=file, mode="r|") as shard:
                head = json.load(io.BytesIO(following(shard)))
                yield head["input_ids"], [Image.open(io.BytesIO(following(shard))) for _ in head["images"]]


def following(shard: tarfile.TarFile) -> bytes:
    """The content of a tar's next member."""
    member = shard.next()
    assert member is not None
    file = shard.extractfile(member)
    assert file is not None
    return file.read()


def batch(ids: list[int], pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sample as the model reads it."""
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels["pixel_values"]}


def widths(decoder: torch.nn.ModuleList) -> Iterator[int]:
    """Inputs of the decoder's matrices, which groups of weights have to divide."""
    return (one.in_features for one in decoder.modules() if isinstance(one, torch.nn.Linear))


def write(source: Path, quantised: Path, out: Path) -> None:
    """Write the folder of the model with the language model, and no more, of the quantised one."""
    tensors = {}
    for folder, changed in ((source, False), (quantised, True)):
        for path in folder.glob("*.safetensors"):
            tensors |= {name: one for name, one in load_file(path).items() if ("language_model." in name) == changed}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    config = json.loads((source / "config.json").read_text())
    made = json.loads((quantised / "config.json").read_text())["quantization_config"]
    config["quantization_config"] = made | {"ignore": KEPT}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_torch_state_dict(tensors, out)


if __name__ == "__main__":
    main()
