"""`python -m fastvlm_mlx` runs the command `fastvlm-mlx`."""

from .cli import main

main()
