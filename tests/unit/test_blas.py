"""How OpenBLAS gets into the process: with one thread while the imports last, with all of them from then on."""

import os
import subprocess
import sys

import pytest

from fastvlm_mlx.backend import blas

pytestmark = pytest.mark.skipif(blas.library is None, reason="OpenBLAS is not installed")

CODE = """
import os
before = dict(os.environ)
from fastvlm_mlx import blas
threads = [blas.library.openblas_get_num_threads()]
import fastvlm_mlx.vlm
threads.append(blas.library.openblas_get_num_threads())
print(*threads, blas.library.openblas_get_num_procs(), dict(os.environ) == before)
"""


def loaded(**chosen: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in blas.THREADS}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**environment, **chosen}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_threads_start_after_the_imports() -> None:
    first, then, cores, unchanged = loaded()
    assert (first, then, unchanged) == ("1", cores, "True")


@pytest.mark.slow
@pytest.mark.parametrize("name", blas.THREADS)
def test_the_environment_says_how_many(name: str) -> None:
    first, then, _, unchanged = loaded(**{name: "1"})
    assert (first, then, unchanged) == ("1", "1", "True")


SPARING = """
import os, sys
from fastvlm_mlx import blas
if sys.argv[1] == "spare":
    blas.spare_numpy()
before = len(os.listdir("/proc/self/task"))
import numpy
print(len(os.listdir("/proc/self/task")) - before)
import fastvlm_mlx.vlm
print(blas.library.openblas_get_num_threads(), blas.library.openblas_get_num_procs())
print(*[name for name in blas.THREADS if name in os.environ])
"""


def numpy_loaded(how: str, **chosen: str) -> list[str]:
    """Threads that NumPy's import started, OpenBLAS's threads and cores, and which settings the environment has in the
    end."""
    environment = {name: value for name, value in os.environ.items() if name not in blas.THREADS}
    command = [sys.executable, "-c", SPARING, how]
    return subprocess.run(
        command, env={**environment, **chosen}, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.slow
def test_numpy_starts_no_threads_in_a_command() -> None:
    by_itself, _, cores = numpy_loaded("leave")
    if by_itself == "0":
        pytest.skip("NumPy starts no threads here")
    assert numpy_loaded("spare") == ["0", cores, cores]


@pytest.mark.slow
def test_numpy_starts_the_threads_that_were_asked_for() -> None:
    assert numpy_loaded("spare", OMP_NUM_THREADS="2") == [*numpy_loaded("leave", OMP_NUM_THREADS="2")]
