"""No password, token or key of the environment stands in what is written."""

import pytest

from megatron_slm.files.redact import redacted, redacted_values
from megatron_slm.monitoring import MultiSink


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("proxy http://me:pa55@proxy:3128/ failed", "proxy http://***@proxy:3128/ failed"),
        ("https://hf_abcdefghijklmnopqrstuv@hf.co/x", "https://***@hf.co/x"),
        ("--x https://host/f?user=me&token=abc&n=1", "--x https://host/f?user=me&token=***&n=1"),
        ("token ghp_0123456789012345678901234567890123", "token ***"),
        ("key 0123456789abcdef of W&B", "key *** of W&B"),
        ("a plain data/tokens@v2 path, 3 tokens", "a plain data/tokens@v2 path, 3 tokens"),
    ],
)
def test_secrets_are_hidden_and_the_rest_stays(text, shown):
    environment = {"WANDB_API_KEY": "0123456789abcdef", "USE_TOKEN": "true", "PWD": "/plain/data"}
    assert redacted(text, environment) == shown


def test_values_of_a_configuration():
    config = {"run": {"name": "x"}, "tags": ["http://a:b@c"], "steps": 3}
    assert redacted_values(config) == {"run": {"name": "x"}, "tags": ["http://***@c"], "steps": 3}


def test_what_a_run_says_holds_no_password():
    heard = []

    class Broken:
        def log(self, record, step):
            raise OSError("cannot reach http://me:pa55@proxy:3128")

        def message(self, text, level):
            heard.append(text)

    sinks = MultiSink([Broken(), Broken()])
    sinks.log({}, 1)
    sinks.message("http://me:pa55@proxy:3128", "warning")
    assert len(heard) == 4
    assert not [text for text in heard if "pa55" in text]
