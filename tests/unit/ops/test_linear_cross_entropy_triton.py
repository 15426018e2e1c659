"""The Triton kernels' arithmetic on CPU, by Triton's own interpreter: no GPU needed."""

from tests.unit.ops.in_interpreter import run_in_interpreter


def test_kernels_in_the_interpreter():
    run_in_interpreter("interpreted_triton_kernels.py", tests=15)
