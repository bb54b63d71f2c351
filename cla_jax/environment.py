"""What this machine offers: versions, devices, the attention that they take, places on disk.

The ground of `cla-jax doctor`. Nothing of JAX is imported before `diagnose` asks for its devices,
so that a machine without it can be told so.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import os
import platform
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement

__all__ = ["Choice", "Device", "Diagnosis", "Package", "Place", "diagnose", "packages"]

_DISTRIBUTION = "cla-jax"
_EXTRAS = ("cuda", "tpu", "eval", "tracking", "notebooks")
_CASES = (("bfloat16", 128, 1), ("bfloat16", 512, 1), ("float32", 128, 1), ("bfloat16", 128, 4))


@dataclasses.dataclass(frozen=True)
class Package:
    """A dependency, as it is here.

    Attributes:
        name: of the distribution.
        version: installed; None: it is missing.
        wanted: versions that will do, such as `>=0.11.2`.
        extra: of ours that asks for it; None: it is always needed.
    """

    name: str
    version: str | None
    wanted: str
    extra: str | None = None

    @property
    def state(self) -> Literal["ok", "missing", "wrong version"]:
        """Whether it will do."""
        if self.version is None:
            return "missing"
        fits = Requirement(f"{self.name}{self.wanted}").specifier.contains(
            self.version, prereleases=True
        )
        return "ok" if fits else "wrong version"


@dataclasses.dataclass(frozen=True)
class Device:
    """Devices of one kind.

    Attributes:
        kind: as the vendor calls it.
        platform: `cpu`, `gpu` or `tpu`.
        count: how many of them JAX sees.
        memory_bytes: what JAX may use of each; None where it does not say.
        compute_capability: of NVIDIA GPUs.
    """

    kind: str
    platform: str
    count: int
    memory_bytes: int | None = None
    compute_capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which implementation of attention some inputs take on the first device.

    Attributes:
        operation: training and prefill, or decoding.
        inputs: dtype, head dim, queries a row.
        taken: the implementation's name.
        reason: why this one.
        others: why not each of the others.
    """

    operation: str
    inputs: str
    taken: str
    reason: str
    others: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory that something is kept in.

    Attributes:
        what: is kept there.
        path: the directory, which need not exist yet.
        free_bytes: on its disk; None where that cannot be told.
    """

    what: str
    path: str
    free_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All of it.

    Attributes:
        version: of this library.
        python: version.
        system: operating system and processor.
        packages: needed ones first.
        devices: by kind.
        attention: the paths that are taken.
        places: on disk.
        problems: what keeps the library from working, a line each.
    """

    version: str
    python: str
    system: str
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    attention: tuple[Choice, ...]
    places: tuple[Place, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with each package's state."""
        values = dataclasses.asdict(self)
        for record, package in zip(values["packages"], self.packages, strict=True):
            record["state"] = package.state
        for record, choice in zip(values["attention"], self.attention, strict=True):
            record["others"] = dict(choice.others)
        return values


def diagnose() -> Diagnosis:
    """Looks at this machine. Starts JAX, trains and allocates nothing."""
    version, requirements = _declared()
    found = packages(requirements)
    problems = [_problem(package) for package in found if not package.extra]
    devices, attention = (), ()
    try:
        devices = _devices()
    except (ImportError, RuntimeError) as error:
        problems.append(f"JAX does not start: {_line(error)}")
    try:
        attention = (*_training_choices(), *_decoding_choices()) if devices else ()
    except (ImportError, RuntimeError) as error:
        problems.append(f"attention cannot be asked: {_line(error)}")
    return Diagnosis(
        version=version,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages=found,
        devices=devices,
        attention=attention,
        places=_places(),
        problems=tuple(line for line in problems if line),
    )


def packages(requirements: Iterable[str]) -> tuple[Package, ...]:
    """The state of declared requirements, ours and those of the extras that people install.

    An extra of a dependency (`jax[cuda13]`) stands for what that dependency asks for under it; of
    JAX, jaxlib is listed too.

    Args:
        requirements: lines such as `jax>=0.11.2` or `lm-eval>=0.4.13; extra == "eval"`.
    """
    needed, optional = dict[str, Package](), dict[str, Package]()
    for line in requirements:
        requirement = Requirement(line)
        extra = _extra(requirement)
        if extra is None:
            needed[requirement.name] = _package(requirement, None)
        elif extra in _EXTRAS:
            for one in _with_extras(requirement):
                optional.setdefault(one.name, _package(one, extra))
    for one in _requirements_of("jax"):
        if one.name == "jaxlib" and one.marker is None:
            needed["jaxlib"] = _package(one, None)
    order = sorted(needed)
    asked = [package for name, package in optional.items() if name not in needed]
    return (*(needed[name] for name in order), *asked)


def _declared() -> tuple[str, Sequence[str]]:
    """Our version and requirements: as installed, or as a checkout's pyproject.toml has them."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
        return distribution.version, distribution.requires or ()
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).parents[1] / "pyproject.toml"
    if not path.exists():
        return "not installed", ()
    project = tomllib.loads(path.read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        lines += [f'{requirement}; extra == "{extra}"' for requirement in requirements]
    return f"{project['version']} (run from its sources)", lines


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement hangs on."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    return next(
        (extra for extra in _EXTRAS if requirement.marker.evaluate({"extra": extra})), "another"
    )


def _with_extras(requirement: Requirement) -> list[Requirement]:
    """A requirement, or, where it names extras, what its distribution asks for under them."""
    asked = [
        one
        for one in _requirements_of(requirement.name)
        for extra in requirement.extras
        if one.marker and one.marker.evaluate({"extra": extra})
        and not one.marker.evaluate({"extra": ""})
    ]  # fmt: skip
    return [one for one in asked if one.name != "jaxlib"] or [requirement]


def _requirements_of(name: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return []


def _package(requirement: Requirement, extra: str | None) -> Package:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return Package(requirement.name, version, str(requirement.specifier), extra)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _problem(package: Package) -> str:
    if package.state == "missing":
        return f"{package.name} is missing; {package.wanted or 'any version'} is needed"
    if package.state == "wrong version":
        return f"{package.name} is {package.version}; {package.wanted} is needed"
    return ""


def _devices() -> tuple[Device, ...]:
    import jax

    found = dict[Device, int]()
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        capability = getattr(device, "compute_capability", None)
        one = Device(device.device_kind, device.platform, 0, memory, capability)
        found[one] = found.get(one, 0) + 1
    return tuple(dataclasses.replace(device, count=count) for device, count in found.items())


def _training_choices() -> list[Choice]:
    import jax.numpy as jnp

    from cla_jax.models.attention import attention_path

    choices = []
    for dtype, head_dim in dict.fromkeys((dtype, head_dim) for dtype, head_dim, _ in _CASES):
        path = attention_path(head_dim, jnp.dtype(dtype))
        inputs = f"{dtype}, head dim {head_dim}"
        choices.append(Choice("training, prefill", inputs, path.implementation, path.reason))
    return choices


def _decoding_choices() -> list[Choice]:
    import jax
    from cla_kernels import IMPLEMENTATIONS, choose_implementation

    choices = []
    for dtype, head_dim, queries in _CASES:
        q = jax.ShapeDtypeStruct((8, queries, 16, head_dim), dtype)
        k = jax.ShapeDtypeStruct((1, 8, 1024, 1, head_dim), dtype)
        taken, reason = choose_implementation(q, k)
        others = tuple((name, _obstacle(name, q, k)) for name in IMPLEMENTATIONS if name != taken)
        inputs = f"{dtype}, head dim {head_dim}, {queries} {'query' if queries == 1 else 'queries'}"
        choices.append(Choice("decoding", inputs, taken, reason, others))
    return choices


def _obstacle(implementation: Any, q: Any, k: Any) -> str:
    """What keeps an implementation that was not chosen from these inputs."""
    import jax
    from cla_kernels import decode_attention

    lengths = jax.ShapeDtypeStruct(q.shape[:1], "int32")
    call = functools.partial(decode_attention, implementation=implementation)
    try:
        jax.eval_shape(call, q, k, k, lengths)
    except (ValueError, RuntimeError) as error:  # JAX looks for cuDNN itself
        return str(error)
    return "would run, but is not the default"


def _places() -> tuple[Place, ...]:
    """Where runs and prepared text lie by default, and the caches of libraries."""
    places = [("runs, prepared text", Path("runs"))]
    home = Path.home()
    tfds = Path(os.environ.get("TFDS_DATA_DIR", home / "tensorflow_datasets"))
    places.append(("TFDS datasets", tfds))
    try:
        constants = importlib.import_module("huggingface_hub.constants")
        places.append(("Hugging Face hub", Path(constants.HF_HUB_CACHE)))
    except ImportError:
        pass  # it is among the missing packages
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        places.append(("compiled programs", Path(compiled)))
    return tuple(Place(what, str(path.absolute()), _free(path.absolute())) for what, path in places)


def _free(path: Path) -> int | None:
    """Free bytes of the disk that a directory lies on, or will."""
    existing = next((p for p in (path, *path.parents) if p.is_dir()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None
