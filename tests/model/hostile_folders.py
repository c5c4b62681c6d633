"""Model folders that attack who reads them, and a process that reads them under limits: run by
test_hostile_folders.py.

    python tests/model/hostile_folders.py SEEDS ROOT

SEEDS holds good folders: `plain`, `merging` (whole models), `tower` and `words` (their parts). For each attack a copy
of one is changed in ROOT and read. Prints the name of each before it is read, and after it `= OUTCOME`; `! EVENT` is
what the interpreter's audit hook saw and should not have.
"""

import os
import pickle
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hostile_changes import (
    FIRST,
    INDEX,
    PAYLOAD,
    SECOND,
    WEIGHTS,
    Change,
    Payload,
    added,
    another_head,
    another_layer,
    append,
    bad_regex,
    both,
    cut,
    drop,
    edit,
    edit_in,
    folder,
    half,
    header,
    index,
    link,
    many_files,
    pipe,
    put,
    remove,
    rename_token,
    template,
    tensors,
    tokenizer,
    torch_archive,
    two_files,
    widen,
)

from vila_ops.errors import CorruptArtifact

ADDRESS_SPACE = 8 * 2**30
FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.symlink", "os.chmod",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SETTINGS = ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json")


class Attack(NamedTuple):
    """A change of a valid folder, and the expected refusal."""

    name: str
    change: Change
    reason: str
    """A regular expression of the message; `^loaded$` for valid folders."""
    seed: str = "plain"


def attacks() -> Iterator[Attack]:
    for seed in ("plain", "merging", "tower", "words"):
        yield Attack(f"untouched_{seed}", lambda _: None, "^loaded$", seed)
    yield from files()
    yield from json_files()
    yield from code()
    yield from numbers()
    yield from headers()
    yield from keys()
    yield from indices()
    yield from tokenizers()
    yield from templates()
    yield from processors()
    yield from projectors()
    yield from parts()


def files() -> Iterator[Attack]:
    pickled = pickle.dumps(Payload())
    beside = (
        "pytorch_model.bin", "model.pt", "optimizer.pth", "data.pkl", "data.pickle", "model.ckpt", "table.npy",
        "tables.npz", "model.joblib", "tf_model.h5", "flax_model.msgpack", "training_args.bin", "modeling_evil.py",
        "evil.pyc", "evil.so", "evil.dll", "run.sh", "archive.zip", "archive.tar.gz", "adapter.BIN", "Evil.PY",
        "tower.onnx", "sub/evil.bin", ".hidden/evil.pkl", "custom_generate/generate.py", "evil.pth",
    )  # fmt: skip
    for name in beside:
        yield Attack(f"beside_{name}", put(name, pickled), "may hold code or pickled objects")
    yield Attack("pickle_instead", both(remove(WEIGHTS), put("pytorch_model.bin", pickled)), "may hold code")
    yield Attack("nothing_instead", remove(WEIGHTS), f"no {WEIGHTS}")
    for name, data in {
        "pickle": pickled,
        "text": b"weights",
        "gguf": b"GGUF" + bytes(64),
        "zeros": bytes(4096),
    }.items():
        yield Attack(f"weights_are_{name}", put(WEIGHTS, data), "header|JSON|too few")
    yield Attack("weights_are_a_torch_archive", torch_archive, "header|JSON")
    needed = {WEIGHTS: "no regular|no model|too few", "config.json": "missing|JSON|no regular"}
    needed |= dict.fromkeys(("tokenizer.json", "processor_config.json"), "missing|JSON|no regular|no tokenizer")
    for name, reason in needed.items():
        yield Attack(f"missing_{name}", remove(name), reason)
        yield Attack(f"empty_{name}", put(name, b""), reason)
        yield (
            Attack(f"half_{name}", half, "JSON|hole|header|cut")
            if name == WEIGHTS
            else Attack(f"half_{name}", cut(name), "JSON")
        )
        yield Attack(f"folder_{name}", both(remove(name), folder(name)), "not a regular file")
        yield Attack(f"pipe_{name}", both(remove(name), pipe(name)), "not a regular file")
        yield Attack(f"link_out_{name}", link(name, "/etc/passwd"), "link out of the folder")
        yield Attack(f"link_nowhere_{name}", link(name, "nothing.json"), "cannot be read")
        yield Attack(f"link_to_itself_{name}", link(name, name), "cannot be read|link out")
    yield Attack("link_to_zeros", link("more.safetensors", "/dev/zero"), "link out of the folder")
    yield Attack("link_upwards", link("notes.txt", "../../.."), "link out of the folder")
    yield Attack("link_to_a_folder", link("sub", "/etc"), "link out of the folder")
    yield Attack("many_files", many_files, "more than 10000 files")


