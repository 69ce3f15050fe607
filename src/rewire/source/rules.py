"""What changed in the reference between releases of Transformers, as switches.

The conversion follows the newest rules. A tree of an older release is converted by the rules that it was made with,
which its version tells. The versions were found by building the trees of twelve releases from 5.0 to 5.24.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rules:
    """Switches; all on is the newest.

    Attributes:
        other_bases: bases of the modular class that stand for none of the parent's are added to them.
        twins_behind: a class copied to a PIL file stands behind an assignment that has its place there.
        kept_names: names of other packages, like `mamba_ssm`, are never renamed.
        soft_feature_extraction: feature extraction files load without torch, as PIL files do.
        video_kwargs: classes called `…VideoProcessorKwargs` go to the video processing file.
        module_getattr: a module-level `__getattr__ = f(…)` is passed on to the files whose names it speaks of.
        attribute_removes_method: an attribute of the modular class removes the parent's method of its name.
        delete_annotated: `del self.x` also removes the parent's annotated assignment to `self.x`.
        base_by_ending: a base that ends with the parent's base takes its place.
        deprecation_is_added: a method with no decorator but `deprecate_kwarg` inherits the parent's others.
    """

    other_bases: bool = True
    twins_behind: bool = True
    kept_names: bool = True
    soft_feature_extraction: bool = True
    video_kwargs: bool = True
    module_getattr: bool = True
    attribute_removes_method: bool = True
    delete_annotated: bool = True
    base_by_ending: bool = True
    deprecation_is_added: bool = True


NEWEST = Rules()

SINCE = {
    "other_bases": (5, 2),
    "twins_behind": (5, 7),
    "kept_names": (5, 15),
    "soft_feature_extraction": (5, 15),
    "video_kwargs": (5, 17),
    "module_getattr": (5, 17),
    "attribute_removes_method": (5, 17),
    "delete_annotated": (5, 17),
    "base_by_ending": (5, 17),
    "deprecation_is_added": (5, 24),
}
"""The release with which each rule came."""


def rules_for(version: str) -> Rules:
    """The rules of a release.

    >>> rules_for("5.24.0") == NEWEST, rules_for("5.4.0").module_getattr
    (True, False)
    """
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    return Rules(**{name: numbers >= since for name, since in SINCE.items()})


def version_of(package: Path) -> str | None:
    """`__version__` as the package's `__init__.py` says it, without importing it."""
    init = package / "__init__.py"
    text = init.read_text("utf-8") if init.is_file() else ""
    found = re.search(r"^__version__ = [\"'](.+)[\"']", text, re.MULTILINE)
    return found.group(1) if found else None
