"""Core ML export under the name that people know it by: `from model_export import convert_to_coreml`."""

from fastvlm_mlx import convert_to_coreml

__all__ = ["convert_to_coreml"]
