"""`vila-ops import`, `export` and `generate`: models from other programs, for them, and one answer of a model."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vila_ops.cli.options import AsJson, as_yaml, print_result, say
from vila_ops.device import Device, device_of

Checkpoint = Annotated[str, typer.Argument(help="A sealed model's place in the store, s3://..., or any model folder")]


def import_model(
    source: Annotated[Path, typer.Argument(help="Folder of an NVlabs VILA or a LLaVA-HF checkpoint")],
    out: Annotated[Path, typer.Option("--out", help="The model folder to write; absent or empty")],
    token_order: Annotated[
        Literal["rows", "columns"] | None,
        typer.Option("--token-order", help="Token order of mlp_downsample, where the checkpoint does not tell"),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="Name of a template, where the checkpoint does not tell")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model folder of a third-party checkpoint, and print the recipe's `model:` that starts from it."""
    from vila_ops.model.importing.checkpoint import import_checkpoint

    made = import_checkpoint(source, out, token_order=token_order, chat_template=chat_template)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print_result(made, as_json)
    else:
        say(as_yaml({"model": made.model.model_dump(mode="json", exclude_none=True)}))


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write the model to; absent or empty")] = None,
    to: Annotated[
        Literal["transformers", "gguf"],
        typer.Option("--to", help="Form of --out: the model's own files, or llama.cpp's model.gguf and mmproj.gguf"),
    ] = "transformers",
    weights: Annotated[
        Literal["f32", "f16", "q8_0"] | None,
        typer.Option("--weights", help="Type of the language model's matrices in a GGUF; default: f16"),
    ] = None,
    check: Annotated[
        Literal["transformers", "vllm", "gguf"] | None,
        typer.Option("--check", help="Check this program alone; ends with 1 if it cannot load the model"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which programs load a model, and why others do not; with --out, write it without our manifest."""
    from vila_ops.artifacts import output
    from vila_ops.model import export as exports

    if weights is not None and (to != "gguf" or out is None):
        raise ValueError("--weights has no effect without --to gguf and --out")
    if to == "gguf" and out is None:
        raise ValueError("--to gguf has no effect without --out")
    if out is not None:
        output.check_folder(out)

    folder = _folder(checkpoint.rstrip("/"))
    findings = [exports.check(folder, target) for target in ([check] if check else exports.TARGETS)]
    if out is not None and to == "gguf":
        for file in exports.write_for_llama_cpp(folder, out, weights or "f16"):
            bits = f"{file.num_bytes} bytes, {file.bits_per_weight} bits a weight"
            print(f"wrote {out / file.name}: {bits}", file=sys.stderr)
    elif out is not None:
        exports.write_plain(folder, out)
        print(f"wrote {out}", file=sys.stderr)
    if as_json:
        print_result(findings, as_json)
    else:
        for finding in findings:
            say(f"{finding.target:12} {'yes' if finding.loads else 'no '}  {'; '.join(finding.reasons)}")
    if check and not findings[0].loads:
        raise typer.Exit(1)


def generate(
    checkpoint: Checkpoint,
    question: Annotated[str, typer.Argument(help="The question; <image> marks places of images, else they come first")],
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="An image file; may be given several times", metavar="FILE")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens")] = 128,
    device: Annotated[Device, typer.Option("--device", help="What computes; auto: a GPU if there is one")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all CPUs")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, about images where some are given, in the model's chat template."""
    if missing := [str(path) for path in images or () if not path.is_file()]:
        raise ValueError(f"no such image file: {', '.join(missing)}")
    device_of(device)  # an error before every byte of the model is read
    folder = _folder(checkpoint.rstrip("/"))
    from vila_ops.config.engine import TorchEngine
    from vila_ops.generate.ask import ask
    from vila_ops.generate.engine import EngineOptions
    from vila_ops.generate.load import open_folder

    options = EngineOptions(device=device, threads=threads or len(os.sched_getaffinity(0)))
    engine = open_folder(folder, TorchEngine(), options)
    answer = ask(engine, question, images or (), max_new_tokens=max_new_tokens)
    engine.close()
    if as_json:
        print_result(answer, as_json)
    else:
        say(answer.text)
        if answer.finish_reason == "length":
            print(f"cut after {answer.answer_tokens} tokens; --max-new-tokens sets the limit", file=sys.stderr)


def _folder(place: str) -> Path:
    """The files of a sealed folder, every byte compared with its manifest, or the folder itself."""
    from vila_ops.artifacts import store
    from vila_ops.artifacts.kinds import Artifact

    if not place.startswith("s3://") and (Path(place) / "config.json").is_file():
        return Path(place)
    if not (place.startswith("s3://") or (Path(place) / store.MANIFEST).is_file()):
        raise ValueError(f"{place} holds no model: neither config.json nor, of a sealed one, {store.MANIFEST}")
    return store.content(Artifact(uri=place, digest=store.read_manifest(place)["digest"]))
