"""Settings of how a service changes: what is refused, and what restarts replicas."""

import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.serve.app.live import ScriptedEngine, endpoint
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Resources, Service
from vila_ops.serve.spec import Spec

AUTOSCALE = {"max_replicas": 4, "requests_per_replica": 2, "up_seconds": 1}
CHECKPOINT = Checkpoint(uri="s3://b/c", digest="d", parents=(), stage="sft", step=1)
VERSION = ModelVersion(name="m", version=1, checkpoint=CHECKPOINT, promoted=False)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"launch": "inline", "serve": {"autoscale": AUTOSCALE}}, "autoscale has no effect with launch inline"),
        ({"launch": "inline", "serve": {"autoscale": AUTOSCALE, "replicas": 4}}, "max_replicas 4 has no effect with 4"),
        ({"launch": "inline", "serve": {"samples": {"share": 1, "redact": ["("]}}}, r"redact '\(' is not a regular"),
        ({"launch": "inline", "serve": {"samples": {"share": 1, "redact": ["(?<!a)b"]}}}, "which has no look-around"),
        ({"launch": "inline", "serve": {"samples": {"share": 1, "redact": [r"(a)\1"]}}}, "no back references"),
        ({"launch": "inline", "serve": {"samples": {"share": 0}}}, "greater than 0"),
        ({"launch": "inline", "serve": {"canary": {"share": 1}}}, "less than 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Resources.model_validate(settings)


def test_a_golden_answer_has_to_be_an_expression() -> None:
    with pytest.raises(ValueError, match=r"golden.answer '\(red' is not a regular expression"):
        Service.model_validate({"name": "s", "golden": {"image": "a.png", "question": "What?", "answer": "(red"}})


def test_rules_of_a_canary_restart_no_replica_and_a_golden_question_does() -> None:
    plain = Spec.of(Service(name="s"), VERSION, Resources(launch="inline"))
    rules = Resources.model_validate({"launch": "inline", "serve": {"canary": {"share": 0.3, "level": 0.01}}})
    assert Spec.of(Service(name="s"), VERSION, rules).identity() == plain.identity()
    golden = {"image": "a.png", "question": "What?", "answer": "red"}
    asked = Service.model_validate({"name": "s", "golden": golden})
    assert Spec.of(asked, VERSION, Resources(launch="inline")).identity() != plain.identity()


def test_ray_serve_takes_the_settings_of_autoscaling() -> None:
    """Its own class checks them; in a process of its own, since importing Ray Serve takes long."""
    resources = {"launch": "ray", "ray_address": "h:1", "serve": {"autoscale": AUTOSCALE, "replicas": 2}}
    code = (
        "import sys\n"
        "from ray.serve.config import AutoscalingConfig\n"
        "from vila_ops.serve.backends.ray_serve import _number_of_replicas\n"
        "from vila_ops.serve.spec import Spec\n"
        "options = _number_of_replicas(Spec.model_validate_json(sys.argv[1]))\n"
        "config = AutoscalingConfig(**options.pop('autoscaling_config'))\n"
        "assert not options\n"
        "print(config.min_replicas, config.max_replicas, config.target_ongoing_requests, config.upscale_delay_s)\n"
    )
    spec = Spec.of(Service(name="s"), VERSION, Resources.model_validate(resources)).model_dump_json()
    done = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.splitlines()[-1] == "2 4 2.0 1.0"


@pytest.mark.parametrize(("limit", "status"), [(1, 503), (2**40, 200), (None, 200)])
def test_a_replica_that_needs_too_much_memory_is_not_ready(
    versions: tuple[ModelVersion, ModelVersion], scripted: ScriptedEngine, limit: int | None, status: int
) -> None:
    with endpoint(versions[0], scripted, max_memory_bytes=limit) as url:
        assert httpx.get(f"{url}/ready").status_code == status
