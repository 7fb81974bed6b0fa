"""The compact training state: what is read back is what was written, but for float16's rounding of matrices."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from training import compact
from training.model import Auxiliary, AuxiliarySizes, FastVLM, ModelConfig

SMALL = ModelConfig(
    image_size=64, widths=(8, 16, 32, 32, 32), depths=(1, 1, 1, 1, 1), vocab_size=64, hidden_size=64, layers=1, heads=1
)


@pytest.mark.slow
def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, auxiliary = FastVLM(SMALL), Auxiliary(SMALL, AuxiliarySizes())
    state = {
        "model": model.state_dict(),
        "auxiliary": auxiliary.state_dict(),
        "optimizer": {},
        "config": json.dumps(asdict(SMALL)),
        "step": 7,
        "pictures": 99,
    }
    compact.write(state, tmp_path / "state.safetensors")
    again = compact.read(tmp_path / "state.safetensors")
    assert (again["step"], again["pictures"], ModelConfig.from_json(again["config"])) == (7, 99, SMALL)
    other = FastVLM(SMALL)
    other.load_state_dict(again["model"])
    Auxiliary(SMALL, AuxiliarySizes()).load_state_dict(again["auxiliary"])
    for name, tensor in model.state_dict().items():
        kept = other.state_dict()[name]
        assert torch.equal(kept, tensor) if tensor.ndim < 2 else torch.allclose(kept, tensor, rtol=1e-3, atol=1e-6)