def json_files() -> Iterator[Attack]:
    bad = {
        "nan": (b'{"a": NaN}', "NaN is not a number"),
        "infinity": (b'{"a": -Infinity}', "Infinity is not a number"),
        "overflow": (b'{"a": 1e999}', "1e999 is not a number"),
        "twice": (b'{"a": 1, "a": 2}', "stands twice"),
        "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        "nested": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than"),
        "list": (b"[]", "not a JSON object"),
        "digits": (b'{"a": ' + b"9" * 10_000 + b"}", "digits"),
        "latin": (b'{"a": "\xff"}', "decode"),
        "not_json": (b"__import__('os').system('true')", "JSON"),
    }
    for file in (*SETTINGS, "tokenizer.json"):
        for name, (data, reason) in bad.items():
            yield Attack(f"{file}_{name}", put(file, data), reason)
    yield Attack("config.json_of_5_mib", put("config.json", b" " * (5 * 2**20)), "at most")


def code() -> Iterator[Attack]:
    auto_map = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    for file in (*SETTINGS, "preprocessor_config.json", "special_tokens_map.json"):
        yield Attack(f"auto_map_{file}", edit(file, auto_map=auto_map), "asks for code")
        yield Attack(f"trust_{file}", edit(file, trust_remote_code=True), "asks for code")
    for part in ("text_config", "vision_config"):
        yield Attack(f"auto_map_{part}", edit_in("config.json", part, auto_map=auto_map), "asks for code")
        yield Attack(f"model_type_{part}", edit_in("config.json", part, model_type="evil"), "no model that can be")
        yield Attack(f"architecture_{part}", edit_in("config.json", part, architectures=["Evil"]), "no class of")
    yield Attack(
        "auto_map_pixels", edit_in("processor_config.json", "image_processor", auto_map=auto_map), "asks for code"
    )
    yield Attack("pipelines", edit("config.json", custom_pipelines={"evil": {"impl": "evil.Evil"}}), "asks for code")
    yield Attack("architecture", edit("config.json", architectures=["EvilForCausalLM"]), "no class of transformers")
    yield Attack("architecture_number", edit("config.json", architectures=[1]), "no class of transformers")
    yield Attack("architecture_path", edit("config.json", architectures=["os.system"]), "no class of transformers")
    yield Attack("processor_class", edit("processor_config.json", processor_class="Evil"), "no class of transformers")
    yield Attack(
        "tokenizer_class", edit("tokenizer_config.json", tokenizer_class="../evil"), "no class of transformers"
    )
    yield Attack(
        "image_processor_type",
        edit_in("processor_config.json", "image_processor", image_processor_type="Evil"),
        "no class of transformers",
    )
    for value in ("evil", "llama", None, 7, ["llava"]):
        yield Attack(f"model_type_{value}", edit("config.json", model_type=value), "supported are llava")


def numbers() -> Iterator[Attack]:
    fields = {
        "text_config": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"),
        "vision_config": ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
    }
    values = {"negative": -2, "huge": 2**62, "fraction": 1.5, "text": "many", "list": [1, 2], "large": 1000}
    for part, names in fields.items():
        for field in names:
            for value_name, value in values.items():
                yield Attack(
                    f"{part}_{field}_{value_name}",
                    edit_in("config.json", part, **{field: value}),
                    "config.json|weights",
                )
    others: dict[str, Any] = {
        "image_token_index": -1,
        "image_seq_length": -16,
        "vision_feature_layer": 99,
        "vision_feature_select_strategy": "evil",
        "projector_hidden_act": "evil",
        "text_config": "evil",
        "vision_config": [],
        "tie_word_embeddings": "evil",
    }
    for field, value in others.items():
        yield Attack(f"config_{field}", edit("config.json", **{field: value}), "config.json")
    yield Attack("image_token_beyond", edit("config.json", image_token_index=10**6), "image_token_index 1000000")
    yield Attack("image_token_text", edit("config.json", image_token_index="<image>"), "config.json")
    yield Attack("no_heads", edit_in("config.json", "text_config", num_key_value_heads=0), "no model that can be")


