"""Every inline path on a device with the rules of a GPU, in a process of its own, as torch has one such device each."""

from pathlib import Path

import pytest

from tests.forks import Fork

PATHS = Path(__file__).with_name("inline_paths.py")
TESTS = """
import os, sys
import pytest
for name in [name for name in os.environ if name.startswith("PYTEST")]:
    del os.environ[name]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_inline_path_computes_on_the_device_what_it_computes_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(PATHS.parents[2])
    log = tmp_path / "log"
    with Fork("-c", TESTS, PATHS, log=log) as process:
        assert process.wait() == 0, log.read_text()[-10_000:]
