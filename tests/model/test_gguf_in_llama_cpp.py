"""llama.cpp computes of the GGUF files what we compute.

Needs xllamacpp, which CI has not; docs/interop.md tells of a run.
"""

import logging
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

pytest.importorskip("xllamacpp", reason="xllamacpp, a package with llama.cpp, is not installed", exc_type=ImportError)

from tests.model.llama_cpp import MARKER, LlamaCpp, write_q4_k_m
from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.config.images import Webp
from vila_ops.data.images import square
from vila_ops.data.text.rendering import render
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.torch_engine.loaded_model import LoadedModel, read_model
from vila_ops.model import export
from vila_ops.model.assemble import assemble
from vila_ops.packages.tokenizer import IMAGE_TOKEN

log = logging.getLogger(__name__)
QUESTION = "Is there a dog?"
FEATURE_ERROR = 2e-3
"""Of the largest feature: llama.cpp's GELUs are the tanh form, from tables of 16 bits."""
LOGIT_ERROR = {"f32": 2e-3, "f16": 2e-3, "q8_0": 2e-2, "q4_k_m": 2e-1}
"""Of the largest logit; keys and values are 16 bits in its cache."""
TOKENS = 24


@pytest.fixture(scope="module")
def folder(
    make_model: Callable[..., Model],
    make_resources: Callable[..., Resources],
    tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """With rows of 256 weights, as Q4_K and Q6_K need them."""
    language_model = {"kind": "random", "tokenizer": str(tiny / "tokenizer"), "hidden_size": 256}
    model = make_model("siglip", language_model=language_model)
    return content(assemble(model, make_resources(tmp_path_factory.mktemp("store"))))


@pytest.fixture(scope="module")
def ours(folder: Path) -> LoadedModel:
    return read_model(folder, EngineOptions(device="cpu"))


@pytest.fixture(scope="module")
def image(ours: LoadedModel, tiny: Path) -> bytes:
    side = ours.model.config.vision_side
    return square((tiny / "pairs" / "dog.png").read_bytes(), size=side, fit=ours.image_aspect_ratio, encoding=Webp())


@pytest.fixture(scope="module", params=list(LOGIT_ERROR))
def theirs(request: Any, folder: Path, ours: LoadedModel, tmp_path_factory: Any) -> Iterator[tuple[str, LlamaCpp]]:
    """The kind of a file, and the model in llama.cpp; Q4_K_M is made of the F16 file, as llama-quantize does."""
    out = tmp_path_factory.mktemp("gguf") / request.param
    if request.param == "q4_k_m":
        export.write_for_llama_cpp(folder, out, "f16")
        bits = write_q4_k_m(out / "model.gguf", out / "quantised.gguf")
        (out / "quantised.gguf").replace(out / "model.gguf")
        log.info(f"q4_k_m: {bits:.2f} bits a weight")
    else:
        export.write_for_llama_cpp(folder, out, request.param)
    text = ours.model.config.text_config
    opened = LlamaCpp(out, rows=text.vocab_size, width=text.hidden_size)
    yield request.param, opened
    opened.close()


def pixels(encoded: bytes) -> Any:
    return np.asarray(Pillow.open(BytesIO(encoded)).convert("RGB"))


def prompt(ours: LoadedModel, text: str) -> str:
    """A user's turn as text, with llama.cpp's marker for an image."""
    messages: Any = [{"role": "user", "content": f"{IMAGE_TOKEN}{text}"}]
    return render(ours.tokenizer.fast, messages, prompt=True).replace(IMAGE_TOKEN, MARKER)


@torch.inference_mode()
def test_features_agree_up_to_its_gelu(theirs: tuple[str, LlamaCpp], ours: LoadedModel, image: bytes) -> None:
    known = ours.model.model.multi_modal_projector(ours.features([image]))[0].numpy()
    gap = np.abs(theirs[1].features(pixels(image)) - known).max() / np.abs(known).max()
    log.info(f"{ours.model.config.vision_config.model_type} {theirs[0]}: feature error {gap:.1e} of the largest")
    assert gap < FEATURE_ERROR


@torch.inference_mode()
def test_greedy_text_is_ours_until_two_tokens_are_nearly_tied(
    theirs: tuple[str, LlamaCpp], ours: LoadedModel, image: bytes
) -> None:
    kind, other = theirs
    tokenizer = ours.tokenizer
    chunks = other.chunks(prompt(ours, QUESTION), [pixels(image)])
    ids = other.ids(chunks, image_id=tokenizer.image_id)
    answer: list[int] = []
    for _ in range(TOKENS):
        hidden = ours.model.hidden(ours.embed(torch.tensor([ids + answer]), [image]), use_cache=False)
        answer.append(int(ours.model.lm_head(hidden.last_hidden_state[0, -1])[: len(tokenizer.fast)].argmax()))
    hidden = ours.model.hidden(ours.embed(torch.tensor([ids + answer]), [image]), use_cache=False).last_hidden_state
    known = ours.model.lm_head(hidden[0, len(ids) - 1 :]).numpy()
    got = other.logits(chunks, answer)
    error = np.abs(got - known).max()
    log.info(f"{ours.model.config.vision_config.model_type} {kind}: logit error {error / np.abs(known).max():.1e}")
    assert error < LOGIT_ERROR[kind] * np.abs(known).max()
    words = slice(0, len(tokenizer.fast))
    best = np.sort(known[:, words], axis=1)
    same = got[:, words].argmax(1) == known[:, words].argmax(1)
    log.info(f"the same token at {int(same.sum())} of {len(same)} places")
    assert (same | (best[:, -1] - best[:, -2] < 2 * error)).all()


def test_a_chat_prompt_has_our_tokens(theirs: tuple[str, LlamaCpp], ours: LoadedModel, image: bytes) -> None:
    from vila_ops.data.records import Image

    shown = Image(image)
    for text in (QUESTION, "  two\n\nlines, 12345 and 3.14", "Zażółć gęślą jaźń 猫🙂"):
        chunks = theirs[1].chunks(prompt(ours, text), [pixels(image)])
        expected = ours.tokenizer.prompt([("user", (shown, text))])
        assert theirs[1].ids(chunks, image_id=ours.tokenizer.image_id) == expected
