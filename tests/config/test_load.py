import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vila_ops.config import Config, Resources, Run
from vila_ops.config.base import build_schemas
from vila_ops.config.eval import CaptionCider
from vila_ops.config.load import load, merge, read
from vila_ops.config.mixture import Mixture
from vila_ops.config.model import LinearProjector
from vila_ops.config.train import Lora

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/recipes/tiny.yaml"
INLINE = ROOT / "configs/resources/inline.yaml"


def tiny(*overrides: str) -> Run:
    return load(TINY, resources=INLINE, overrides=overrides)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_recipe_loads(path: Path) -> None:
    assert load(path, resources=INLINE).recipe.stages


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("stages.sft.learning_rat=1e-5", r"recipe\.stages\.sft\.learning_rat\n"),
        ("stages.align.mixture.sources.pairs.wait=1", r"recipe\.stages\.align\.mixture\.sources\.pairs\.jsonl\.wait\n"),
        ("resources.gpu=1", r"resources\.gpu\n"),
        ("model.projector={kind: mpl}", r"recipe\.model\.projector\n"),
    ],
)
def test_an_unknown_key_is_named_with_its_path(override: str, place: str) -> None:
    with pytest.raises(ValidationError, match=place):
        tiny(override)


def test_overrides_change_what_they_name() -> None:
    run = tiny(
        "stages.sft.learning_rate=1e-5", "stages.align.trainable=[projector, language_model]",
        "resources.train.threads_per_worker=2", "model.projector={kind: mlp_downsample, factor: 3}",
    )  # fmt: skip
    assert run.recipe.stages["sft"].learning_rate == 1e-5
    assert run.recipe.stages["align"].trainable == ("projector", "language_model")
    assert run.resources.train.threads_per_worker == 2
    assert run.recipe.model.image_tokens() == 1


def test_text_is_written_as_the_model_says() -> None:
    text = tiny('model.after_image="\\n"', "model.chat_template=plain").recipe.text()
    assert (text.after_image, text.chat_template) == ("\n", "plain")
    assert tiny().recipe.text().after_image == ""


def test_an_override_changes_nothing_else_where_an_anchor_is_shared() -> None:
    """The tiny recipe gives the benchmarks of both suites by one YAML anchor."""
    run = tiny("final_suite.benchmarks.cider.max_new_tokens=3")
    found = [suite.benchmarks["cider"] for suite in (run.recipe.final_suite, run.recipe.stage_suite)]
    assert found == [CaptionCider(max_new_tokens=3), CaptionCider(max_new_tokens=8)]


