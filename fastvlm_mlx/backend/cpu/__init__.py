"""Operations for MLX's CPU backend, where the general ones are slow; Metal and CUDA never come here.

MLX on a CPU runs a grouped convolution, the product with a quantised matrix and every exponential as plain loops on one
core, and multiplies one row with a matrix as if it were many. Here the convolution is a banded matrix product
(`convolution`), so that BLAS does the work; GELU, SwiGLU and softmax take NumPy's exponential, on every core
(`activations`, `softmax`); a quantised matrix is turned back into float32 first (`packed`), and one row has OpenBLAS's
own routine (`products`). All of that is float32, and most of it evaluates its arguments. A sum is NumPy's as well
(`sums`), of any type.
"""

from .. import blas
from .activations import LITTLE, feed_forward, gelu, swiglu
from .convolution import depthwise
from .memory import keep_memory, memory_bytes
from .packed import dequantised, keep_dequantised
from .products import FEW_ROWS, row_product
from .softmax import attention
from .sums import total

blas.start_threads()  # NumPy is imported by now

__all__ = [
    "FEW_ROWS",
    "LITTLE",
    "attention",
    "depthwise",
    "dequantised",
    "feed_forward",
    "gelu",
    "keep_dequantised",
    "keep_memory",
    "memory_bytes",
    "row_product",
    "swiglu",
    "total",
]
