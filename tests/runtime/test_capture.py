"""`CaptureLog`: calls in order, parts of one call together, copies and not views."""

import pytest
import torch

from steer_compile.errors import NotSteered, SiteNotFound
from steer_compile.runtime.capture import CaptureLog

A, B = ("post_block", 0), ("mlp_out", 1)


def test_calls_follow_one_another_along_the_tokens() -> None:
    log = CaptureLog()
    buffer = torch.arange(12.0).view(6, 2)
    log.take({A: buffer}, (2, 3), False)
    buffer.fill_(-1)
    log.take({A: buffer[:2]}, (2, 1), False)
    assert log[A].shape == (2, 4, 2)
    assert log[A][1].tolist() == [[6, 7], [8, 9], [10, 11], [-1, -1]]
    assert torch.equal(log["hook_resid_post", 0], log[A])
    assert (len(log), list(log)) == (2, [A])


def test_parts_of_one_call_are_one_step() -> None:
    log = CaptureLog()
    for _ in range(2):
        log.take({A: torch.zeros(2, 2)}, (1, 2), False)
        log.take({B: torch.ones(2, 3)}, (1, 2), True)
    assert [set(step) for step in log.steps] == [{A, B}, {A, B}]
    assert log[B].shape == (1, 4, 3)


def test_a_value_that_is_not_there_is_refused() -> None:
    log = CaptureLog()
    with pytest.raises(NotSteered, match=r"layers\.0\.post_block was not captured: no compiled graph ran"):
        log[A]
    log.take({A: torch.zeros(2, 2)}, (1, 2), False)
    with pytest.raises(SiteNotFound, match=r"layers\.1\.mlp_out is not captured; captured are layers\.0\.post_block"):
        log[B]
    log.take({A: torch.zeros(4, 2)}, (2, 2), False)
    with pytest.raises(SiteNotFound, match=r"batches of \[1, 2\] sequences; read log\.steps\[i\]"):
        log[A]