@pytest.mark.parametrize(
    ("overrides", "of", "value"),
    [
        (["stages.sft.tuning.kind=lora"], lambda run: run.recipe.stages["sft"].tuning, Lora()),
        (
            ["stages.sft.tuning.kind=lora", "stages.sft.tuning.rank=4"],
            lambda run: run.recipe.stages["sft"].tuning,
            Lora(rank=4),
        ),
        (
            ["resources.train.stages.sft.micro_batch_size=2"],
            lambda run: run.resources.train.for_stage("sft").micro_batch_size,
            2,
        ),
        (["stages.sft.learning_rates.projector=1"], lambda run: run.recipe.stages["sft"].peak_rate("projector"), 1),
        (
            ["model.projector={kind: mlp_gelu, depth: 3}", "model.projector.kind=linear"],
            lambda run: run.recipe.model.projector,
            LinearProjector(),
        ),
    ],
)
def test_an_override_reaches_what_the_files_leave_out_and_replaces_a_mapping_whose_kind_changes(
    overrides: list[str], of: Callable[[Run], Any], value: Any
) -> None:
    assert of(tiny(*overrides)) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.tunings.kind=lora", r"no key 'tunings'; keys here are \['global_batch_size'"),
        ("resources.train.stages.nope.micro_batch_size=2", r"resources.train.stages names \['nope'\]"),
        ("stages.sft.learning_rate", r"has no '='"),
        ("stages.nope.learning_rate=1", r"no key 'nope'; keys here are \['align', 'pretrain', 'sft'\]"),
        ("name.first=1", r"no key 'name'|'name'"),
        ("stages.sft.trainable=[projector", r"'\[projector' is not valid YAML"),
        ("stages.sft.learning_rates={projector: 1, projector: 2}", r"given twice"),
        ("stages.sft.learning_rate=fast", r"learning_rate\n"),
        ("stages.sft.learning_rate=.nan", r"learning_rate\n"),
        ("stages.sft.num_steps=0", r"num_steps\n"),
    ],
)
def test_a_wrong_override_is_an_error_that_says_why(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(override)


def test_files_merge_left_to_right_and_the_own_keys_win(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="x: {one: 1, two: 1}\nlist: [1, 2]\n",
        b="x: {two: 2, three: 2}\n",
        own="extends: [a.yaml, b.yaml]\nx: {three: 3}\nlist: [3]\n",
    )
    assert read(tmp_path / "own.yaml") == {"x": {"one": 1, "two": 2, "three": 3}, "list": [3]}


def test_a_mapping_whose_kind_changes_is_replaced_whole() -> None:
    base = {"p": {"kind": "mlp_downsample", "factor": 3}, "q": 1}
    assert merge(base, {"p": {"kind": "linear"}}) == {"p": {"kind": "linear"}, "q": 1}
    assert merge(base, {"p": {"kind": "mlp_downsample"}}) == base
    assert merge(base, {"p": {"factor": 2}}) == {"p": {"kind": "mlp_downsample", "factor": 2}, "q": 1}
    assert merge(base, {"p": None}) == {"p": None, "q": 1}


def test_a_file_may_be_extended_twice_but_never_by_itself(tmp_path: Path) -> None:
    write(tmp_path, a="extends: [c.yaml]\n", b="extends: [c.yaml]\n", c="x: 1\n", d="extends: [a.yaml, b.yaml]\n")
    assert read(tmp_path / "d.yaml") == {"x": 1}
    write(tmp_path, c="extends: [d.yaml]\n")
    with pytest.raises(ValueError, match="extends itself through"):
        read(tmp_path / "d.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\nx: 2\n", r"key \['x'\] is given twice"),
        ("x:\n  y: 1\n  y: 1\n", r"(?s)line 2.*key \['y'\] is given twice"),
        ("extends: [gone.yaml]\n", r"no such config file: .*gone\.yaml \(extended by .*own\.yaml\)"),
        ("extends: base.yaml\n", r"not a list of files"),
        ("extends: [1]\n", r"not a list of files"),
        ("", r"holds NoneType, not a mapping"),
        ("- 1\n", r"holds list, not a mapping"),
        ("x: [1\n", r"is not valid YAML"),
        ("x: !!python/object/apply:os.getcwd []\n", r"is not valid YAML"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, own=text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "own.yaml")
    with pytest.raises(ValueError, match="no such config file"):
        read(tmp_path / "elsewhere.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E6", 1e6), ("-2.5e+3", -2500.0), ("1_0", 10), ("e5", "e5")]
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, own=f"x: {text}\n")
    assert read(tmp_path / "own.yaml") == {"x": value}


