"""``python -m tda.cli``, for when the script ``tda`` is not on the path."""

from tda.cli import main

main()
