"""Selective state-space scan (SSD) with one decay per head and token."""

from transmamba.kernels.ssd.scan import final_state, ssd_scan
from transmamba.kernels.ssd.step import ssd_step

__all__ = ["final_state", "ssd_scan", "ssd_step"]
