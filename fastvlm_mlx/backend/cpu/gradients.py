"""Gradients of forms that leave MLX: what goes through NumPy or BLAS by hand is a constant to MLX's differentiation.

Each such form computes what a general one does, and takes its gradient: forward as fast as it can be, backward as MLX
does it.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

Form = Callable[..., mx.array]


def with_gradient_of(general: Form) -> Callable[[Form], Form]:
    """Give a form of arrays alone, which may evaluate them, the gradient of the `general` form of the same arguments.

    The result can be differentiated (`mx.grad`, `mx.vjp`, `mx.jvp`, `mx.checkpoint`); an evaluating form still cannot
    be compiled or vectorised (`ops.general_forms`).
    """

    def decorate(form: Form) -> Form:
        differentiable = mx.custom_function(form)

        @differentiable.vjp
        def vjp(
            primals: mx.array | Sequence[mx.array], cotangent: mx.array, output: mx.array
        ) -> mx.array | list[mx.array]:
            arguments = [primals] if isinstance(primals, mx.array) else list(primals)
            _, gradients = mx.vjp(general, arguments, [cotangent])
            return gradients if len(arguments) > 1 else gradients[0]

        @differentiable.jvp
        def jvp(primals: mx.array | Sequence[mx.array], tangents: mx.array | Sequence[mx.array | None]) -> mx.array:
            arguments = [primals] if isinstance(primals, mx.array) else list(primals)
            directions = [tangents] if isinstance(tangents, mx.array) else list(tangents)
            given = [mx.zeros_like(x) if d is None else d for x, d in zip(arguments, directions, strict=True)]
            _, (along,) = mx.jvp(general, arguments, given)
            return along

        def function(*arguments: mx.array) -> mx.array:
            y: mx.array = differentiable(*arguments)  # type: ignore[assignment]  # MLX says object
            mx.eval(y)  # or it would keep its arguments
            return y

        return function

    return decorate