@pytest.mark.parametrize(
    ("micro_batch", "batch", "nearest"),
    [("3", 4, 3), ("8", 4, 8), ("4", 10, 8)],
)
def test_a_remainder_is_refused_with_a_batch_that_would_do(micro_batch: str, batch: int, nearest: int) -> None:
    overrides = [f"stages.{name}.global_batch_size={batch}" for name in ("align", "pretrain", "sft")]
    with pytest.raises(
        ValidationError, match=rf"'align': global_batch_size {batch} is not a multiple .* use {nearest},"
    ):
        tiny(f"resources.train.micro_batch_size={micro_batch}", *overrides)
    good = [f"stages.{name}.global_batch_size={nearest}" for name in ("align", "pretrain", "sft")]
    assert tiny(f"resources.train.micro_batch_size={micro_batch}", *good)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.sequence_length=95", r"'sft' has a sequence_length of 95 tokens but a sample may have 96; raise"),
        ("stages.sft.learning_rates={vision_tower: 1}", r"names \['vision_tower'\], which do not train"),
        ("stages.sft.trainable=[projector, projector]", r"twice"),
        ("stages.sft.mixture.split.salt=other", r"split objects differently"),
        ("stage_suite.max_tokens=100", r"give them the same mixture and max_tokens"),
        (
            "stages.sft.mixture.sources.words={kind: jsonl, path: tests/tiny/definitions, render: document}",
            r"trains on \['words'\], by which suite 'tiny' measures text skill",
        ),
        ("name=../elsewhere", r"String should match pattern"),
        ("stages.sft.mixture.name=a/b", r"String should match pattern"),
        ("stages.sft.name=align", r"stage 'sft' is named 'align'; remove its name"),
        ("resources.train.zero_stage=1", r"zero_stage 1 needs DeepSpeed"),
        ("resources.train.num_workers=2", r"launch inline is one worker, not 2"),
        ("resources.launch=ray", r"set ray_address"),
        ("resources.train.placement=SPREAD", r"placement and network have no effect with launch inline"),
        ("resources.train.network={interface: eth0}", r"placement and network have no effect with launch inline"),
        ("resources.train.stages={sft: {num_workers: 2}}", r"launch inline is one worker, not 2 of stage 'sft'"),
        ("resources.train.stages={sft: {zero_stage: 3}}", r"zero_stage 3 of stage 'sft' needs DeepSpeed"),
        (
            "resources.train.stages={stf: {micro_batch_size: 2}}",
            r"names \['stf'\], which .* \['align', 'pretrain', 'sft'\]",
        ),
        (
            "resources.train.stages={sft: {micro_batch_size: 3}}",
            r"'sft': global_batch_size 2 is .* micro_batch_size 3 x",
        ),
        ("stages.sft.epochs=1", r"num_steps or epochs, and 6 and 1.0 are given; set one"),
        ("stages.sft.num_steps=null", r"num_steps or epochs, and neither is given; set one"),
        ("model.image_size=13", r"image_size 13 is less than one patch of 14 pixels"),
        ("stages.sft.image_size=13", r"image_size 13 is less than one patch of 14 pixels"),
        ("stages.sft.image_size=140", r"an image takes 100 tokens but max_tokens is 96"),
        ("gate.rules=[{metric: x}]", r"rule on 'x' has no bound"),
        ("gate.rules=[{metric: text_loss, at_most: 9, slices: all}]", r"rule on 'text_loss' has slices, on which only"),
        ("gate.clean_of=[gqa]", r"clean of 'gqa', but mixture 'tiny_align' of stage 'align' is compared with \[\]"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny(override)


def test_lora_after_a_visual_expert_is_refused_before_anything_is_trained() -> None:
    expert = "stages.pretrain.tuning={kind: visual_expert}"
    with pytest.raises(ValidationError, match=r"'sft' has tuning lora after stage 'pretrain' gave .* a visual expert"):
        tiny(expert, "stages.sft.tuning={kind: lora}")
    assert tiny(expert, "stages.sft.tuning={kind: full}")
    assert tiny("stages.pretrain.tuning={kind: lora}", "stages.sft.tuning={kind: visual_expert}")


def test_a_stage_has_resources_of_its_own_and_the_rest_of_all() -> None:
    """The paper's runs: ZeRO-2 for align, ZeRO-3 after it."""
    train = {"num_workers": 4, "zero_stage": 3, "micro_batch_size": 2}
    cluster = Resources.model_validate({"launch": "ray", "ray_address": "head:1", "train": train})
    own = {"align": {"zero_stage": 2, "num_workers": 2}, "sft": {"micro_batch_size": 1}}
    whole = cluster.with_changes({"train.stages": own})
    found = [whole.for_stage(name) for name in ("align", "pretrain", "sft")]
    assert [(one.train.num_workers, one.train.zero_stage, one.train.micro_batch_size) for one in found] == [
        (2, 2, 2),
        (4, 3, 2),
        (4, 3, 1),
    ]
    assert found[1] == cluster
    assert found[0].for_stage("align") == found[0]
    with pytest.raises(ValidationError, match=r"resources\.train\.stages\.align\.num_worker\n"):
        tiny("resources.train.stages={align: {num_worker: 1}}")


def test_the_batch_of_a_stage_is_divided_by_its_own_resources() -> None:
    three = "resources.train.stages={sft: {micro_batch_size: 3}}"
    assert tiny("stages.sft.global_batch_size=3", "resources.train.micro_batch_size=2", three)


def test_a_stage_sees_images_of_the_size_that_it_or_the_last_one_before_it_names() -> None:
    recipe = tiny("stages.pretrain.image_size=56", "model.projector={kind: mlp_downsample, factor: 3}").recipe
    found = {name: recipe.text(name) for name in ("base", *recipe.stages)}
    assert {name: (text.image_size, text.image_tokens) for name, text in found.items()} == {
        "base": (28, 1), "align": (28, 1), "pretrain": (56, 4), "sft": (56, 4)
    }  # fmt: skip
    assert recipe.model_of("align") == recipe.model
    assert recipe.model_of("sft").model_dump() == {**recipe.model.model_dump(), "image_size": 56}
    back = tiny("stages.pretrain.image_size=56", "stages.sft.image_size=28").recipe
    assert back.text("sft") == back.text("base") == back.text()


LINES = {"kind": "jsonl", "path": "tests/tiny/pairs", "render": "caption"}


def named_alike(place: str, *overrides: str) -> None:
    """The tiny recipe with the mixture of `align` at another place too."""
    split = "{salt: tiny, validation: 0.2, test: 0.3}"
    pairs = "{pairs: {kind: jsonl, path: tests/tiny/pairs, render: caption}}"
    shared = f"{{name: tiny_align, split: {split}, shard_bytes: 40000, sources: {pairs}}}"
    tiny(*(f"{one}.mixture={shared}" for one in place.split()), *overrides)


@pytest.mark.parametrize(
    ("place", "override", "told"),
    [
        ("stages.sft", "stages.sft.image_size=56", "stages.align.mixture and stages.sft.mixture .* is 28 and 56"),
        ("stages.sft", "stages.sft.mixture.seed=7", "stages.align.mixture and stages.sft.mixture .*seed is 0 and 7"),
        (
            "final_suite stage_suite", "stages.align.mixture.sources.pairs.limit=9",
            r"stages.align.mixture and final_suite.mixture are both named 'tiny_align', but they are two datasets: "
            r"sources.pairs.limit is 9 and None; give one of them another name, or change both: edit the file",
        ),
        ("final_suite stage_suite", "max_tokens=100", "final_suite.mixture .* max_tokens is 100 and 96"),
    ],
)  # fmt: skip
def test_two_datasets_of_one_name_are_refused_naming_both_places(place: str, override: str, told: str) -> None:
    equal = ["final_suite.max_tokens=96", "stage_suite.max_tokens=96"]
    equal += [f"{suite}.benchmarks={{text_loss: {{kind: held_out_loss}}}}" for suite in ("final_suite", "stage_suite")]
    named_alike(place, *equal)
    with pytest.raises(ValidationError, match=told):
        named_alike(place, *equal, override)


@pytest.mark.parametrize(("kind", "share"), [("weight", "weight"), ("repeats", "repeats")])
def test_a_source_whose_share_is_0_is_left_out(kind: str, share: str) -> None:
    sources: dict[str, Any] = {"a": LINES, "b": {**LINES, share: 0}, "c": {**LINES, share: 2}}
    stated = {"name": "m", "blend": {"kind": kind}, "sources": sources, "quarantine": {"b": ["1"], "c": ["2"]}}
    without = {**stated, "sources": {"a": sources["a"], "c": sources["c"]}, "quarantine": {"c": ["2"]}}
    assert Mixture.model_validate(stated) == Mixture.model_validate(without)
    with pytest.raises(ValidationError, match=f"every source has {share} 0"):
        Mixture.model_validate({"name": "m", "blend": {"kind": kind}, "sources": {"b": sources["b"]}})
    for wrong in (-1, False, "0.5x"):
        with pytest.raises(ValidationError, match=rf"sources\.b\..*{share}"):
            Mixture.model_validate({**stated, "sources": {**sources, "b": {**LINES, share: wrong}}})


def test_a_share_of_0_that_has_no_effect_is_refused() -> None:
    sources = {"a": LINES, "b": {**LINES, "weight": 0}}
    with pytest.raises(ValidationError, match="greater than 0"):
        Mixture.model_validate({"name": "m", "blend": {"kind": "size"}, "sources": sources})


def test_only_the_recipe_is_identity() -> None:
    run = tiny()
    assert (
        tiny("resources.train.threads_per_worker=3", "resources.storage.store=/tmp/x").recipe.fingerprint()
        == run.recipe.fingerprint()
    )
    changes = ("stages.sft.seed=1", "model.seed=1", "stages.align.precision=bf16", "final_suite.seed=5", "name=other")
    for change in changes:
        assert tiny(change).recipe.fingerprint() != run.recipe.fingerprint()
    with pytest.raises(ValidationError, match="frozen"):
        run.recipe.name = "x"  # type: ignore[misc]


def test_the_order_of_the_stages_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    tree = read(TINY)
    turned = {**tree, "stages": dict(reversed(tree["stages"].items()))}
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(turned, sort_keys=False))
    other = load(tmp_path / "turned.yaml", resources=INLINE)
    assert list(other.recipe.stages) == ["sft", "pretrain", "align"]
    assert other.recipe.fingerprint() != tiny().recipe.fingerprint()


