"""The ground that every test stands on; all of it is set before JAX is imported.

Eight fake CPU devices, strict promotion rules, runtime checks of every annotation in ``cla_jax``,
figures without a display, and the same hypothesis examples in every run of CI.
"""

import gc
import os
from pathlib import Path

ON_GPU = os.environ.get("CLA_JAX_TEST_GPU") == "1"

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The tests compile much and compute little: without LLVM's optimisations (XLA's passes stay)
    # they take little more than half the processor time. First, so that XLA_FLAGS can overrule it.
    flags.insert(0, "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join(flags)
# Several test processes share a GPU: none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["MPLBACKEND"] = "Agg"

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# From here on, importing cla_jax checks shapes and types of every annotated call.
install_import_hook("cla_jax", "beartype.beartype")

settings.register_profile(
    "default",
    deadline=None,  # the first example of a shape pays for its compilation
    max_examples=30,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("CLA_JAX_HYPOTHESIS", "default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests marked ``gpu`` where there is none to run on, and says why."""
    if item.get_closest_marker("gpu") is None:
        return
    if not ON_GPU:
        pytest.skip("runs on a GPU: set CLA_JAX_TEST_GPU=1 there")
    if jax.default_backend() != "gpu":
        pytest.skip(f"runs on a GPU: JAX found only {jax.default_backend()!r}")


@pytest.fixture(autouse=True)
def _dtype_promotion(request: pytest.FixtureRequest):
    """Runs a test marked ``standard_dtype_promotion`` with JAX's own implicit promotion."""
    if request.node.get_closest_marker("standard_dtype_promotion") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"):
            yield


_finished = 0  # tests of this process


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Drops compiled programs before they use up the memory maps that a process may have.

    Each takes several, and Linux allows 65,530: the compiler crashes at one more. No test may hold
    on to a program, only to the function that is compiled.
    """
    global _finished
    _finished += 1
    maps = Path("/proc/self/maps")
    if nextitem is None or _finished % 25 or not maps.exists():
        return
    with maps.open() as lines:
        if sum(1 for _ in lines) > 15_000:
            jax.clear_caches()
            gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes minutes by itself: at the end, one process would wait for another's."""
    items.sort(key=lambda item: not item.name.startswith("test_25_kills"))
