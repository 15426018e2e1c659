"""How the next token is drawn, without a model."""

from collections import Counter

import torch

from megatron_slm.evaluation.text_requests import greedy, sampler


def shares(choose, logits_V, draws=4000):
    torch.manual_seed(0)
    counts = Counter(choose(logits_V.clone()) for _ in range(draws))
    return [counts[token] / draws for token in range(len(logits_V))]


def test_draws_follow_the_probabilities_of_what_is_kept():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits_V = probabilities.log()
    cases = {
        (1.0, 0, 1.0): probabilities,
        (0.5, 0, 1.0): probabilities**2,
        (1.0, 2, 1.0): torch.tensor([0.0, 0.4, 0.0, 0.3]),
        (1.0, 0, 0.65): torch.tensor([0.0, 0.4, 0.0, 0.3]),
        (1.0, 0, 0.75): torch.tensor([0.0, 0.4, 0.2, 0.3]),
        (1.0, 0, 0.1): torch.tensor([0.0, 1.0, 0.0, 0.0]),
    }
    for settings, weights in cases.items():
        expected = weights / weights.sum()
        got = torch.tensor(shares(sampler(*settings), logits_V))
        torch.testing.assert_close(got, expected, atol=0.03, rtol=0)
        assert (got[expected == 0] == 0).all(), settings
    assert greedy(logits_V) == 1
