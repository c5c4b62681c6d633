"""Any number of images anywhere: through our training path, through transformers' forward pass and generate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor, nn
from transformers import LlavaProcessor

from vila_ops.model import folder as model_folder
from vila_ops.model.modify import Modifications
from vila_ops.model.vila import VilaForConditionalGeneration

SIDE, PATCH, TOKENS = 336, 14, 576
FEW_SHOT = "".join(f"<image>\nA image of the {name}. " for name in ("cat", "dog", "sun", "sea")) + "<image>\nA"


def paint(count: int, *, side: int = SIDE) -> list[Pillow.Image]:
    """Different images of noise."""
    random = np.random.default_rng(0)
    return [Pillow.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "expert"])
def large(
    request: pytest.FixtureRequest, make_model: Any, build: Callable[..., Any], tmp_path_factory: Any
) -> tuple[VilaForConditionalGeneration, LlavaProcessor]:
    """A small model with 576 tokens for 336 pixels and a context of five images; with and without an expert."""
    whole, processor = build(make_model(image_size=SIDE, patch_size=PATCH))
    whole.config.text_config.max_position_embeddings = 4096
    assert whole.config.image_seq_length == TOKENS
    if request.param:
        folder = tmp_path_factory.mktemp("large")
        model_folder.save(whole, folder, processor=processor)
        whole = model_folder.load(folder, modifications=Modifications(visual_expert=True))
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if ".image." in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return whole, processor


@contextmanager
def calls(model: VilaForConditionalGeneration) -> Iterator[list[str]]:
    """Record the calls of tower and projector in the block."""
    seen: list[str] = []
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda *_: seen.append(name)

    hooks = [part.register_forward_pre_hook(note(name)) for name, part in parts.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def own_logits(model: VilaForConditionalGeneration, ids: Tensor, pixels: Tensor | None) -> Tensor:
    """Logits as training computes them: tower, projector, language model, head."""
    features = None if pixels is None else model.tower_features(pixels)
    hidden = model.hidden(model.embed(ids, features), use_cache=False, **model.routing(ids)).last_hidden_state
    actual: Tensor = model.lm_head(hidden)
    return actual


def test_four_shots_and_a_query_stand_in_order_and_count(large: Any) -> None:
    model, processor = large
    images = paint(5)
    inputs = processor(text=FEW_SHOT, images=images, return_tensors="pt")
    ids = inputs["input_ids"]
    is_image = ids[0] == model.config.image_token_id
    starts = [i for i in range(len(is_image)) if is_image[i] and (i == 0 or not is_image[i - 1])]
    assert len(starts) == 5
    assert int(is_image.sum()) == 5 * TOKENS
    with torch.no_grad():
        features = model.tower_features(inputs["pixel_values"])
        embeddings = model.embed(ids, features)
        for start, feature in zip(starts, features, strict=True):
            assert is_image[start : start + TOKENS].all()
            one = model.model.multi_modal_projector(feature[None])[0]
            assert torch.allclose(embeddings[0, start : start + TOKENS], one, atol=1e-5)
        logits = model(**inputs).logits
        assert torch.allclose(logits, own_logits(model, ids, inputs["pixel_values"]), atol=1e-5)
        images[1], images[3] = images[3], images[1]
        swapped = model(**processor(text=FEW_SHOT, images=images, return_tensors="pt")).logits
    assert torch.allclose(swapped[0, : starts[1]], logits[0, : starts[1]], atol=1e-5)
    assert (swapped[0, starts[1]] - logits[0, starts[1]]).abs().max() > 1e-2
    assert (swapped[0, -1] - logits[0, -1]).abs().max() > 1e-4


def test_few_shot_generation_with_a_cache_is_the_full_forward_pass(large: Any) -> None:
    model, processor = large
    inputs = processor(text=FEW_SHOT, images=paint(5), return_tensors="pt")
    made = model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        full = model(input_ids=made.sequences, pixel_values=inputs["pixel_values"]).logits[0]
    for step, cached in enumerate(made.logits):
        assert torch.allclose(cached[0], full[prompt + step - 1], atol=1e-5)
        allowed = full[prompt + step - 1].clone()
        allowed[model.config.eos_token_id] = -torch.inf  # min_new_tokens
        assert int(made.sequences[0, prompt + step]) == int(allowed.argmax())


@pytest.mark.parametrize("expert", [False, True])
def test_rows_with_none_one_and_three_images_are_what_they_are_alone(
    expert: bool, make_model: Any, build: Callable[..., Any], tmp_path: Path
) -> None:
    model, processor = build(make_model("siglip", "mlp_downsample"))
    if expert:
        model_folder.save(model, tmp_path, processor=processor)
        model = model_folder.load(tmp_path, modifications=Modifications(visual_expert=True))
    images = paint(4, side=56)
    texts = ["No image here at all.", "One <image> is here.", "<image> A dog <image> and a cat, and <image>"]
    shown: Sequence[list[Pillow.Image]] = ([], images[:1], images[1:])
    processor.tokenizer.padding_side = "right"
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits
    for row, (text, own) in enumerate(zip(texts, shown, strict=True)):
        alone = processor(text=text, images=own or None, return_tensors="pt")
        with torch.no_grad():
            expected = model(**alone).logits[0]
        assert torch.allclose(together[row, : len(expected)], expected, atol=1e-5)
        ids, pixels = alone["input_ids"], alone.get("pixel_values")
        assert torch.allclose(own_logits(model, ids, pixels)[0], expected, atol=1e-5)


def test_text_alone_runs_neither_tower_nor_projector(large: Any) -> None:
    model, processor = large
    text = processor(text="No image here.", return_tensors="pt")
    with calls(model) as seen, torch.no_grad():
        model(**text)
        model.generate(**text, max_new_tokens=3)
        own_logits(model, text["input_ids"], None)
    assert seen == []
    with calls(model) as seen, torch.no_grad():  # guards the lines above
        model(**processor(text="<image>", images=paint(1), return_tensors="pt"))
    assert seen == ["tower", "projector"]
