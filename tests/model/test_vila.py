import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from vila_ops.model.trainable import component_of, set_trainable
from vila_ops.model.vila import losses


def test_equal_configs_give_equal_weights_and_another_seed_does_not(make_model: Any, build: Callable[..., Any]) -> None:
    first, again, other = (build(make_model(seed=seed))[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(first[projector], other[projector])


def test_features_stand_where_the_placeholders_are_in_order(make_model: Any, build: Callable[..., Any]) -> None:
    whole, _ = build(make_model("clip", "mlp_downsample"))
    image = whole.config.image_token_id
    features = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[image] * 4, 50, *[image] * 4], [*[image] * 4, 51, 52, 53, 54, 55, 2]])
    with torch.no_grad():
        embeddings = whole.embed(ids, features)
        projected = whole.model.multi_modal_projector(features)
        words = whole.get_input_embeddings()(ids)
    assert torch.equal(embeddings[0, 1:5], projected[0])
    assert torch.equal(embeddings[0, 6:10], projected[1])
    assert torch.equal(embeddings[1, 0:4], projected[2])
    text = ids != image
    assert torch.equal(embeddings[text], words[text])


@pytest.mark.parametrize(("places", "images"), [(4, 0), (4, 2), (3, 1), (0, 1), (8, 1)])
def test_a_wrong_number_of_placeholders_is_refused(
    places: int, images: int, make_model: Any, build: Callable[..., Any]
) -> None:
    whole, _ = build(make_model("clip", "mlp_downsample"))
    ids = torch.tensor([[1, *[whole.config.image_token_id] * places, 2]])
    features = torch.zeros(images, 16, 32) if images else None
    with pytest.raises(ValueError, match="image tokens but"):
        whole.embed(ids, features)


@pytest.mark.parametrize("trainable", [("projector",), ("projector", "language_model"), ("vision_tower",)])
def test_only_the_named_parts_train(trainable: tuple[Any, ...], make_model: Any, build: Callable[..., Any]) -> None:
    whole, _ = build(make_model())
    modules = {
        "vision_tower": whole.model.vision_tower,
        "projector": whole.model.multi_modal_projector,
        "language_model": whole.model.language_model,
    }
    trained = set_trainable(whole, trainable)
    assert tuple(trained) == trainable
    for part, module in modules.items():
        assert all(p.requires_grad == (part in trainable) for p in module.parameters())
        if part in trainable:
            assert {id(p) for _, p in trained[part]} == {id(p) for p in module.parameters()}
    assert component_of("lm_head.weight") == "language_model"
    again = set_trainable(whole, ("projector",))
    assert not any(p.requires_grad for p in whole.model.language_model.parameters())
    assert list(again) == ["projector"]


def test_losses_are_the_cross_entropies_of_the_wanted_positions(make_model: Any, build: Callable[..., Any]) -> None:
    whole, _ = build(make_model())
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 7, -100, 9, 9], [-100, -100, -100, -100, 11]])
    with torch.no_grad():
        logits = whole.lm_head(hidden)
        expected = cross_entropy(logits.view(10, -1), labels.view(10), reduction="none", ignore_index=-100)
        targets = torch.tensor([1, 3, 4, 9])
        total, actual = losses(whole, hidden, targets, labels.view(10)[targets])
    assert float(total) == pytest.approx(float(expected.sum()), rel=1e-6)
    assert torch.allclose(actual, expected[labels.view(10) >= 0], atol=1e-6)


def test_importing_a_task_does_not_import_its_heavy_work() -> None:
    code = (
        "import sys, vila_ops.data.preprocess.prepare, vila_ops.train.stage, vila_ops.model.assemble;"
        "assert not {'torch', 'ray', 'deepspeed', 'transformers', 'mlflow'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