def headers() -> Iterator[Attack]:
    yield Attack("header_beyond_the_file", put(WEIGHTS, struct.pack("<Q", 10**6) + b"{}"), "states a header of")
    yield Attack("header_of_exabytes", put(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), "states a header of")
    yield Attack("header_of_17_mib", put(WEIGHTS, struct.pack("<Q", 17 * 2**20) + b" " * (17 * 2**20)), "at most")
    texts = {
        "empty": (b"", "JSON"),
        "no_tensors": (b"{}", "holds 0 tensors"),
        "list": (b"[]", "not a JSON object"),
        "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
        "nan": (b'{"a": NaN}', "NaN is not a number"),
        "twice": (b'{"a": {"dtype":"F32","shape":[],"data_offsets":[0,4]},"a": {}}', "stands twice"),
        "metadata_list": (b'{"__metadata__": [1]}', "__metadata__"),
        "metadata_nan": (b'{"__metadata__": {"a": NaN}}', "NaN"),
        "metadata_number": (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        "metadata_nested": (b'{"__metadata__": {"a": {}}}', "__metadata__"),
    }
    for name, (text, reason) in texts.items():
        yield Attack(f"header_{name}", put(WEIGHTS, struct.pack("<Q", len(text)) + text), reason)
    lies: dict[str, tuple[Any, str]] = {
        "dtype_unknown": ({"dtype": "PICKLE"}, "unknown dtype"),
        "dtype_number": ({"dtype": 32}, "unknown dtype"),
        "dtype_other_width": ({"dtype": "F16"}, "does not fill"),
        "shape_negative": ({"shape": [-1, -2048]}, "no counts"),
        "shape_fraction": ({"shape": [1.5]}, "no counts"),
        "shape_true": ({"shape": [True]}, "no counts"),
        "shape_text": ({"shape": "64"}, "no counts"),
        "shape_huge": ({"shape": [2**40, 2**40]}, "does not fill"),
        "shape_missing": ({"shape": None}, "no counts"),
        "offsets_overlap": ({"data_offsets": [0, 8192]}, "hole or an overlap"),
        "offsets_beyond": ({"data_offsets": [2**40, 2**40 + 8192]}, "hole or an overlap"),
        "offsets_reversed": ({"data_offsets": [8192, 0]}, "does not fill"),
        "offsets_negative": ({"data_offsets": [-8192, 0]}, "no counts"),
        "offsets_three": ({"data_offsets": [0, 1, 2]}, "no counts"),
        "offsets_text": ({"data_offsets": ["0", "8"]}, "no counts"),
        "a_field_more": ({"evil": 1}, "must have dtype"),
    }
    for name, (fields, reason) in lies.items():
        yield Attack(f"header_{name}", header(lambda stated, f=fields: stated[FIRST].update(f)), reason)
    yield Attack("header_a_field_less", header(lambda stated: stated[FIRST].pop("dtype")), "must have dtype")
    yield Attack("header_text_for_a_tensor", header(lambda stated: stated.update({FIRST: "x"})), "must have dtype")
    yield Attack("bytes_behind", lambda at: append(at / WEIGHTS, bytes(8)), "hole or an overlap")


def keys() -> Iterator[Attack]:
    for name in (FIRST, SECOND, "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"):
        yield Attack(f"without_{name}", tensors(lambda state, n=name: state.pop(n)), "missing")
        yield Attack(f"empty_{name}", tensors(lambda state, n=name: state.update({n: state[n][:0]})), "misshapen")
        change = tensors(lambda state, n=name: state.update({n: state[n].long()}))
        yield Attack(f"whole_numbers_{name}", change, "unsupported dtype")
    yield Attack("transposed", tensors(lambda state: state.update({FIRST: state[FIRST].T.contiguous()})), "misshapen")
    yield Attack("one_more", tensors(lambda state: state.update({"evil": state[SECOND].clone()})), "unexpected")
    yield Attack("a_layer_more", tensors(another_layer), "unexpected")
    yield Attack("int8", tensors(lambda state: state.update({SECOND: state[SECOND].char()})), "unsupported dtype")
    yield Attack("two_names", tensors(lambda state: state.update({FIRST[6:]: state[FIRST].clone()})), "twice, as")
    yield Attack("another_head", tensors(another_head), "holds a different head")
    yield Attack("no_linear_projector", edit("config.json", projector_hidden_act="linear"), "not the identity")


def indices() -> Iterator[Attack]:
    places = {
        "outside": ("../model.safetensors", "its own folder only"),
        "absolute": ("/etc/passwd", "its own folder only"),
        "in_a_folder": ("sub/model.safetensors", "its own folder only"),
        "a_pickle": ("pytorch_model.bin", "its own folder only"),
        "missing": ("model-00002-of-00002.safetensors", "which are missing"),
        "dots": ("..", "its own folder only"),
    }
    for name, (place, reason) in places.items():
        yield Attack(f"index_{name}", index(lambda stated, p=place: stated.update({FIRST: p})), reason)
    yield Attack("index_of_more", index(lambda stated: stated.update(evil=WEIGHTS)), "do not hold them")
    yield Attack("index_of_less", index(lambda stated: stated.pop(FIRST)), "does not place there")
    yield Attack("index_number", index(lambda stated: stated.update({FIRST: 1})), "no weight_map")
    yield Attack("index_without_map", put(INDEX, b"{}"), "no weight_map")
    yield Attack("index_list", put(INDEX, b'{"weight_map": []}'), "no weight_map")
    yield Attack("index_empty", put(INDEX, b""), "JSON")
    yield Attack("index_of_nothing", put(INDEX, b'{"weight_map": {}}'), "does not name")
    copied = both(index(lambda _: None), lambda at: shutil.copy(at / WEIGHTS, at / "more.safetensors"))
    yield Attack("a_file_beside_the_index", copied, "does not name")
    yield Attack("a_file_without_index", lambda at: shutil.copy(at / WEIGHTS, at / "more.safetensors"), "no .* names")
    yield Attack("a_tensor_in_two_files", two_files, "does not place there")


def tokenizers() -> Iterator[Attack]:
    yield Attack(
        "no_image_token", tokenizer(lambda stated: rename_token(stated, "<image>", "<img>")), "no token|<image>"
    )
    yield Attack("image_token_elsewhere", edit("config.json", image_token_index=5), "the same id in both")
    yield Attack("id_beyond", tokenizer(lambda stated: added(stated, id=900)), "beyond the embedding")
    yield Attack("id_negative", tokenizer(lambda stated: added(stated, id=-1)), "token id -1")
    yield Attack("id_huge", tokenizer(lambda stated: added(stated, id=2**40)), "token id")
    yield Attack("id_text", tokenizer(lambda stated: added(stated, id="7")), "token id '7'")
    yield Attack("id_fraction", tokenizer(lambda stated: added(stated, id=1.5)), "token id")
    yield Attack("tokenizer_without_model", tokenizer(lambda stated: stated.pop("model")), "not a readable tokenizer")
    yield Attack(
        "tokenizer_unknown", tokenizer(lambda stated: stated["model"].update(type="Evil")), "not a readable tokenizer"
    )
    yield Attack(
        "tokenizer_wrong_types",
        tokenizer(lambda stated: stated.update(added_tokens={"a": 1})),
        "not a readable tokenizer",
    )
    yield Attack("tokenizer_regex", tokenizer(bad_regex), "not a readable tokenizer")


def templates() -> Iterator[Attack]:
    escapes = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ canary) }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages['__class__'] }}",
        "{{ messages|attr('append') }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ ''['__cla' ~ 'ss__'] }}",
        "{{ namespace.__init__ }}",
        "{% set x = '__globals__' %}{{ joiner[x] }}",
    )
    for number, text in enumerate(escapes):
        yield Attack(f"escape_{number}", template(text), "chat template names|chooses attributes")
    for word in ("include 'x'", "import 'x' as y", "from 'x' import y", "extends 'x'"):
        yield Attack(f"template_{word.split()[0]}", template("{% " + word + " %}"), "reads another template")
    loop = "{% for a in range(99999) %}"
    bombs = {
        "loops": loop * 3 + "x" + "{% endfor %}" * 3,
        "silent_loops": loop * 3 + "{% set y = a %}" + "{% endfor %}" * 3,
        "range": "{% for a in range(999999999) %}x{% endfor %}",
        "power": "{{ 9 ** 9 ** 9 ** 9 }}",
        "text": "{{ 'a' * 9999999999 }}",
        "texts": "{% set a = 'a' * 99 * 99 * 99 * 99 * 99 * 99 * 99 * 99 %}{{ a }}",
        "doubling": "{% set n = namespace(t='a' * 99) %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "wide": "{{ 'a'|center(99999999999) }}",
        "joined": "{% set n = namespace(t='abc') %}{% for a in range(40) %}{% set n.t = n.t|join(n.t) %}{% endfor %}",
    }
    for name, text in bombs.items():
        yield Attack(f"bomb_{name}", template(text), "does not end|holds the number|power")
    yield Attack("template_broken", template("{% for %}"), "chat template is not valid")
    yield Attack("template_deep", template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), "chat template is not valid")
    yield Attack("template_long", template("x" * 200_000), "characters")