@pytest.mark.slow
def test_fingerprints_are_equal_in_every_process() -> None:
    code = (
        "import sys; from pathlib import Path; from vila_ops.config import load;"
        "sys.stdout.write(load(Path(sys.argv[1]), resources=Path(sys.argv[2])).recipe.fingerprint())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code, str(TINY), str(INLINE)],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout.decode()
        for seed in ("0", "1", "2")
    }
    assert told == {tiny().recipe.fingerprint()}


def test_a_gate_s_rule_is_on_what_the_final_suite_measures() -> None:
    with pytest.raises(ValidationError, match=r"rule on 'text_los', which final_suite 'tiny' does not .*'text_loss'\?"):
        tiny("gate.rules=[{metric: text_los, at_most: 9}]")
    for metric in ("text_loss", "pope_accuracy"):  # a benchmark, and a measure of one that has several
        assert tiny(f"gate.rules=[{{metric: {metric}, at_most: 9}}]").recipe.gate.rules[0].metric == metric


def test_no_setting_is_named_as_the_method_that_makes_an_object_a_mapping() -> None:
    """`dict(config)`, which Prefect calls for the arguments of a task, would call it."""
    kinds = [Config]
    for kind in kinds:
        kinds += [one for one in kind.__subclasses__() if one not in kinds]
    ours = [kind for kind in kinds if kind.__module__.startswith("vila_ops.config")]
    assert len(ours) > 50
    assert [kind.__name__ for kind in ours if "keys" in kind.model_fields] == []


def test_schemas_are_built_all_at_once_each_in_those_that_hold_it() -> None:
    class Inner(Config):
        number: int

    class Outer(Config):
        inner: Inner

    class Derived(Outer):
        other: Inner

    assert not Inner.__pydantic_complete__
    build_schemas()
    assert all(one.__pydantic_complete__ for one in (Inner, Outer, Derived, Run))
    made = Derived.model_validate({"inner": {"number": "1"}, "other": {"number": 2}})
    assert made.model_dump() == {"inner": {"number": 1}, "other": {"number": 2}}
    with pytest.raises(ValidationError, match=r"inner\.number"):
        Outer.model_validate({"inner": {}})
