"""The versions that deepspan declares to work with, in its own package metadata, against those that are installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "deepspan"
_DEVELOPMENT = "dev"  # the extra that nothing needs at run time


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def known_packages() -> list[str]:
    """Every package that deepspan can use at run time, and itself; that alone in a checkout that is not installed."""
    return list(dict.fromkeys([DISTRIBUTION, *(requirement.name for requirement, _ in _declared())]))


def conflicts() -> Iterator[str]:
    """One line for every installed version outside of what deepspan declares.

    What an extra asks for counts once the package that the extra is about, its first one, is there: numpy 2 is fine
    until MindSpore, whose bfloat16 does not work with it, is beside it.
    """
    about: dict[str, str] = {}
    for requirement, extra in _declared():
        subject = about.setdefault(extra, requirement.name) if extra else DISTRIBUTION
        version = installed_version(requirement.name)
        if version is None or installed_version(subject) is None:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            todo = f"pip install '{requirement.name}{requirement.specifier}'"
            yield f"{requirement.name} {version} does not fit {subject}: {todo}"


def _declared() -> Iterator[tuple[Requirement, str]]:
    """(requirement, extra) pairs for this platform; the extra is empty for what is always needed."""
    if installed_version(DISTRIBUTION) is None:
        return
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        for extra in ("", *(extra for extra in extras if extra != _DEVELOPMENT)):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield requirement, extra
                break
