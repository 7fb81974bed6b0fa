"""Against the originals: PyTorch, transformers, timm and mlx-lm with random weights, stage by stage."""
