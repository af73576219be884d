import pytest
import torch

from unweave import UnweaveError
from unweave.synthetic.arguments import own_generator, require_count, require_number, to_dtype


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(UnweaveError, match=r"^num_features must be a whole number of at least 1, got "):
        require_count("num_features", value)
    assert require_count("n", 0, least=0) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, 0, 2])
def test_a_number_is_finite_and_in_its_range(value):
    with pytest.raises(UnweaveError, match=r"^lr must be a finite number above 0 and at most 1, got "):
        require_number("lr", value, above=0, most=1)
    assert require_number("lr", 1, above=0, most=1) == 1.0


def test_a_dtype_is_itself_or_its_name():
    assert to_dtype("torch.bfloat16") == to_dtype("bfloat16") == to_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(UnweaveError, match="did you mean 'float32'"):
        to_dtype("flaot32")
    with pytest.raises(UnweaveError, match="dtype must be one of"):
        to_dtype(torch.int64)


def test_a_stream_of_its_own():
    """A seed repeats it whatever else is drawn; without one, the global seed does, and two streams differ."""
    first = torch.rand(4, generator=own_generator(3))
    torch.rand(5)
    assert torch.equal(torch.rand(4, generator=own_generator(3)), first)
    torch.manual_seed(1)
    a, b = own_generator(None).initial_seed(), own_generator(None).initial_seed()
    torch.manual_seed(1)
    assert a == own_generator(None).initial_seed() != b
    with pytest.raises(UnweaveError, match=r"seed must be a whole number of at most 64 bits, or None, got 1\.5"):
        own_generator(1.5)  # type: ignore[arg-type]
