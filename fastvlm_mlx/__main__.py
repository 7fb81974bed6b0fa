"""`python -m fastvlm_mlx` is `fastvlm-mlx`."""

from .cli import main

main()
