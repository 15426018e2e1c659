"""Evaluation on a GPU against the same model's own logits there. Skipped without CUDA."""

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY = 500
LENGTH = 64
TOLERANCE_NATS = {"fp32": 1e-4, "bf16": 0.1}
"""Per token; the compared logits of bf16 are rounded, the losses come from fp32 sums."""


def make_model(groups, precision):
    from megatron_slm.config.schema import Config, DataConfig, DeviceConfig, ModelConfig
    from megatron_slm.model.build import build_model

    model = ModelConfig(
        layers=2, hidden_size=128, ffn_hidden_size=352, attention_heads=4, initialization_std=0.1
    )
    device = DeviceConfig(precision=precision)
    config = Config(model=model, device=device, data=DataConfig(sequence_length=LENGTH))
    return build_model(config, VOCABULARY, groups, trainable=False)


def log_probabilities(model, ids, groups):
    """log_p_SV of the token after each of the ids, fp32."""
    tokens = torch.tensor([ids], device=groups.device)
    positions = torch.arange(len(ids), device=groups.device)[None]
    with torch.no_grad():
        logits_SV = model(tokens, positions, None)[0]
    return logits_SV[:, :VOCABULARY].float().log_softmax(-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_model_answers_with_the_models_own_probabilities(precision, groups):
    from megatron_slm.evaluation.text_model import TextModel
    from megatron_slm.evaluation.text_requests import Row, greedy

    models = make_model(groups, precision)
    random = np.random.default_rng(0)
    texts = [random.integers(0, VOCABULARY, length).tolist() for length in (LENGTH + 1, 17, 40)]
    text_model = TextModel(models, groups, VOCABULARY, batch_size=2)
    answers = text_model.log_probabilities([Row(ids, 10) for ids in texts])
    for (total, _), ids in zip(answers, texts, strict=True):
        log_p_SV = log_probabilities(models[0], ids[:-1], groups)
        asked_S = log_p_SV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-10:]
        assert total == pytest.approx(float(asked_S.sum()), abs=10 * TOLERANCE_NATS[precision])
    if precision == "fp32":
        [continued] = text_model.continued([texts[1]], 3, greedy, lambda ids: False)
        grown = list(texts[1])
        for _ in range(3):
            grown.append(int(log_probabilities(models[0], grown, groups)[-1].argmax()))
        assert continued == grown[len(texts[1]) :]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sums_are_those_of_the_losses(precision, groups):
    from megatron_slm.data.batch import plain_batch
    from megatron_slm.training.evaluate import loss_where, losses_of_models, token_sums

    models = make_model(groups, precision)
    ids_BS = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH + 1))
    batch = plain_batch(ids_BS[:, :-1].copy(), ids_BS[:, 1:].copy()).to(groups.device)
    odd = loss_where(lambda each: each.labels_BS % 2 == 1)
    losses_of = losses_of_models(models, groups)
    sums = token_sums(losses_of, [[batch]], groups, [*loss_where(None), *odd])
    expected = []
    for ids in ids_BS.tolist():
        log_p_SV = log_probabilities(models[0], ids[:-1], groups)
        expected += (-log_p_SV[torch.arange(LENGTH), torch.tensor(ids[1:])]).tolist()
    labels = ids_BS[:, 1:].reshape(-1)
    of_odd = np.array(expected)[labels % 2 == 1]
    tolerance = len(expected) * TOLERANCE_NATS[precision]
    assert sums[0] == pytest.approx(sum(expected), abs=tolerance)
    assert sums[1] == len(expected)
    assert sums[2] == pytest.approx(of_odd.sum(), abs=tolerance)
    assert sums[3] == len(of_odd)
