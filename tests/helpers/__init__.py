"""What tests share; `tests` is on the path (pyproject.toml)."""