def processors() -> Iterator[Attack]:
    sizes = {
        "negative": {"height": -56, "width": -56}, "zero": {"height": 0, "width": 0},
        "oblong": {"height": 56, "width": 28}, "huge": {"height": 10**6, "width": 10**6},
        "text": "56", "nothing": None, "list": [56], "empty": {},
        "fraction": {"height": 56.5, "width": 56.5}, "true": True, "other": {"height": 42, "width": 42},
    }  # fmt: skip
    for name, size in sizes.items():
        yield Attack(
            f"pixels_size_{name}",
            edit_in("processor_config.json", "image_processor", size=size),
            "image processor|no model that can be|weights|image_size",
        )
    for name, value in {"two": [0.5, 0.5], "text": "half", "texts": ["a", "b", "c"], "nothing": None}.items():
        change = edit_in("processor_config.json", "image_processor", image_mean=value)
        yield Attack(f"pixels_mean_{name}", change, "image_mean")
    yield Attack("pixels_std_zero", edit_in("processor_config.json", "image_processor", image_std=[0, 1, 1]), "above 0")
    yield Attack("pixels_list", edit("processor_config.json", image_processor=[1]), "not an object")


def projectors() -> Iterator[Attack]:
    merging = {"kind": "mlp_downsample", "factor": 2, "depth": 2}
    others: dict[str, Any] = {
        "unknown": {"kind": "evil"}, "text": "mlp_downsample", "factor_0": merging | {"factor": 0},
        "factor_huge": merging | {"factor": 10**9}, "depth": merging | {"depth": 10**9}, "more": merging | {"evil": 1},
        "factor_other": merging | {"factor": 3}, "deep_mlp": {"kind": "mlp_gelu", "depth": 10**9},
    }  # fmt: skip
    for name, projector in others.items():
        yield Attack(f"projector_{name}", edit("config.json", projector=projector), "config.json|weights", "merging")
    facts = {"package": "evil", "version": "1", "revision": 1}
    plugins: dict[str, Any] = {"text": "evil", "list": [facts], "few": {"package": "evil"}, "more": facts | {"evil": 1}}
    for name, plugin in plugins.items():
        yield Attack(
            f"plugin_{name}", edit("config.json", projector_plugin=plugin), "projector_plugin is not", "merging"
        )
    yield Attack("plugin_missing", edit("config.json", projector_plugin=facts), "evil 1 adds; it is not", "merging")
    not_square = edit("config.json", vision_feature_select_strategy="full")
    yield Attack("patches_not_square", not_square, "not a square grid", "merging")
    yield Attack("seq_length_wrong", edit("config.json", image_seq_length=576), "tokens for an image", "merging")
    for side in (-56, 0, 10**9, "56", 42):
        yield Attack(f"side_{side}", edit("config.json", vision_side=side), "config.json", "merging")


