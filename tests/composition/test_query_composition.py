"""Models composed with projectors of learned queries."""

import pytest
from model_tester import ComposedModelTester


QFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

PROJECTORS = {
    "minicpm": {"type": "resampler", "num_queries": 6},
    "idefics2": {
        "type": "resampler",
        "num_queries": 6,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "positions": None,
        "norm": "rms_norm",
        "residual": True,
        "queries_as_context": True,
        "mlp": {"hidden_features": 64, "hidden_act": "silu", "bias": False, "gated": True},
        "output_projection": False,
    },
    "qformer": {"type": "qformer", "num_queries": 6, "qformer_config": QFORMER},
}


@pytest.mark.parametrize("projector", PROJECTORS.values(), ids=PROJECTORS)
def test_composed_model_passes_the_checks(projector, tmp_path):
    tester = ComposedModelTester(projector=projector)
    assert tester.one_picture()["input_ids"].tolist()[0].count(tester.model.config.image_token_id) == 6
    tester.check_everything(tmp_path)
