"""Operations for MLX's CPU backend, where the general ones are slow; Metal and CUDA never come here.

MLX on a CPU runs a grouped convolution, the product with a quantised matrix and every exponential as plain loops on one
core, and multiplies one row with a matrix as if it were many. For a large model OpenVINO compiles programs for all of
it (`compiler`, `graphs`): the tower as a whole (`tower`), a decoder's products, SwiGLU and attention (`products`), and
products with matrices as they are quantised (`quantised`). A small model is done before that library is imported: its
convolutions are banded matrix products (`convolution`), and GELU takes NumPy's exponential on every core
(`activations`). A sum is NumPy's as well (`sums`), of any dtype.
"""

from .. import blas
from .activations import gelu
from .compiler import has_bfloat16, load, loaded
from .convolution import depthwise
from .memory import keep_memory, memory_bytes
from .packed import dequantised, keep_dequantised
from .products import attention, product, swiglu, takes_attention, takes_product, takes_swiglu
from .quantised import compile_all as compile_quantised
from .quantised import product as quantised_product
from .quantised import takes as takes_quantised
from .sums import total
from .tower import features
from .tower import prepare as prepare_tower
from .tower import takes as takes_tower

blas.start_threads()  # NumPy is imported by now

__all__ = [
    "attention",
    "compile_quantised",
    "depthwise",
    "dequantised",
    "features",
    "gelu",
    "has_bfloat16",
    "keep_dequantised",
    "keep_memory",
    "load",
    "loaded",
    "memory_bytes",
    "prepare_tower",
    "product",
    "quantised_product",
    "swiglu",
    "takes_attention",
    "takes_product",
    "takes_quantised",
    "takes_swiglu",
    "takes_tower",
    "total",
]
