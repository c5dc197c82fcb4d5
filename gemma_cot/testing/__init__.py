"""Benches for code that is not ours: kernels held against their references (`kernels`), losses
held against what no loss may depend on (`losses`)."""

from gemma_cot.testing.kernels import OPERATIONS, check_kernel
from gemma_cot.testing.losses import check_loss
from gemma_cot.testing.outcome import Outcome, report

__all__ = ["OPERATIONS", "Outcome", "check_kernel", "check_loss", "report"]
