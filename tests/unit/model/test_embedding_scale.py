"""The scaled embedding has the bits of transformers' Gemma 3 in each precision."""

import pytest
import torch

from megatron_slm.model.decoder import scale_embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaled_embedding_is_that_of_transformers(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    scale = 3072**0.5  # 55.4256, which bf16 rounds to 55.5
    theirs = Gemma3TextScaledWordEmbedding(32, 3072, 0, embed_scale=scale).to(dtype)
    ours = torch.nn.Embedding(32, 3072, dtype=dtype)
    with torch.no_grad():
        theirs.weight.normal_(generator=torch.Generator().manual_seed(1))
        ours.weight.copy_(theirs.weight)
    scale_embedding(ours, scale)
    tokens = torch.arange(32)
    assert torch.equal(ours(tokens), theirs(tokens))
    assert not torch.equal(ours(tokens), ours.weight * scale) or dtype is torch.float32
