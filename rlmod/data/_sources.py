"""Several files as one set of problems: lists, patterns of names, and mixtures with weights."""

import glob
import heapq
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlmod.data._store import collect
from rlmod.types import Problem

log = logging.getLogger(__name__)

KEY = "data.path (or data.validation_path)"
FORM = "a path, a list of paths, or for a mixture a list of {path: ..., weight: ...}"
OWN_FIELDS = ("prompt_field", "answer_field", "template", "answer_pattern")
MAGIC = frozenset("*?[")
MOST_REPETITIONS = 1000
"""Times that a mixture may repeat a problem per pass. Beyond, the pass is far longer than the data, and a weight is likely a slip."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Paths and patterns whose files are read one after the other, and the weight of their problems in a mixture."""

    paths: tuple[str, ...]
    weight: float | None
    fields: Mapping[str, str | None] = field(default_factory=dict)
    """The entry's own values of ``OWN_FIELDS``, for files whose columns have other names."""

    @property
    def name(self) -> str:
        return ", ".join(self.paths)

    def find_files(self) -> list[str]:
        """Return the files in the order of the paths, those of a pattern sorted by name, and each file once.

        ValueError for a path that is not a file, and for a pattern that no file matches.
        """
        found: dict[Path, str] = {}
        repeated = 0
        for path in self.paths:
            for file in _expand(path):
                place = Path(file).expanduser().resolve()
                repeated += place in found
                found.setdefault(place, file)
        if repeated:
            log.warning("%s names %d files more than once; each is read once", KEY, repeated)
        return list(found.values())


def parse_sources(path: Any) -> list[Source]:
    """Return what ``data.path`` names: one source, or those of a mixture. ValueError for another form, or for a bad weight."""
    if OmegaConf.is_config(path):
        path = OmegaConf.to_container(path, resolve=True)
    entries = [path] if isinstance(path, str | Path | Mapping) else path
    if not isinstance(entries, Sequence) or not entries:
        raise ValueError(f"{KEY} must be {FORM}, got {path!r}")
    weighted = [entry for entry in entries if isinstance(entry, Mapping)]
    if not weighted:
        return [Source(paths=_texts(entries, path), weight=None)]
    if len(weighted) < len(entries):
        plain = next(entry for entry in entries if not isinstance(entry, Mapping))
        raise ValueError(
            f"{KEY}: either every entry has a weight or none, but {plain} has none; write {{path: {plain}, weight: ...}}"
        )
    return [_parse_weighted(entry) for entry in weighted]


def _parse_weighted(entry: Mapping) -> Source:
    if not {"path", "weight"} <= set(entry):
        hint = "; a list is needed because settings of two dictionaries would be merged" if "path" not in entry else ""
        raise ValueError(f"{KEY}: an entry of a mixture must be {{path: ..., weight: ...}}, got {dict(entry)}{hint}")
    own = {name: value for name, value in entry.items() if name not in ("path", "weight")}
    if unknown := [name for name in own if name not in OWN_FIELDS]:
        raise ValueError(f"{KEY}: an entry of a mixture may also set {', '.join(OWN_FIELDS)}, but not {unknown[0]}")
    for name, value in own.items():
        if not isinstance(value, str) and (value is not None or name == "prompt_field"):
            raise ValueError(
                f"{KEY}: {name} of {entry['path']} must be text{'' if name == 'prompt_field' else ' or null'}, got {value!r}"
            )
    path, weight = entry["path"], entry["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight) or weight <= 0:
        raise ValueError(
            f"{KEY}: the weight of {path} must be a number above 0, got {weight!r}; remove the entry to leave it out"
        )
    return Source(
        paths=_texts([path] if isinstance(path, str | Path) else path, path), weight=float(weight), fields=own
    )


def _texts(paths: Any, given: object) -> tuple[str, ...]:
    if (
        not isinstance(paths, Sequence)
        or not paths
        or not all(isinstance(path, str | Path) and str(path) for path in paths)
    ):
        raise ValueError(f"{KEY} must be {FORM}, got {given!r}")
    return tuple(map(str, paths))


def is_pattern(path: str) -> bool:
    """Return True if the path has wildcards and is not itself the name of a file."""
    return bool(MAGIC & set(path)) and not Path(path).expanduser().is_file()


def _expand(path: str) -> list[str]:
    if is_pattern(path):
        matches = glob.glob(os.path.expanduser(path), recursive=True)
        files = sorted(match for match in matches if not os.path.isdir(match))
        if not files:
            folder = _fixed_folder(path)
            absent = "" if folder.is_dir() else ", which does not exist"
            raise ValueError(f"{KEY}: no file matches the pattern {path} in the folder {folder}{absent}")
        return files
    place = Path(path).expanduser()
    if place.is_dir():
        raise ValueError(
            f"{KEY}: {path} is a folder; name a file in it, or files as in {path}/*.jsonl, or use data=hub_dataset for the folder"
        )
    if not place.is_file():
        below = "" if place.is_absolute() else f"; relative paths start at {Path.cwd()}"
        raise ValueError(f"{KEY}: there is no file {path}{below}")
    return [path]


def _fixed_folder(pattern: str) -> Path:
    """Return the folder in front of the first part with a wildcard."""
    folder = Path.cwd()
    for part in Path(pattern).expanduser().parts[:-1]:
        if MAGIC & set(part):
            break
        folder /= part
    return folder


def check_disjoint(files: Sequence[Sequence[str]]) -> None:
    """Raise ValueError if a file is in two sources of a mixture: its weight would not be what either says."""
    found: set[Path] = set()
    for source in files:
        places = {Path(file).expanduser().resolve(): file for file in source}
        if twice := found & places.keys():
            raise ValueError(
                f"{KEY}: {places[min(twice)]} is in two entries of the mixture; name each file in one of them"
            )
        found |= places.keys()


def mix(sources: Sequence[tuple[Source, Sequence[Problem]]]) -> Sequence[Problem]:
    """Return the problems of one pass over a mixture, in which each source has the share that its weight says.

    The pass is as short as it can be without leaving out a problem: one source is used once, the others are repeated. Source k with
    n_k problems and the share w_k gets round(w_k max_j n_j / w_j) places. They are filled by repeating the source in its order, the last
    time only its beginning. The sources alternate, so that also a part of the pass has the shares.
    """
    total = sum(source.weight or 0 for source, _ in sources)
    shares = [(source.weight or 0) / total for source, _ in sources]
    size = max(len(problems) / share for (_, problems), share in zip(sources, shares, strict=True))
    counts = [max(len(problems), round(share * size)) for (_, problems), share in zip(sources, shares, strict=True)]
    for (source, problems), count in zip(sources, counts, strict=True):
        if count > MOST_REPETITIONS * len(problems):
            raise ValueError(
                f"{KEY}: with the weight {source.weight:g}, the {len(problems)} problems of {source.name} would be repeated "
                f"{count / len(problems):.0f} times per pass, more than {MOST_REPETITIONS}: lower its weight, or raise those of the others"
            )
    described = [
        f"{count} from {source.name} ({count / len(problems):.3g} times each)"
        for (source, problems), count in zip(sources, counts, strict=True)
    ]
    log.info("one pass over the mixture has %d problems and leaves out none: %s", sum(counts), ", ".join(described))
    places = heapq.merge(*(_places(k, n) for k, n in enumerate(counts)))
    return collect(sources[k][1][i % len(sources[k][1])] for _, k, i in places)


def _places(source: int, count: int) -> Iterator[tuple[float, int, int]]:
    for i in range(count):
        yield (i + 0.5) / count, source, i
