"""The parts of ``benchmarks/gpu_smoke.py``, and what runs them."""
