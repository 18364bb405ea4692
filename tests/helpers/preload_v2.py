"""The same with the V2 runner, interpreted."""

from helpers import interpreted_v2

interpreted_v2.install()

from helpers import preload  # noqa: E402, F401
