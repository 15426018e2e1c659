"""Programs with options of their own read numbers within ranges and name the nearest option."""

import pytest

from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Count, Fraction, NotNegative, Size


@pytest.fixture
def program():
    parser = Program("tool")
    parser.add_argument("--workers", type=number_in(Size), default=1)
    parser.add_argument("--sample-bytes", type=number_in(Count), default=0)
    parser.add_argument("--share", type=number_in(Fraction), default=0.5)
    parser.add_argument("--tolerance-nats", type=number_in(NotNegative), default=0.5)
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    return parser


def test_numbers_are_read_as_in_a_configuration(program):
    options = program.parse_args(["--workers", "4", "--sample-bytes", "1.5M", "--share", "1e-1"])
    assert (options.workers, options.sample_bytes, options.share) == (4, 1_500_000, 0.1)
    assert options.tolerance_nats == 0.5


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--workers", "0"], "--workers: got 0; expected whole number, at least 1"),
        (["--workers", "two"], "--workers: got two; expected whole number, at least 1"),
        (["--sample-bytes", "-1"], "--sample-bytes: got -1; expected whole number, at least 0"),
        (["--share", "nan"], "--share: got nan; expected number, at least 0 and at most 1"),
        (["--tolerance-nats", "nan"], "got nan; expected number, at least 0"),
        (["--tolerance-nats", "inf"], "got inf; expected number, at least 0"),
        (["--workrs", "2"], "unrecognized arguments: --workrs 2; did you mean --workers?"),
        (["--sample_bytes=2"], "did you mean --sample-bytes?"),
        (["--dtype", "fp23"], "did you mean fp32?"),
        (["--zzz", "2"], "unrecognized arguments: --zzz 2\n"),
    ],
)
def test_what_cannot_be_used_is_said(program, argv, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.parse_args(argv)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--inptu", "x"], ["--inptu=x"]])
def test_a_misspelled_required_option_is_told_by_its_name(argv, capsys):
    program = Program(prog="program")
    program.add_argument("--input", required=True)
    with pytest.raises(SystemExit) as stopped:
        program.parse_args(argv)
    assert stopped.value.code == 2
    assert "are required: --input; did you mean --input?" in capsys.readouterr().err


def test_words_for_another_parser_are_left_alone(program, capsys):
    options, settings = program.parse_known_args(["--model.layers", "4", "--share", "0"])
    program.refuse_misspelled(settings)
    assert (options.share, settings) == (0.0, ["--model.layers", "4"])
    with pytest.raises(SystemExit):
        program.refuse_misspelled(["--worker", "4"])
    assert "did you mean --workers?" in capsys.readouterr().err
