"""The table of the loss's options, and what is made from it: the same in Python, C++ and the documentation."""

import inspect
from runpy import run_path

import torch

from r1fast_kernels import grpo_loss, loss_options
from r1fast_kernels.grpo_loss_reference import TENSORS
from r1fast_kernels.loss_options import NUMBERS, OPTIONS
from tests.kernels.backends import needs_cpp
from tests.kernels.loss_settings import VALUES


def test_it_can_be_read_where_torch_is_not() -> None:
    table = run_path(loss_options.__file__)
    assert [tuple(option) for option in table["OPTIONS"]] == [tuple(option) for option in OPTIONS]


def test_the_signature_and_the_page_show_every_option() -> None:
    shown = inspect.signature(grpo_loss).parameters
    assert list(shown)[-len(OPTIONS) :] == [option.name for option in OPTIONS]
    assert set(TENSORS) < shown.keys()
    assert grpo_loss.__doc__ is not None
    for option in OPTIONS:
        assert shown[option.name].default == option.default
        assert option.about.meaning in grpo_loss.__doc__


def test_every_number_is_tried_at_random() -> None:
    assert VALUES.keys() == set(NUMBERS)
    for option in OPTIONS:
        for value in VALUES.get(option.name, option.words):
            assert option.check(value) is None


@needs_cpp
def test_the_extension_was_built_from_this_table() -> None:
    """Else its struct would give each number another meaning; importing the op then fails."""
    assert torch.ops.r1fast.grpo_loss_table() == loss_options.TABLE