def parts() -> Iterator[Attack]:
    for seed in ("tower", "words"):
        pickled = both(remove(WEIGHTS), put("pytorch_model.bin", pickle.dumps(Payload())))
        auto_map = edit("config.json", auto_map={"AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
        changes: dict[str, tuple[Change, str]] = {
            "pickle": (pickled, "may hold code"),
            "code": (put("modeling_evil.py", PAYLOAD.encode()), "may hold code"),
            "auto_map": (auto_map, "asks for code"),
            "link": (link(WEIGHTS, "/etc/passwd"), "link out"),
            "model_type": (edit("config.json", model_type="evil"), "evil|no model that can be"),
            "architecture": (edit("config.json", architectures=["Evil"]), "no class of transformers"),
            "layers": (edit("config.json", num_hidden_layers=2**40), "counts something"),
            "too_many_layers": (edit("config.json", num_hidden_layers=1000), "tensors in all"),
            "too_wide": (edit("config.json", hidden_size=2**20), "parameters|no model that can be"),
            "header": (put(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), "states a header"),
            "half": (half, "truncated|header"),
            "empty": (put(WEIGHTS, b""), "too few"),
            "nan": (put("config.json", b'{"a": NaN}'), "NaN"),
        }
        for name, (change, reason) in changes.items():
            yield Attack(f"{seed}_{name}", change, reason, seed)
        norm = {"tower": "pre_layrnorm.weight", "words": "model.norm.weight"}[seed]
        yield Attack(f"{seed}_a_tensor_less", tensors(lambda state, n=norm: drop(state, n)), "hold|holds", seed)
        yield Attack(f"{seed}_a_tensor_wide", tensors(lambda state, n=norm: widen(state, n)), "does not hold", seed)


def main(seeds: Path, root: Path) -> None:
    from vila_ops.config import Model  # heavy, and only this process needs it
    from vila_ops.config.engine import TorchEngine
    from vila_ops.generate.engine import EngineOptions
    from vila_ops.generate.load import open_folder
    from vila_ops.model import build

    def read(seed: str, at: Path) -> object:
        if seed in ("plain", "merging"):
            return open_folder(at, TorchEngine(), EngineOptions(root / "features")).tokenizer.stop_ids
        part = {"kind": "hub", "name": str(at), "revision": "0"}
        random = {"kind": "random", "tokenizer": str(seeds / "plain")}
        tower = part if seed == "tower" else {"kind": "random"}
        words = part if seed == "words" else random
        model = Model.model_validate(
            {
                "vision_tower": tower,
                "language_model": words,
                "projector": {"kind": "linear"},
                "image_size": 56,
                "patch_size": 14,
            }
        )
        return build.build_model(model, vocabulary=300, image_id=3, eos_id=2, cache=root / "cache")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in FORBIDDEN:
            print("!", event, arguments, flush=True)  # noqa: T201 what the test reads
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            print("!", event, arguments, flush=True)  # noqa: T201

    watching = False
    sys.addaudithook(audit)
    for seed in ("plain", "merging", "tower", "words"):
        read(seed, seeds / seed)  # libraries open files on first use, which no folder causes
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for attack in attacks():
        at = root / "attacked"
        shutil.copytree(seeds / attack.seed, at)
        attack.change(at)
        print(attack.name, flush=True)  # noqa: T201
        watching = True
        print("=", outcome(lambda a=attack, f=at: read(a.seed, f)), flush=True)  # noqa: T201
        watching = False
        shutil.rmtree(at)


def outcome(read: Callable[[], object]) -> str:
    """`loaded`, `refused` with its message, or `RAISED` with an unexpected exception."""
    try:
        read()
    except (ValueError, CorruptArtifact) as error:
        return f"refused {error}".replace("\n", " ")
    except BaseException as error:  # noqa: BLE001 that nothing else is raised is what is tested
        return f"RAISED {type(error).__name__} {error}".replace("\n", " ")
    return "loaded"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
