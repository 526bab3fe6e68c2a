"""``python -m aibridge``."""

from aibridge.cli import main

main()
