"""The suite's parity and restore tests, for a run of tests/gpu alone to hold them.

conftest.DEVICE puts their engines on the GPU where there is one; on a CPU they run in their own
files.
"""

import pytest
import torch
from test_dense import (
    test_a_failing_probe_leaves_no_trace,
    test_a_perturbed_tensor_is_its_slice_of_the_specification,
    test_an_update_follows_the_specification,
    test_two_hundred_probes_leave_no_trace,
)
from test_engine import (
    test_an_entry_is_reused_in_its_own_namespace_only,
    test_scores_equal_transformers,
    test_the_same_call_gives_the_same_bits,
)
from test_training import test_twenty_steps_equal_the_plain_loop

__all__ = [
    "test_a_failing_probe_leaves_no_trace",
    "test_a_perturbed_tensor_is_its_slice_of_the_specification",
    "test_an_entry_is_reused_in_its_own_namespace_only",
    "test_an_update_follows_the_specification",
    "test_scores_equal_transformers",
    "test_the_same_call_gives_the_same_bits",
    "test_twenty_steps_equal_the_plain_loop",
    "test_two_hundred_probes_leave_no_trace",
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
