"""What keeps a Core ML program off the Neural Engine, as far as it is known, looked for in a package as it was written.

Core ML places each operation itself and says where on a Mac only (`MLComputePlan`); these rules are what Apple
publishes and what people found. A program that keeps them can run there, which is no promise that it will.
"""

from dataclasses import dataclass
from typing import Any

MAX_RANK = 4
MAX_AXIS = 16384  # elements along an axis
MAX_KERNEL = 13  # pixels of a filter's side

# Operations that the engine computes, and those that only say how a weight is stored. A cast stands where float32 comes
# in or goes out.
COMPUTED = {
    "add", "conv", "gelu", "matmul", "mul", "reduce_mean", "relu", "reshape", "rsqrt", "sigmoid", "softmax", "square",
    "sub", "transpose",
}  # fmt: skip
WEIGHTS = {"const", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"}
FLOAT16, FLOAT32 = 10, 11  # MIL's numbers of types
WHOLE = {21, 22, 23, 24, 31, 32, 33, 34}  # int8 to uint64


@dataclass(frozen=True)
class Rule:
    """A rule, whether a program keeps it, and what was found."""

    name: str
    kept: bool
    found: str


def check(spec: Any) -> list[Rule]:
    """Look through a package's specification (protobuf) for what the Neural Engine does not take."""
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    operations = list(block.operations)
    kinds = [operation.type for operation in operations]
    work = [operation for operation in operations if operation.type not in WEIGHTS]
    outputs = [output for operation in work for output in operation.outputs]
    shapes = [_shape(output) for output in outputs]
    ranks = [len(shape) for shape in shapes]
    fixed = all(size > 0 for shape in shapes for size in shape)
    longest = max(size for shape in shapes for size in shape)
    foreign = sorted(set(kinds) - COMPUTED - WEIGHTS - {"cast"})
    casts = [place for place, operation in enumerate(work) if operation.type == "cast"]
    turns = [place for place, operation in enumerate(work) if operation.type == "transpose"]
    wide = [
        output.name
        for operation in work
        if operation.type != "cast"
        for output in operation.outputs
        if output.type.tensorType.dataType not in (FLOAT16, *WHOLE)
    ]
    kernels = [
        max(_shape(output)[2:])
        for operation in operations
        if operation.type in WEIGHTS
        for output in operation.outputs
        if len(_shape(output)) == MAX_RANK
    ]
    last = len(work) - 1
    return [
        Rule("operations", not foreign, ", ".join(foreign) or f"{len(work)} of {len(set(kinds) - WEIGHTS)} kinds"),
        Rule("rank", max(ranks) <= MAX_RANK, f"at most {max(ranks)} axes, the engine has {MAX_RANK}"),
        Rule("shapes", fixed, "all fixed" if fixed else "some are flexible"),
        Rule("axes", longest <= MAX_AXIS, f"at most {longest} elements, the engine has {MAX_AXIS}"),
        Rule("filters", max(kernels) <= MAX_KERNEL, f"at most {max(kernels)} pixels wide, the engine has {MAX_KERNEL}"),
        Rule("float16", not wide, f"{len(wide)} results in float32" if wide else "every result within"),
        Rule("casts", all(place in (0, last) for place in casts), f"{len(casts)}, where float32 comes in and goes out"),
        Rule("transposition", len(turns) == 1 and turns[0] >= last - 1, f"{len(turns)}, at the output"),
    ]  # fmt: skip


def _shape(output: Any) -> list[int]:
    """An output's shape, 0 for an axis without a fixed length."""
    return [int(dimension.constant.size) for dimension in output.type.tensorType.dimensions]
