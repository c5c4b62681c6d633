"""Writes format-N.tar.xz: a small store as this version seals it, and known.json, what is in it.

Run once, by the version that introduces a format: `python -m tests.golden.stores.make`. The archive of a released
format never changes: tests/artifacts/test_store_formats.py shows by it that later versions read the format.
"""

import json
import tarfile
import tempfile
from pathlib import Path

from tests import made_elsewhere
from tests.artifacts.known_store import known
from tests.test_exactness import write_data
from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.artifacts.store_format import FORMAT
from vila_ops.config import Resources
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.registry.alias_register import move
from vila_ops.train.stage import train_stage


def main() -> None:
    """Make the store and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root)
        places = {f"storage.{name}": f"{root}/{name}" for name in ("store", "cache", "data")}
        resources = Resources(launch="inline").with_changes({**places, "storage.features_leave_free": 1.0})
        mixture = made_elsewhere.mixture(root)
        small = {"kind": "random", "hidden_size": 32, "num_layers": 2, "num_heads": 2}
        model = made_elsewhere.model(
            root,
            vision_tower={**small, "architecture": "clip"},
            language_model={**small, "tokenizer": str(root / "tiny/tokenizer")},
        )
        base = assemble(model, resources)
        data = prepare(mixture, model.text(max_tokens=128), resources)
        trained = train_stage(made_elsewhere.stage(mixture), model, data, base, resources)
        evaluate(made_elsewhere.suite(mixture), trained, data, resources)
        version = ModelVersion(name="own", version=1, checkpoint=trained, promoted=True)
        move("own", {"champion": version}, over=None, reason="the first", store=f"{root}/store")
        (root / "known.json").write_text(json.dumps(known(root / "store"), indent=1))
        with tarfile.open(Path(__file__).parent / f"format-{FORMAT}.tar.xz", "w:xz", preset=9) as tar:
            for name in ("store", "known.json"):
                tar.add(root / name, name)


if __name__ == "__main__":
    main()
