"""`MeshConfig`: how many devices each mesh axis has. Arithmetic alone; no device is looked at."""

import dataclasses
import itertools
import math

from cla_jax._choices import check_choice

__all__ = ["AUTO", "MESH_AXES", "MeshConfig"]

MESH_AXES = ("data", "fsdp", "tensor", "stage")
AUTO = -1
_NONE = "none"
_EXPECTED = f"expected as in fsdp=4,tensor=2, or auto for one axis, or {_NONE}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; all 1, the default, is no mesh.

    Attributes:
        data: the batch is split, parameters are copied.
        fsdp: the batch is split, and so are parameters and optimizer state, which are gathered
            layer by layer.
        tensor: query heads, the feed-forward width and the vocabulary are split.
        stage: the layers are split (a pipeline).
        One of them may be -1: as many as the devices leave.

    Raises:
        ValueError: a size that is neither positive nor -1; -1 for two axes.

    Examples:
        >>> MeshConfig.parse("fsdp=4,tensor=2")
        MeshConfig(data=1, fsdp=4, tensor=2, stage=1)
        >>> str(MeshConfig.parse("fsdp").resolved(8))
        'fsdp=8'
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    stage: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            if not whole or (size < 1 and size != AUTO):
                near = f"; the nearest is {axis}=1" if whole else ""
                raise ValueError(
                    f"mesh: {axis}={size!r}: expected a number of devices, 1 or more, or auto "
                    f"(-1), which takes what the other axes leave{near}"
                )
        free = [axis for axis, size in self.sizes.items() if size == AUTO]
        if len(free) > 1:
            raise ValueError(f"mesh: {' and '.join(free)} are both auto: one axis can be")

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """The sizes in `fsdp=4,tensor=2`.

        An axis without a size, or with `auto` or -1, takes what the others leave of the devices:
        `data`, `fsdp` and `tensor` alone are the usual meshes. `none`, or nothing, is no mesh.

        Raises:
            ValueError: an unknown axis (names the nearest), an axis that is missing or given twice,
                no number.
        """
        if not isinstance(text, str):
            raise ValueError(f"mesh {text!r}: {_EXPECTED}")
        sizes: dict[str, int] = {}
        if text.strip() in ("", _NONE):
            return cls()
        for part in text.split(","):
            axis, equals, size = (p.strip() for p in part.partition("="))
            if axis in ("", _NONE):
                what = "names no axis" if axis == "" else "is no mesh and one at once"
                raise ValueError(f"mesh {text!r} {what}: {_EXPECTED}")
            check_choice("mesh axis", axis, MESH_AXES if equals else (*MESH_AXES, _NONE))
            if axis in sizes:
                raise ValueError(f"mesh {text!r} gives {axis} twice")
            try:
                sizes[axis] = AUTO if size == "auto" or not equals else int(size)
            except ValueError:
                raise ValueError(
                    f"mesh {text!r}: {axis}={size!r} is no number of devices: {_EXPECTED}"
                ) from None
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices by axis."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def devices(self) -> int:
        """All of them; of a resolved mesh."""
        return math.prod(self.sizes.values())

    @property
    def batch_shards(self) -> int:
        """Parts that a batch is split into: `data` and `fsdp`."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        named = (f"{a}={'auto' if n == AUTO else n}" for a, n in self.sizes.items() if n != 1)
        return ",".join(named) or _NONE

    def resolved(self, devices: int) -> "MeshConfig":
        """With the axis that is -1 given its size.

        Args:
            devices: how many there are. Fewer may be used, but by -1.

        Raises:
            ValueError: the sizes do not fit the devices; names meshes of the same axes that do.
        """
        fixed = math.prod(n for n in self.sizes.values() if n != AUTO)
        free = [axis for axis, size in self.sizes.items() if size == AUTO]
        if fixed <= devices and (not free or devices % fixed == 0):
            return dataclasses.replace(self, **{axis: devices // fixed for axis in free})
        what = f"is {fixed} devices" if not free else f"cannot be made of {devices} devices"
        raise ValueError(
            f"mesh {self} {what}, and there {'is' if devices == 1 else 'are'} {devices}; what "
            f"works: {', or '.join(map(str, self._that_fit(devices)))}"
        )

    def _that_fit(self, devices: int) -> list["MeshConfig"]:
        """Up to three meshes of the same axes that take all devices, the nearest first."""
        axes = [axis for axis, size in self.sizes.items() if size != 1]
        wanted = [devices if self.sizes[a] == AUTO else self.sizes[a] for a in axes]
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        fitting = [
            sizes
            for sizes in itertools.product(divisors, repeat=len(axes))
            if math.prod(sizes) == devices
        ]

        def distance(sizes: tuple[int, ...]) -> float:
            return sum(abs(math.log(n / w)) for n, w in zip(sizes, wanted, strict=True))

        nearest = sorted(fitting, key=distance)[:3]
        return [MeshConfig(**dict(zip(axes, sizes, strict=True))) for sizes in nearest]
